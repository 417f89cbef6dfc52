import math

import pytest
import torch
from estimators.conftest import relative, ridge

from metalearn import tree
from metalearn.base import InnerProblem, InnerState, StepOutput
from metalearn.estimators.forward import ForwardGradient, ForwardMode, TwoPhase, ZerothOrder
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD, Adam
from metalearn.random import key, normal
from metalearn.unroll import Descent, Tasks, ended

N = 6
RULES = [SGD(0.2), SGD(0.1, momentum=0.8), Adam(0.05)]


class Start(Descent):
    """A quadratic bowl, the start and the learning rate of which are learned; ``extra`` comes from ``meta``, too."""

    def __init__(self, rule=None, horizon=None):
        super().__init__(rule or SGD(0.1, momentum=0.5), horizon)

    def init_meta(self, key):
        return {"start": normal(key, (4,)).double(), "lr": torch.tensor(0.2, dtype=torch.float64)}

    def rule_meta(self, meta):
        return {"lr": meta["lr"]}

    def init(self, meta, key):
        noise = normal(key, (4,)).double()
        return self.start(meta, {"w": meta["start"].sin() + noise}, {}, {"centre": meta["start"].square()})

    def inner_loss(self, meta, state, batch, key):
        return (state.params["w"] - state.extra["centre"]).square().square().sum() / 10, {}

    def outer(self, meta, state, batch):
        return (state.params["w"] - 0.3).square().sum() + meta["lr"] ** 2


class Linear(InnerProblem):
    """One step, objective c . meta."""

    horizon = 1
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def init_meta(self, key):
        return {"x": torch.zeros(3, dtype=torch.float64)}

    def init(self, meta, key):
        return InnerState({"w": meta["x"] * 0}, {}, {}, torch.zeros((), dtype=torch.int64), {})

    def step(self, meta, state, batch, key):
        state = state._replace(params={"w": meta["x"]}, step=state.step + 1)
        return state, StepOutput(torch.zeros(()), ended(self, state))

    def outer(self, meta, state, batch):
        return self.slope @ state.params["w"]


class Opaque(Linear):
    """The same, by a solver outside torch."""

    differentiable = False

    def step(self, meta, state, batch, key):
        solved = torch.from_numpy(meta["x"].detach().numpy().copy())
        state = state._replace(params={"w": solved}, step=state.step + 1)
        return state, StepOutput(torch.zeros(()), ended(self, state))


class Accuracy(Linear):
    def outer(self, meta, state, batch):
        return (state.params["w"] > 0).double().mean()


class Dropout(Descent):
    """Logistic weights on noisy features, by a module that drops some of them from torch's global generator."""

    global_generator = True

    def __init__(self):
        super().__init__(SGD(0.2), None)
        self.module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.4), torch.nn.Linear(8, 1)).double()
        self.x = normal(key(1), (12, 5)).double()

    def init_meta(self, key):
        return {"decay": torch.full((3,), -1.0, dtype=torch.float64)}

    def init(self, meta, key):
        return self.start(meta, *tree.initialise(self.module, key))

    def inner_loss(self, meta, state, batch, key):
        out, buffers = tree.call(self.module, state.params, state.buffers, self.x)
        penalty = sum(meta["decay"].exp().sum() * value.square().sum() for value in state.params.values())
        return (out - 1).square().mean() + penalty / 10, buffers

    def outer(self, meta, state, batch):
        return sum(value.square().sum() for value in state.params.values())


def equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# -- exact forward mode --


def test_forward_mode_matches_the_analytic_hypergradient(quick_estimate):
    problem, meta = ridge(lr=0.7)
    found = quick_estimate(ForwardMode(), problem, meta, steps=70)
    assert relative(found.grad, problem.hypergradient(meta)) <= 1e-10


@pytest.mark.parametrize("rule", RULES)
def test_forward_mode_matches_reverse_mode(rule, quick_estimate):
    problem, meta = ridge(rule=rule, horizon=11)
    whole = quick_estimate(Unrolled("graph"), problem, meta, steps=11)
    found = quick_estimate(ForwardMode(), problem, meta, steps=11)
    assert relative(found.grad, whole.grad) <= 1e-12
    equal(found.loss, whole.loss)


