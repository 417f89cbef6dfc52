import math

import pytest
import torch

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, StepOutput
from metalearn.estimators.evolution import (
    FullES,
    GeneralizedPersistentES,
    NoiseReuseES,
    PersistentES,
    TruncatedES,
)
from metalearn.estimators.unrolled import Unrolled
from metalearn.problems.toys import Drift, InfluenceBalancing, LearningRateToy
from metalearn.random import key, normal
from metalearn.unroll import ended

ONLINE = [TruncatedES, PersistentES, GeneralizedPersistentES, NoiseReuseES]
UNBIASED = [PersistentES, GeneralizedPersistentES, NoiseReuseES]


def float64(problem):
    return {name: value.double() for name, value in problem.init_meta(key(0)).items()}


def windows(estimator, problem, meta, steps, count, seed=2):
    """The estimates of ``count`` windows in a row."""
    state, found = estimator.init(problem, meta, key(0)), []
    for number in range(count):
        found.append(estimator.estimate(problem, meta, state, problem.batches(key(1), steps), key(seed, number)))
        state = found[-1].state
    return found


def total(found, name="theta"):
    return float(sum(estimate.grad[name] for estimate in found))


def designed(estimator, columns):
    """The estimator with the next column of a table for its next draw, of one meta-parameter, instead of normals."""
    draws = iter(columns.T)
    estimator.directions = lambda key, number_N, size: next(draws)[number_N, None]
    return estimator


def hadamard(size):
    """±1 with orthogonal columns: the mean over rows of any product of two columns is that of independent draws."""
    table = torch.ones(1, 1, dtype=torch.float64)
    while len(table) < size:
        table = torch.cat([torch.cat([table, table], 1), torch.cat([table, -table], 1)])
    return table


def exact(cls, draws, **options):
    """An estimator whose estimate is its own expectation wherever xi (L+ - L-) is bilinear in the perturbations."""
    table = hadamard(draws)
    return designed(cls(len(table), 0.1, **options), table)


class Endless(InfluenceBalancing):
    """Influence balancing without an end, by the loss at the end of every window."""

    terminal = True

    def step(self, meta, state, batch, key):
        state, output = super().step(meta, state, batch, key)
        return state, output._replace(loss=torch.zeros_like(output.loss))

    def outer(self, meta, state, batch):
        return (state.params["s"][0] - 1).square() / 2


class Linear(InnerProblem):
    """Five meta-parameters act linearly on the state, from its first value on: the objective is a quadratic of them."""

    terminal, horizon = False, 6

    def init_meta(self, key):
        return {"start": normal(key, (3,)).double(), "push": normal(key + 1, (2, 1)).double()}

    def init(self, meta, key):
        return InnerState({"s": meta["start"] * 2}, {}, {}, torch.zeros((), dtype=torch.int64), {})

    def step(self, meta, state, batch, key):
        s = 0.9 * state.params["s"].roll(1) + torch.cat([meta["push"].reshape(2), meta["start"][:1]])
        state = state._replace(params={"s": s}, step=state.step + 1)
        return state, StepOutput((s - batch).square().sum(), ended(self, state))

    def outer(self, meta, state, batch):
        return (state.params["s"][0] * meta["push"]).sum() + batch

    def batches(self, key, steps):
        return Batches(lambda k: torch.tensor(k / 3, dtype=torch.float64), torch.tensor(7.0), steps)


class Noise(InnerProblem):
    """A random walk drawn from the step's key, which meta-parameters do not touch."""

    terminal, horizon = False, 5

    def init_meta(self, key):
        return {"theta": torch.zeros(4, dtype=torch.float64)}

    def init(self, meta, key):
        return InnerState({"s": normal(key, (3,))}, {}, {}, torch.zeros((), dtype=torch.int64), {})

    def step(self, meta, state, batch, key):
        state = state._replace(params={"s": state.params["s"] + normal(key, (3,))}, step=state.step + 1)
        return state, StepOutput(state.params["s"].square().sum(), ended(self, state))


class Cliff(Drift):
    """Drift whose loss is ``bad`` where theta is above 1."""

    def __init__(self, bad):
        super().__init__(8, terminal=False)
        self.bad = bad

    def step(self, meta, state, batch, key):
        state, output = super().step(meta, state, batch, key)
        return state, output._replace(loss=torch.where(meta["theta"] > 1, self.bad, output.loss))


# -- expectations --


