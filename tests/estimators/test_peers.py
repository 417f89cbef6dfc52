"""Meta-gradients against two other libraries on the same inner run, and what goes wrong in those libraries but not here."""

import gc
from functools import partial

import pytest
import torch
import torchopt
from estimators.conftest import relative
from torch import nn

from experiments.bench.peers import KEY, data_weights, estimated, higher_gradient, torchopt_gradient
from metalearn import tree
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.optim.first_order import SGD, Adam, AdamW
from metalearn.problems.hyperparameters import Ridge
from metalearn.random import fold

STEPS = 20
# Adam's settings are those under which all three libraries mean the same. higher adds eps before the bias correction, so
# eps is next to nothing; torchopt takes 1 - beta2^t in float32, which 0.999 leaves four digits of, and its root has an
# infinite derivative at 0 without eps_root.
ADAM = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-16)
RULES = {
    "sgd": (SGD(0.1), partial(torch.optim.SGD, lr=0.1), partial(torchopt.MetaSGD, lr=0.1)),
    "momentum": (
        SGD(0.05, momentum=0.9),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        partial(torchopt.MetaSGD, lr=0.05, momentum=0.9),
    ),
    "adam": (
        Adam(0.01, beta2=0.95, eps=1e-16),
        partial(torch.optim.Adam, **ADAM),
        partial(torchopt.MetaAdam, **ADAM, eps_root=1e-30),
    ),
}


def first_state(problem):
    return problem.init(problem.init_meta(KEY), fold(KEY, "episode"))


@pytest.fixture(scope="module", params=RULES)
def run(request):
    """A problem, and its meta-gradient by both libraries."""
    rule, of_torch, of_torchopt = RULES[request.param]
    problem = data_weights(rule, width=16, depth=1)
    start, batches = first_state(problem), problem.batches(KEY, STEPS)
    by_higher = higher_gradient(problem, start, batches, of_torch)
    return problem, by_higher, torchopt_gradient(problem, start, batches, of_torchopt)


@pytest.mark.parametrize("mode", MODES)
def test_matches_higher_and_torchopt_on_a_digits_network(run, mode):
    problem, by_higher, by_torchopt = run
    found = estimated(Unrolled(mode), problem, STEPS)().grad
    assert relative(found, by_higher) <= 1e-5
    assert relative(found, by_torchopt) <= 1e-5


def test_goes_through_adamw_which_higher_refuses():
    rule = partial(AdamW, 0.01, weight_decay=0.1)
    problem = data_weights(rule(), width=8, depth=1)
    with pytest.raises(ValueError, match="not supported by higher"):
        higher_gradient(problem, first_state(problem), problem.batches(KEY, 2), torch.optim.AdamW)
    by_hand = through_adamw(problem, first_state(problem), problem.batches(KEY, 5), lr=0.01, decay=0.1)
    for mode in MODES:
        assert relative(estimated(Unrolled(mode), problem, 5)().grad, by_hand) <= 1e-5


def through_adamw(problem, start, batches, lr, decay):
    """d outer/d weights through AdamW's formulas written down, in one graph."""
    meta = {"weights": torch.zeros(1000, requires_grad=True)}
    params = {name: p.clone().requires_grad_() for name, p in start.params.items()}
    mean, square = tree.zeros_like(params), tree.zeros_like(params)
    for t in range(1, batches.steps + 1):
        loss, _ = problem.inner_loss(meta, start._replace(params=params), batches.inner(t - 1), KEY)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True), strict=True))
        mean = {n: 0.9 * mean[n] + 0.1 * g for n, g in grads.items()}
        square = {n: 0.999 * square[n] + 0.001 * g * g for n, g in grads.items()}
        params = {n: (1 - lr * decay) * p for n, p in params.items()}
        for n in params:
            variance = torch.where(square[n] > 0, square[n], torch.ones_like(square[n])) / (1 - 0.999**t)
            root = torch.where(square[n] > 0, variance.sqrt(), torch.zeros_like(variance))
            params[n] = params[n] - lr * mean[n] / (1 - 0.9**t) / (root + 1e-8)
    outer = problem.outer(meta, start._replace(params=params), batches.outer)
    return {"weights": torch.autograd.grad(outer, meta["weights"])[0]}


@pytest.mark.parametrize("mode", MODES)
def test_is_finite_where_adams_root_is_at_zero_and_torchopt_is_not(mode):
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # the second feature is never there
    y = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    problem = Ridge(x, y, x, y, Adam(0.1))
    found = estimated(Unrolled(mode), problem, 4)().grad["log_penalty"]
    alone = Ridge(x[:, :1], y, x[:, :1], y, Adam(0.1))
    torch.testing.assert_close(found[:1], estimated(Unrolled(mode), alone, 4)().grad["log_penalty"])
    assert found[1] == 0
    assert ridge_by_torchopt(x, y, steps=4).isnan().any()


def ridge_by_torchopt(x, y, steps):
    """The meta-gradient of ``Ridge`` by log-penalties of 0."""
    log_penalty = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    line = nn.Linear(x.shape[1], 1, bias=False, dtype=x.dtype)
    nn.init.zeros_(line.weight)
    optimizer = torchopt.MetaAdam(line, lr=0.1)
    for _ in range(steps):
        penalty = (log_penalty.exp() * line.weight.square()).sum() / 2
        optimizer.step((line(x).squeeze(-1) - y).square().mean() / 2 + penalty)
    return torch.autograd.grad((line(x).squeeze(-1) - y).square().mean(), log_penalty)[0]


@pytest.mark.parametrize("mode", MODES)
def test_memory_is_flat_over_200_outer_steps(mode):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
    problem = Ridge(x, y, x, y, SGD(0.05, momentum=0.9))
    estimator, meta = Unrolled(mode, warm_start=True), problem.init_meta(KEY)
    state, counts = estimator.init(problem, meta, KEY), []
    batches = problem.batches(KEY, 2)
    for number in range(200):
        found = estimator.estimate(problem, meta, state, batches, fold(KEY, number))
        meta, state = tree.add(meta, found.grad, -0.1), found.state
        if number % 50 == 49:
            del found
            counts.append(live_tensors())
    assert len(set(counts)) == 1, counts
    assert not any(leaf.requires_grad for leaf in tree.leaves((meta, state)))


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
@pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"
)  # by inductor itself
def test_compiled_matches_one_graph():
    for rule, width in ((SGD(0.1, momentum=0.9), 8), (Adam(0.01, eps=1e-4), 12)):
        problem = data_weights(rule, width, depth=1)
        wanted = estimated(Unrolled("graph"), problem, 4)().grad
        assert relative(estimated(Unrolled("mixed", compile=True), problem, 4)().grad, wanted) <= 1e-5


def test_compiling_is_refused_where_it_would_do_nothing_or_something_else():
    with pytest.raises(ValueError, match="mode with compile is 'store'; accepted: 'mixed'"):
        Unrolled("store", compile=True)
    problem = data_weights(SGD(0.1), 4)
    problem.global_generator = True
    assert "draws" in (Unrolled("mixed", compile=True).refusal(problem) or "")
    assert Unrolled("mixed").refusal(problem) is None