@pytest.mark.parametrize("num_tasks", [None, 3])
@pytest.mark.parametrize("rule", RULES)
def test_forward_mode_goes_through_a_start_that_is_learned(rule, num_tasks, quick_estimate):
    problem = Start(rule)
    meta = problem.init_meta(key(2))
    problem = problem if num_tasks is None else Tasks(problem, num_tasks)
    whole = quick_estimate(Unrolled("graph"), problem, meta, steps=5)
    found = quick_estimate(ForwardMode(), problem, meta, steps=5)
    assert relative(found.grad, whole.grad) <= 1e-12
    assert float(whole.grad["start"].norm()) > 0.01


def test_warm_start_matches_truncated_reverse_mode():
    problem, k = Start(horizon=6), key(0)
    meta = problem.init_meta(k)
    states = {}
    for estimator in (ForwardMode(warm_start=True), Unrolled("graph", warm_start=True)):
        state = estimator.init(problem, meta, k)
        found = []
        for window in range(3):  # the third begins the second episode
            out = estimator.estimate(problem, meta, state, problem.batches(k, 3), key(window))
            state = out.state
            found.append(out.grad)
        states[type(estimator)] = found, state
    (forward, after), (reverse, expected) = states.values()
    for left, right in zip(forward, reverse, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)
    equal(tree.pack(after), tree.pack(expected))


# -- forward gradients along random directions --


@pytest.mark.parametrize(("distribution", "extra"), [("rademacher", -1), ("gaussian", 1)])
@pytest.mark.parametrize("zeroth", [False, True])
def test_error_of_random_directions_matches_theory(distribution, extra, zeroth, quick_estimate):
    problem, meta = ridge()
    exact = quick_estimate(Unrolled("store"), problem, meta, steps=6).grad
    estimator = (
        ZerothOrder(64, 1e-6, distribution=distribution) if zeroth else ForwardGradient(64, distribution=distribution)
    )
    draws = [quick_estimate(estimator, problem, meta, steps=6, seed=seed).grad for seed in range(55)]
    rms = math.sqrt(sum(relative(draw, exact) ** 2 for draw in draws) / len(draws))
    theory = math.sqrt((N + extra) / 64)
    assert abs(rms / theory - 1) < 0.2
    mean = {name: torch.stack([draw[name] for draw in draws]).mean(0) for name in exact}
    assert relative(mean, exact) < 3 * theory / math.sqrt(len(draws))


def test_ranks_together_match_one_process(quick_estimate):
    problem, meta = ridge()
    for make in (lambda: ForwardGradient(8, chunk=1), lambda: ZerothOrder(8, 1e-4, chunk=1)):
        whole = quick_estimate(make(), problem, meta, steps=5)
        parts = []
        for rank in range(4):
            estimator = make()
            estimator.rank, estimator.world = rank, 4
            parts.append(quick_estimate(estimator, problem, meta, steps=5).grad)
        mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in whole.grad}
        assert relative(mean, whole.grad) <= 1e-14
        assert relative(parts[0], parts[1]) > 0.01
    estimator.world = 3
    with pytest.raises(ValueError, match="directions is 8; accepted: a multiple of the 3 ranks"):
        quick_estimate(estimator, problem, meta, steps=5)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_match_all_at_once(chunk, quick_estimate):
    problem, meta = Start(horizon=4), Start().init_meta(key(0))
    for make, tolerance in (
        (lambda c: ForwardMode(c), 1e-13),
        (lambda c: ForwardGradient(7, chunk=c), 1e-13),
        (lambda c: ZerothOrder(7, chunk=c), 1e-11),
    ):
        whole, found = (quick_estimate(make(c), problem, meta, steps=4) for c in (None, chunk))
        assert relative(found.grad, whole.grad) <= tolerance
        torch.testing.assert_close(found.diagnostics, whole.diagnostics)


def test_one_direction_is_exact_for_one_entry(quick_estimate):
    """With N = 1 a Rademacher direction is the whole basis."""
    problem, meta = ridge(dimension=1)
    exact = quick_estimate(ForwardMode(), problem, meta, steps=9)
    found = quick_estimate(ForwardGradient(1), problem, meta, steps=9)
    assert relative(found.grad, exact.grad) <= 1e-14
    torch.testing.assert_close(found.diagnostics["gradient_norm"], tree.norm(exact.grad))