@pytest.mark.parametrize(("cls", "window", "options"), [
    (PersistentES, 1, {}),
    (PersistentES, 5, {}),
    (PersistentES, 10, {}),
    (GeneralizedPersistentES, 2, {"resample_every": 3}),
    (GeneralizedPersistentES, 5, {"resample_every": 10}),
    (NoiseReuseES, 1, {}),
    (NoiseReuseES, 10, {}),
])  # fmt: skip
@pytest.mark.parametrize(("horizon", "wanted"), [(20, 1261.3667), (50, 2408.0040), (100, 3571.6306)])
def test_expectation_matches_the_exact_gradient_across_windows(cls, window, options, horizon, wanted):
    problem = InfluenceBalancing(horizon)
    found = windows(exact(cls, 128, **options), problem, float64(problem), window, horizon // window)
    assert total(found) == pytest.approx(problem.gradient(0.5, horizon), rel=1e-10)
    assert total(found) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("window", "horizon", "wanted"), [(1, 20, 100.0), (1, 50, 170.6889), (1, 100, -26.0), (10, 50, None)]
)
def test_expectation_of_truncated_matches_the_truncated_gradient(window, horizon, wanted):
    problem = InfluenceBalancing(horizon)
    found = windows(exact(TruncatedES, 128), problem, float64(problem), window, horizon // window)
    assert total(found) == pytest.approx(problem.gradient(0.5, horizon, window), rel=1e-10)
    assert wanted is None or total(found) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("cls", "unbiased"), [(PersistentES, True), (NoiseReuseES, True), (TruncatedES, False)])
def test_matches_the_exact_gradient_within_three_standard_errors(cls, unbiased):
    problem = InfluenceBalancing(20)
    draws = [total(windows(cls(200, 0.1), problem, float64(problem), 1, 20, seed)) for seed in range(2, 12)]
    mean, error = torch.tensor(draws).mean(), torch.tensor(draws).std() / math.sqrt(len(draws))
    assert abs(mean - (1261.3667 if unbiased else 100.0)) <= 3 * error
    assert (abs(mean - 1261.3667) <= 3 * error) == unbiased


