import pytest
import torch
from problems.conftest import Clusters, assert_matches_central_differences, double, estimate, opened, wide
from torch.nn import functional

from metalearn import random
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD
from metalearn.problems.data_weights import DataWeights


def cleaning(source=None, model=double, rule=None, **options):
    options = dict(num_examples=30, clean_examples=20) | options
    return DataWeights(source or Clusters(), model, rule or SGD(0.5), **options)


@pytest.fixture(scope="module")
def learned():
    """Sixty outer steps on clusters with half of the labels drawn anew: (problem, weights)."""
    source = Clusters(num_examples=200, num_features=10, num_classes=4, spread=1.5)
    problem = opened(cleaning(source, wide, SGD(0.3), num_examples=200, clean_examples=60, evaluation_steps=300), True)
    key, estimator = random.key(0), Unrolled("store", warm_start=True)
    weights = problem.init_meta(key)["weights"].requires_grad_()
    state, optimizer = estimator.init(problem, {"weights": weights}, key), torch.optim.Adam([weights], 0.1)
    for step in range(60):
        key = random.fold(random.key(0), step)
        found = estimator.estimate(problem, {"weights": weights}, state, problem.batches(key, 5), key)
        weights.grad, state = found.grad["weights"], found.state
        optimizer.step()
    return problem, weights.detach()


@pytest.mark.parametrize("batch_size", [None, 8])
def test_matches_central_differences(batch_size):
    problem = opened(cleaning(batch_size=batch_size))
    meta = {"weights": random.normal(random.key(1), (30,)).double()}
    assert_matches_central_differences(problem, meta, 4)


def test_matches_the_hypergradient_of_one_step():
    """After one step of plain descent d outer / d v_i = -lr s'(v_i) / N <grad CE_i, grad outer>."""
    problem = opened(cleaning(init_seed=0))
    meta = {"weights": random.normal(random.key(1), (30,)).double()}
    found = estimate(problem, meta, 1).grad["weights"]
    (x, y), clean = problem.examples("train", "cpu"), problem.examples("clean", "cpu")
    module, start = double(6, 3), problem.initial(random.key(0))[0]
    module.load_state_dict(start)

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    weights = meta["weights"].sigmoid()
    each = torch.stack([gradient(functional.cross_entropy(module(x[i : i + 1]), y[i : i + 1])) for i in range(30)])
    moved = torch.nn.utils.parameters_to_vector(module.parameters()) - 0.5 * (weights @ each) / 30
    torch.nn.utils.vector_to_parameters(moved.detach(), module.parameters())
    by_outer = gradient(functional.cross_entropy(module(clean.inputs), clean.targets))
    torch.testing.assert_close(found, -0.5 / 30 * weights * (1 - weights) * (each @ by_outer), rtol=1e-10, atol=1e-14)


def test_wrong_labels_end_with_lower_weights(learned):
    problem, weights = learned
    assert weights[~problem.correct].mean() < -0.5 < 0.5 < weights[problem.correct].mean()


def test_learned_weights_beat_training_on_everything(learned):
    problem, weights = learned
    found = problem.evaluate({"weights": weights}, random.key(1), test=True)
    assert found["f1"] > 0.85
    assert found["accuracy_learned"] > found["accuracy_all_data"] + 0.1
    assert found["accuracy_oracle"] > found["accuracy_all_data"] + 0.1


def test_f1_counts_right_labels_as_positives(learned):
    problem, _ = learned
    assert problem.f1({"weights": torch.where(problem.correct, -1.0, 1.0)}) == 0
    assert problem.f1({"weights": torch.where(problem.correct, 1.0, -1.0)}) == 1
    share = float(problem.correct.double().mean())
    assert problem.f1({"weights": torch.ones(200)}) == pytest.approx(2 * share / (share + 1), rel=1e-6)


def test_noise_is_a_share_of_labels_drawn_anew():
    """Of K classes a label drawn anew stays right with probability 1 / K."""
    source = Clusters(num_examples=4000, num_classes=4)
    problem = opened(cleaning(source, num_examples=4000, noise=0.6, noise_seed=1))
    assert float((~problem.correct).double().mean()) == pytest.approx(0.6 * 3 / 4, abs=0.03)
    clean, rest = problem.parts["clean"], problem.parts["validation"]
    assert torch.equal(torch.cat([clean.targets, rest.targets]), source.read("validation").targets)
    again = opened(cleaning(source, num_examples=4000, noise=0.6, noise_seed=2))
    assert not torch.equal(problem.parts["train"].targets, again.parts["train"].targets)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(noise=1.5), "noise is 1.5"),
        (dict(num_examples=0), "num_examples is 0"),
        (dict(num_examples=41), "num_examples is 41"),
        (dict(clean_examples=40), "clean_examples is 40"),
        (dict(outer_batch_size=21), "outer_batch_size is 21"),
        (dict(evaluation_steps=0), "evaluation_steps is 0"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        opened(cleaning(**options))