def test_dropout_is_replayed(quick_estimate):
    problem = Dropout()
    meta = problem.init_meta(key(0))
    exact = quick_estimate(Unrolled("graph"), problem, meta, steps=4)
    assert relative(quick_estimate(ForwardMode(), problem, meta, steps=4).grad, exact.grad) <= 1e-12
    first, again = (quick_estimate(ForwardGradient(5), problem, meta, steps=4) for _ in range(2))
    equal(first.grad, again.grad)
    single = quick_estimate(ForwardGradient(5, chunk=1), problem, meta, steps=4)
    assert relative(single.grad, first.grad) <= 1e-13
    difference = quick_estimate(ZerothOrder(5, 1e-5, "central"), problem, meta, steps=4)
    assert relative(difference.grad, first.grad) <= 1e-6
    other = quick_estimate(ForwardGradient(5), problem, meta, steps=4, seed=1)
    assert relative(other.grad, first.grad) > 1e-3


@pytest.mark.parametrize("estimator", [ForwardMode(), ForwardGradient(4), ZerothOrder(4)])
def test_draws_that_are_not_declared_are_refused(estimator, quick_estimate):
    problem = Dropout()
    problem.global_generator = False
    with pytest.raises((RuntimeError, ValueError), match=r"randomness|global generator"):
        quick_estimate(estimator, problem, problem.init_meta(key(0)), steps=2)


def test_inputs_are_not_changed_and_results_follow_the_key(quick_estimate):
    problem = Start(horizon=3)
    meta = problem.init_meta(key(0))
    before = tree.map(torch.clone, meta)
    for estimator in (ForwardMode(), ForwardGradient(4), ZerothOrder(4), ZerothOrder(4, chain=True)):
        first, again = (quick_estimate(estimator, problem, meta, steps=3) for _ in range(2))
        equal(first.grad, again.grad)
        equal(meta, before)
        assert not first.grad["start"].requires_grad


# -- differences of runs --


@pytest.mark.parametrize("method", ["forward", "central"])
@pytest.mark.parametrize("smoothing", [1e-2, 1.0])
def test_a_difference_of_a_linear_function_has_the_right_scale(method, smoothing, quick_estimate):
    """A forward difference that is multiplied by mu, not divided, is off by mu^2."""
    problem, meta = Linear(), Linear().init_meta(key(0))
    found = quick_estimate(ZerothOrder(64, smoothing, method), problem, meta, steps=1)
    exact = quick_estimate(ForwardGradient(64), problem, meta, steps=1)
    assert relative(found.grad, exact.grad) <= 1e-12
    assert relative(found.grad, {"x": problem.slope}) < 0.5


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize(("method", "smoothing"), [("forward", 1e-8), ("central", 1e-5)])
def test_a_short_difference_matches_the_derivative(method, smoothing, chain, quick_estimate):
    problem = Start(horizon=5)
    meta = problem.init_meta(key(3))
    exact = quick_estimate(ForwardGradient(3), problem, meta, steps=5)
    found = quick_estimate(ZerothOrder(3, smoothing, method, chain=chain), problem, meta, steps=5)
    assert relative(found.grad, exact.grad) <= 1e-6
    equal(found.loss, exact.loss)


def test_chain_differences_the_solver_alone(quick_estimate):
    """The end is linear in meta here, so that its difference is exact at any mu, whatever ``outer`` does."""

    class Curved(Linear):
        def outer(self, meta, state, batch):
            return (state.params["w"] - 1).pow(4).sum() + meta["x"].exp().sum()

    problem, meta = Curved(), Curved().init_meta(key(0))
    exact = quick_estimate(ForwardGradient(4), problem, meta, steps=1)
    found = quick_estimate(ZerothOrder(4, 0.5, chain=True), problem, meta, steps=1)
    assert relative(found.grad, exact.grad) <= 1e-12
    assert relative(quick_estimate(ZerothOrder(4, 0.5), problem, meta, steps=1).grad, exact.grad) > 0.1