@pytest.mark.parametrize("cls", UNBIASED)
@pytest.mark.parametrize(("horizon", "window"), [(20, 5), (100, 10), (7, 5), (3, 5)])
@pytest.mark.parametrize("terminal", [True, False])
def test_expectation_credits_an_episodes_last_loss_to_all_its_perturbations(cls, horizon, window, terminal):
    """Over windows that hold whole episodes in all, which begin and end anywhere in them."""
    problem, steps = Drift(horizon, terminal), math.lcm(horizon, window)
    found = windows(exact(cls, 64), problem, float64(problem), window, steps // window)
    episodes = steps // horizon
    assert total(found) == pytest.approx(episodes * (horizon if terminal else (horizon + 1) / 2), rel=1e-12)


def test_truncated_credits_a_terminal_loss_to_its_window():
    problem = Drift(20)
    assert total(windows(exact(TruncatedES, 4), problem, float64(problem), 5, 4)) == pytest.approx(5.0)


def test_endless_run_is_asked_for_outer_at_every_windows_end():
    problem, meta = Endless(), {"theta": torch.tensor(0.5, dtype=torch.float64)}
    found = windows(exact(PersistentES, 8), problem, meta, 4, 5)
    state, wanted = problem.init(meta, key(0)), 0.0
    for t in range(20):
        state, _ = problem.step(meta, state, None, key(0))
        if t % 4 == 3:
            wanted += float((state.params["s"][0] - 1) * problem.influence(t + 1)[-1])
    assert total(found) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("cls", [FullES, PersistentES, NoiseReuseES])
def test_matches_the_analytic_gradient_with_orthogonal_directions(cls):
    problem = Linear()
    meta = problem.init_meta(key(3))
    basis = torch.linalg.qr(normal(key(4), (5, 5)).double()).Q * math.sqrt(5)
    estimator = cls(5, 0.3)
    estimator.directions = lambda key, number_N, size: basis[number_N]
    [found], [wanted] = (windows(e, problem, meta, 6, 1) for e in (estimator, Unrolled("graph")))
    for name in meta:
        torch.testing.assert_close(found.grad[name], wanted.grad[name], rtol=1e-10, atol=1e-10)


def test_matches_the_directional_derivative_as_perturbations_vanish():
    problem, estimator = LearningRateToy(20), NoiseReuseES(1, 1e-5)
    meta, v = float64(problem), torch.tensor([[0.6, -1.2]], dtype=torch.float64)
    estimator.directions = lambda key, number_N, size: v

    def objective(log_lr):
        state, losses = problem.init({"log_lr": log_lr}, key(0)), []
        for _ in range(20):
            state, output = problem.step({"log_lr": log_lr}, state, None, key(0))
            losses.append(output.loss)
        return sum(losses)

    _, slope = torch.func.jvp(objective, (meta["log_lr"],), (v[0],))
    found = sum(estimate.grad["log_lr"] for estimate in windows(estimator, problem, meta, 5, 4))
    torch.testing.assert_close(found, slope * v[0], rtol=1e-6, atol=0)


# -- antithetic pairs --


@pytest.mark.parametrize("cls", ONLINE)
def test_flipped_signs_leave_the_estimate_bit_identical(cls):
    problem, flipped = LearningRateToy(12), cls(6, 0.3)
    flipped.directions = lambda *drawn: -cls.directions(flipped, *drawn)
    plain, mirrored = (windows(e, problem, float64(problem), 5, 4) for e in (cls(6, 0.3), flipped))
    for one, other in zip(plain, mirrored, strict=True):
        assert torch.equal(one.grad["log_lr"], other.grad["log_lr"])
        assert one.grad["log_lr"].abs().sum() > 0


@pytest.mark.parametrize("cls", ONLINE)
def test_halves_share_their_random_numbers_and_pairs_do_not(cls):
    problem = Noise()
    for found in windows(cls(4, 0.1), problem, problem.init_meta(key(0)), 3, 4):
        assert not found.grad["theta"].any()
        assert found.loss > 0
    runs = found.state["pairs"].inner.params["s"]
    assert torch.equal(runs[:, 0], runs[:, -1])
    assert len(runs[:, 0].unique(dim=0)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cls", ONLINE)
def test_a_pair_that_is_not_finite_leaves_the_others_bit_identical(cls, bad):
    found = []
    for last in (20.0, 0.0):  # a pair without perturbation gives nothing either
        problem, estimator = Cliff(bad), cls(4, 0.1, loss_cap=3.0)
        table = torch.tensor([1.0, -2.0, 0.5, last]).double()
        estimator.directions = lambda key, number_N, size, table=table: table[number_N, None]
        found.append(windows(estimator, problem, float64(problem), 4, 1)[0])
    assert torch.equal(found[0].grad["theta"], found[1].grad["theta"])
    kept, wanted = (tree.pack(tree.index(f.state["pairs"], slice(3))) for f in found)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert [int(f.diagnostics["nonfinite_pairs"]) for f in found] == [1, 0]
    assert found[0].state["pairs"].ended_N.tolist() == [False, False, False, True]
    assert found[0].loss.isfinite()


def test_a_pair_that_was_not_finite_begins_anew():
    problem = Cliff(math.nan)
    estimator = designed(PersistentES(2, 0.1), torch.tensor([[1.0, 1.0, 1.0], [20.0, 1.0, 1.0]]).double())
    found = windows(estimator, problem, float64(problem), 3, 2)
    assert [int(f.diagnostics["nonfinite_pairs"]) for f in found] == [1, 0]
    assert found[-1].state["pairs"].age_N.tolist() == [6, 3]
    torch.testing.assert_close(found[-1].state["pairs"].credit_NP, torch.tensor([[0.2], [0.1]]).double())


def test_loss_cap_cuts_both_halves():
    problem, meta = Drift(8, terminal=False), {"theta": torch.tensor(4.0, dtype=torch.float64)}
    plain, capped = (
        windows(designed(FullES(1, 0.1, loss_cap=cap), torch.ones(1, 1)), problem, meta, 8, 1)[0] for cap in (None, 2.2)
    )
    # s/8 is t (4 ± 0.1)/8: the cap of 2.2 leaves alone the first four steps of eight.
    assert float(plain.grad["theta"]) == pytest.approx(4.5)
    assert float(capped.grad["theta"]) == pytest.approx((1 + 2 + 3 + 4) / 8)


# -- ranks, state, bookkeeping --


@pytest.mark.parametrize("cls", ONLINE)
def test_mean_of_two_ranks_matches_one_process(cls):
    problem, found = LearningRateToy(12), []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        estimator = cls(6, 0.3, stagger=True)
        estimator.rank, estimator.world = rank, world
        found.append(windows(estimator, problem, float64(problem), 5, 4)[-1])
    whole, *parts = found
    mean = sum(part.grad["log_lr"] for part in parts) / 2
    torch.testing.assert_close(mean, whole.grad["log_lr"], rtol=1e-12, atol=1e-12)
    gathered = tree.map(lambda *same: torch.cat(same), *(part.state["pairs"] for part in parts))
    for one, other in zip(tree.leaves(gathered), tree.leaves(whole.state["pairs"]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cls", [FullES, *ONLINE])
def test_a_packed_state_goes_on_bit_identically(cls):
    problem, estimator = LearningRateToy(10), cls(4, 0.3)
    meta, steps = float64(problem), 10 if cls is FullES else 4
    first, second = windows(estimator, problem, meta, steps, 2)
    packed = {name: leaf.clone() for name, leaf in tree.pack(first.state).items()}
    state = tree.unpack(estimator.init(problem, meta, key(9)), packed)
    again = estimator.estimate(problem, meta, state, problem.batches(key(1), steps), key(2, 1))
    assert torch.equal(again.grad["log_lr"], second.grad["log_lr"])
    assert all(torch.equal(left, packed[name]) for name, left in tree.pack(state).items())
    for one, other in zip(tree.leaves(again.state), tree.leaves(second.state), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{"chunk": 2}, {"chunk": 1}, {"vectorised": False}])
@pytest.mark.parametrize("cls", [FullES, *ONLINE])
def test_matches_all_particles_at_once(cls, options):
    problem = Linear()
    meta, steps = problem.init_meta(key(3)), 6 if cls is FullES else 4
    one, other = (windows(cls(5, 0.1, **o), problem, meta, steps, 3)[-1] for o in ({}, options))
    for name in meta:
        torch.testing.assert_close(one.grad[name], other.grad[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", ONLINE)
def test_staggering_spreads_the_ages_evenly(cls):
    problem = Drift(12)
    [found] = windows(cls(4, 0.1, stagger=True), problem, float64(problem), 12, 1)
    assert found.state["pairs"].age_N.tolist() == [9, 6, 3, 12]
    [plain] = windows(cls(4, 0.1), problem, float64(problem), 12, 1)
    assert plain.state["pairs"].age_N.tolist() == [12] * 4


@pytest.mark.parametrize("terminal", [True, False])
def test_staggered_pairs_match_the_gradient_over_any_horizon(terminal):
    problem, estimator = Drift(12, terminal), NoiseReuseES(4, 0.1, stagger=True)
    estimator.directions = lambda key, number_N, size: torch.ones(len(number_N), 1)
    found = windows(estimator, problem, float64(problem), 3, 10)
    assert total(found[5:9]) == pytest.approx(12.0 if terminal else 6.5, rel=1e-6)
    assert [float(f.diagnostics["finished"]) for f in found[5:9]] == [0.25] * 4


def test_losses_are_subtracted_in_float32():
    problem = Drift(4, terminal=False)
    meta = {"theta": torch.tensor(1.0, dtype=torch.bfloat16)}
    [found] = windows(PersistentES(4, 0.1), problem, meta, 4, 1)
    assert found.loss.dtype == found.state["pairs"].credit_NP.dtype == torch.float32
    assert found.grad["theta"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "problem", "message"),
    [
        (lambda: PersistentES(0, 0.1), None, "pairs is 0"),
        (lambda: PersistentES(1, 0.0), None, "std is 0.0"),
        (lambda: PersistentES(1, 0.1, chunk=1, vectorised=False), None, "chunk is 1"),
        (lambda: GeneralizedPersistentES(1, 0.1, 0), None, "resample_every is 0"),
        (lambda: PersistentES(1, 0.1, stagger=True), InfluenceBalancing(), "PersistentES cannot .* horizon"),
        (lambda: NoiseReuseES(1, 0.1), InfluenceBalancing(), "never end"),
        (lambda: FullES(1, 0.1), InfluenceBalancing(9), "steps is 3; .* 9"),
    ],
)
def test_says_what_it_does_not_accept(make, problem, message):
    with pytest.raises(ValueError, match=message):
        windows(make(), problem, float64(problem), 3, 1)


def test_refuses_dropout_and_pairs_that_ranks_cannot_share():
    problem = Drift(3)
    problem.global_generator = True
    assert "dropout" in (PersistentES().refusal(problem) or "")
    estimator = PersistentES(3)
    estimator.world = 2
    with pytest.raises(ValueError, match="pairs is 3; accepted: a multiple of the 2 ranks"):
        estimator.init(Drift(3), float64(Drift(3)), key(0))
