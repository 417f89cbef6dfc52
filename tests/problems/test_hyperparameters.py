import pytest
import torch
from problems.conftest import Clusters, assert_matches_central_differences, estimate, opened
from torch.nn import functional

from metalearn import random
from metalearn.optim.first_order import SGD
from metalearn.problems.hyperparameters import LogisticRegression, RandomRidge


class DoubleLogistic(LogisticRegression):
    """In float64."""

    def open(self, *, test):
        self.model = lambda *sizes: torch.nn.Linear(*sizes).double()
        super().open(test=test)


def test_matches_the_closed_form():
    problem = RandomRidge(SGD(0.3), num_rows=50, num_features=5)
    meta = {"log_penalty": random.normal(random.key(0), (5,)).double() - 1}
    found = estimate(problem, meta, 250)
    torch.testing.assert_close(found.grad, problem.hypergradient(meta), rtol=1e-9, atol=1e-12)


def test_penalties_of_features_without_a_weight_should_rise():
    problem = RandomRidge(SGD(0.3), num_rows=30, num_features=10, seed=1)
    meta = {"log_penalty": torch.full((10,), -2.0, dtype=torch.float64)}
    for _ in range(200):
        meta = {"log_penalty": meta["log_penalty"] - 2.0 * problem.hypergradient(meta)["log_penalty"]}
    assert meta["log_penalty"][5:].mean() > meta["log_penalty"][:5].mean() + 1


@pytest.mark.parametrize("batch_size", [None, 8])
def test_matches_central_differences(batch_size):
    problem = opened(DoubleLogistic(Clusters(), SGD(0.5), batch_size=batch_size))
    meta = {"log_penalty": random.normal(random.key(0), (6,)).double() - 2}
    assert_matches_central_differences(problem, meta, 10)


def test_matches_implicit_differentiation():
    """Unrolled to convergence: d outer / d l_d = -(e^l_d W_d) . (H^-1 grad outer)_d, H the dense Hessian."""
    problem = opened(DoubleLogistic(Clusters(num_classes=2), SGD(1.0)))
    meta = {"log_penalty": random.normal(random.key(0), (6,)).double() * 0.5 - 1}
    key, batches = random.key(0), problem.batches(random.key(0), 200)
    end = problem.trained(meta, key, batches).end.params

    def loss(flat, examples, penalty):
        weight, bias = flat[:12].reshape(2, 6), flat[12:]
        fit = functional.cross_entropy(examples.inputs @ weight.T + bias, examples.targets)
        return fit + (penalty * weight.square().sum(0)).sum() / 2

    flat, penalty = torch.cat([end["weight"].flatten(), end["bias"]]), meta["log_penalty"].exp()
    hessian = torch.func.hessian(loss)(flat, batches.inner(0), penalty)
    adjoint = torch.linalg.pinv(hessian) @ torch.func.grad(loss)(flat, batches.outer, torch.zeros(6))
    wanted = -penalty * (end["weight"] * adjoint[:12].reshape(2, 6)).sum(0)
    torch.testing.assert_close(estimate(problem, meta, 200).grad["log_penalty"], wanted, rtol=1e-5, atol=1e-8)


def test_starts_at_the_same_loss_whatever_the_key():
    problem = opened(LogisticRegression(Clusters(), SGD(0.1), log_penalty=-3.0))
    meta = problem.init_meta(random.key(0))
    assert torch.equal(meta["log_penalty"], torch.full((6,), -3.0))
    state = problem.init(meta, random.key(1))
    loss = problem.outer(meta, state, problem.examples("validation", "cpu"))
    assert float(loss) == pytest.approx(torch.tensor(3.0).log().item())


@pytest.mark.parametrize("options", [dict(num_rows=0), dict(num_features=0), dict(noise=-1.0)])
def test_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        RandomRidge(SGD(0.1), **options)