def test_chain_refuses_an_outer_without_derivative(quick_estimate):
    problem, meta = Accuracy(), Accuracy().init_meta(key(0))
    with pytest.raises(ValueError, match="chain is True, but the outer of Accuracy cannot be differentiated"):
        quick_estimate(ZerothOrder(4, chain=True), problem, meta, steps=1)


@pytest.mark.parametrize("chain", [False, True])
def test_a_solver_outside_torch_is_for_differences_only(chain, quick_estimate):
    problem, meta = Opaque(), Opaque().init_meta(key(0))
    exact = quick_estimate(ForwardGradient(4), Linear(), meta, steps=1)
    found = quick_estimate(ZerothOrder(4, chain=chain, chunk=1), problem, meta, steps=1)
    assert relative(found.grad, exact.grad) <= 1e-10
    for estimator in (ForwardMode(), ForwardGradient(4)):
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} cannot be used on Opaque: its steps cannot"):
            estimator.init(problem, meta, key(0))
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} cannot be used on Opaque"):
            TwoPhase(ZerothOrder(4), estimator, 1).init(problem, meta, key(0))


def test_windows_of_step_losses_match_reverse_mode(quick_estimate):
    class Running(Start):
        terminal = False

        def step(self, meta, state, batch, key):
            state, output = super().step(meta, state, batch, key)
            return state, output._replace(loss=state.params["w"].cos().sum())

    problem = Running(horizon=8)
    meta = problem.init_meta(key(0))
    for steps in (4, 8):  # the episode does not end with the first, which therefore has no outer
        exact = quick_estimate(Unrolled("store"), problem, meta, steps)
        assert relative(quick_estimate(ForwardMode(), problem, meta, steps).grad, exact.grad) <= 1e-12
        directions = quick_estimate(ForwardGradient(5), problem, meta, steps).grad
        chained = quick_estimate(ZerothOrder(5, 1e-5, "central", chain=True), problem, meta, steps).grad
        assert relative(chained, directions) <= 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardMode(chunk=0), "chunk is 0"),
        (lambda: ForwardGradient(0), "directions is 0"),
        (
            lambda: ForwardGradient(distribution="uniform"),
            "distribution is 'uniform'; accepted: 'rademacher', 'gaussian'",
        ),
        (lambda: ZerothOrder(smoothing=0.0), "smoothing is 0.0"),
        (lambda: ZerothOrder(method="backward"), "method is 'backward'"),
        (lambda: TwoPhase(ForwardMode(), ForwardMode(), -1), "switch is -1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- two phases --


def test_two_phases_switch_and_hand_the_run_on():
    problem, k = Start(), key(0)
    meta = problem.init_meta(k)
    estimator = TwoPhase(Unrolled(warm_start=True, truncate=1), ForwardMode(warm_start=True), switch=2)
    state, reference = estimator.init(problem, meta, k), ForwardMode(warm_start=True)
    for window in range(4):
        batches = problem.batches(k, 3)
        out = estimator.estimate(problem, meta, state, batches, key(window))
        inner = state["first" if window < 2 else "second"]
        exact = reference.estimate(problem, meta, inner, batches, key(window))
        assert (relative(out.grad, exact.grad) <= 1e-12) == (window >= 2)
        packed = tree.pack(out.state)
        state = tree.unpack(estimator.init(problem, meta, key(9)), packed)
        equal(tree.pack(state), packed)
    assert int(state["count"]) == 4
    assert int(state["second"]["inner"].step) == 12


def test_two_phases_divide_what_both_can_divide(quick_estimate):
    reverse, directions = Unrolled(), ForwardGradient(8)
    assert TwoPhase(reverse, reverse, 1).shards == "outer"
    assert TwoPhase(reverse, directions, 1).shards == TwoPhase(directions, reverse, 1).shards == "directions"
    problem, meta = ridge()
    grads = []
    for rank in range(2):
        estimator = TwoPhase(reverse, directions, 0)
        estimator.rank, estimator.world = rank, 2
        grads.append(quick_estimate(estimator, problem, meta, steps=5).grad["log_penalty"])
    whole = quick_estimate(ForwardGradient(8), problem, meta, steps=5).grad["log_penalty"]
    torch.testing.assert_close(sum(grads) / 2, whole, rtol=1e-12, atol=0)
