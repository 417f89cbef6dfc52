import pytest
import torch

from metalearn.base import Batches, InnerProblem, InnerState, StepOutput
from metalearn.estimators.unrolled import Unrolled
from metalearn.problems.toys import Drift, InfluenceBalancing, LearningRateToy
from metalearn.random import key

SUMS = {20: (1261.3667, 100.0), 50: (2408.0040, 170.6889), 100: (3571.6306, -26.0)}  # of exact and one-step gradients
INFLUENCE = {1: 1.0, 2: 2.0, 5: 5.0, 10: 10.0, 20: 16.476, 30: 9.870, 50: -4.753, 100: -6.0}


def float64(problem):
    return {name: value.double() for name, value in problem.init_meta(key(0)).items()}


def windows(estimator, problem, meta, steps, count):
    """The estimates of ``count`` windows in a row."""
    state, found = estimator.init(problem, meta, key(0)), []
    for number in range(count):
        found.append(estimator.estimate(problem, meta, state, problem.batches(key(1), steps), key(2, number)))
        state = found[-1].state
    return found


class LastLoss(InfluenceBalancing):
    """Influence balancing by the last step's loss alone."""

    terminal = True

    def step(self, meta, state, batch, key):
        state, output = super().step(meta, state, batch, key)
        return state, output._replace(loss=torch.zeros_like(output.loss))

    def outer(self, meta, state, batch):
        return (state.params["s"][0] - 1).square() / 2


@pytest.mark.parametrize("horizon", SUMS)
def test_influence_balancing_matches_known_gradients(horizon):
    problem = InfluenceBalancing(horizon)
    exact, one_step = SUMS[horizon]
    assert problem.gradient(0.5, horizon) == pytest.approx(exact, abs=1e-4)
    assert problem.gradient(0.5, horizon, window=1) == pytest.approx(one_step, abs=1e-4)


@pytest.mark.parametrize("window", [1, 5, 20])
def test_influence_balancing_matches_backpropagation(window):
    problem = InfluenceBalancing(20)
    found = windows(Unrolled(warm_start=True), problem, float64(problem), window, 20 // window)
    total = sum(float(estimate.grad["theta"]) for estimate in found)
    assert total == pytest.approx(problem.gradient(0.5, 20, window), rel=1e-12)


@pytest.mark.parametrize("steps", INFLUENCE)
def test_truncated_backpropagation_has_the_wrong_sign_up_to_thirty_steps(steps):
    """Settled at theta = 1/2, s[0] is -3, and the gradient (s[0] - 1)(-6) is +24."""
    problem = LastLoss(300)
    assert float(problem.influence(steps)[-1]) == pytest.approx(INFLUENCE[steps], abs=1e-3)
    [found] = windows(Unrolled(truncate=steps), problem, float64(problem), 300, 1)
    assert float(found.grad["theta"]) == pytest.approx(-4 * INFLUENCE[steps], abs=4e-3)
    assert (found.grad["theta"] < 0) == (steps <= 30)


def test_influence_balancing_settles_where_it_says():
    problem, meta = InfluenceBalancing(300), {"theta": torch.tensor(0.5, dtype=torch.float64)}
    state = problem.init(meta, key(0))
    for _ in range(300):
        state, output = problem.step(meta, state, None, key(0))
    assert output.loss == pytest.approx(8.0)
    assert output.done
    assert problem.evaluate(meta, key(0), test=False) == pytest.approx({"theta_error": 2 / 3, "steady_loss": 8.0})
    at_optimum = problem.evaluate({"theta": torch.tensor(-1 / 6)}, key(0), test=False)
    assert at_optimum == pytest.approx({"theta_error": 0, "steady_loss": 0}, abs=1e-7)


def test_learning_rate_toy_matches_known_values():
    problem = LearningRateToy()
    for log_lr, wanted in (((-4.0, -4.0), 2487.77), ((3.0, -4.5), 580.10)):
        meta = {"log_lr": torch.tensor(log_lr, dtype=torch.float64)}
        assert problem.evaluate(meta, key(0), test=False)["meta_objective"] == pytest.approx(wanted, abs=5e-3)


@pytest.mark.parametrize(("window", "wanted"), [(100, (-3.911, -1.712)), (10, (-0.489, -0.287))])
def test_learning_rate_toy_matches_known_gradients(window, wanted):
    problem = LearningRateToy()
    found = windows(Unrolled(warm_start=True), problem, float64(problem), window, 100 // window)
    total = sum(estimate.grad["log_lr"] for estimate in found)
    assert total.tolist() == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(("terminal", "wanted"), [(True, 20.0), (False, 10.5)])
def test_drift_matches_its_closed_form(terminal, wanted):
    problem = Drift(20, terminal)
    [found] = windows(Unrolled(), problem, float64(problem), 20, 1)
    assert found.grad["theta"] == pytest.approx(wanted)


@pytest.mark.parametrize("problem", [Drift, LearningRateToy, InfluenceBalancing])
def test_a_horizon_below_one_is_refused(problem):
    with pytest.raises(ValueError, match="horizon is 0"):
        problem(0)


class LinearOptimizer(InnerProblem):
    """x' = x + w f'(x) + b on f = x^2 from x = 1; the objective is f before every step and at every window's end."""

    terminal = False

    def init_meta(self, key):
        return {"w": torch.zeros(()), "b": torch.zeros(())}

    def init(self, meta, key):
        return InnerState({"x": torch.ones_like(meta["w"])}, {}, {}, torch.zeros((), dtype=torch.int64), {})

    def step(self, meta, state, batch, key):
        x = state.params["x"]
        after = state._replace(params={"x": x + meta["w"] * 2 * x + meta["b"]}, step=state.step + 1)
        return after, StepOutput(x.square(), torch.zeros((), dtype=torch.bool))

    def outer(self, meta, state, batch):
        return state.params["x"].square()


@pytest.mark.parametrize("mode", ["graph", "store", "checkpoint"])
def test_unrolled_matches_the_trace_of_learning_to_learn(mode):
    """Windows of five steps, an Adam step of 0.01 after each; in the second, f ends at 0.73253274 and x at 0.85588127."""
    problem, estimator = LinearOptimizer(), Unrolled(mode, warm_start=True)
    meta = problem.init_meta(key(0))
    optimizer, state = torch.optim.Adam(meta.values(), lr=0.01), estimator.init(problem, meta, key(0))
    for number in range(2):
        found = estimator.estimate(problem, meta, state, Batches(lambda k: None, None, 5), key(1, number))
        state = found.state
        for name, value in meta.items():
            value.grad = found.grad[name]
        optimizer.step()
    assert float(state["inner"].params["x"]) == pytest.approx(0.85588127, abs=1e-7)
    assert float(state["inner"].params["x"]) ** 2 == pytest.approx(0.73253274, abs=1e-7)
