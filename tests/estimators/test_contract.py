"""What every estimator promises. A new one adds itself to ``ESTIMATORS`` and gets these tests free."""

import copy
import gc

import pytest
import torch
from estimators.conftest import ridge

from metalearn import tree
from metalearn.estimators import evolution, forward, implicit, recurrent
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.problems.toys import InfluenceBalancing
from metalearn.random import key

STEPS = 6
ESTIMATORS = {
    **{f"Unrolled-{mode}": Unrolled(mode, warm_start=True) for mode in MODES},
    "Unrolled-truncated": Unrolled(truncate=2),
    "ConjugateGradient": implicit.ConjugateGradient(3, reuse_solution=True),
    "Neumann": implicit.Neumann(3, 0.1),
    "Nystrom": implicit.Nystrom(2),
    "Identity": implicit.Identity(),
    "FiniteDifference": implicit.FiniteDifference(),
    "SAMA": implicit.SAMA(),
    "ForwardMode": forward.ForwardMode(chunk=4, warm_start=True),
    "ForwardGradient": forward.ForwardGradient(4, "gaussian", warm_start=True),
    "ZerothOrder": forward.ZerothOrder(4),
    "TwoPhase": forward.TwoPhase(implicit.Neumann(2, 0.1), Unrolled(warm_start=True), switch=1),
    "RealTimeRecurrent": recurrent.RealTimeRecurrent(),
    "UnbiasedOnlineRecurrent": recurrent.UnbiasedOnlineRecurrent(),
    "FullES": evolution.FullES(4, 0.1),
    "TruncatedES": evolution.TruncatedES(4, 0.1),
    "PersistentES": evolution.PersistentES(4, 0.1, stagger=True),
    "GeneralizedPersistentES": evolution.GeneralizedPersistentES(4, 0.1, resample_every=3),
    "NoiseReuseES": evolution.NoiseReuseES(4, 0.1),
}


@pytest.fixture(params=ESTIMATORS)
def name(request):
    return request.param


def problem_for(name):
    """Ridge where an inner loss is needed; else the system whose steps have losses."""
    if "Recurrent" in name:
        problem = InfluenceBalancing(2 * STEPS)
        return problem, tree.map(torch.Tensor.double, problem.init_meta(key(0)))
    return ridge(horizon=STEPS if name == "FullES" else 2 * STEPS)


def run(name, windows=3, seed=0, state=None):
    """Estimates of several windows: [MetaGradient]."""
    (problem, meta), estimator = problem_for(name), copy.deepcopy(ESTIMATORS[name])
    state = estimator.init(problem, meta, key(seed)) if state is None else state
    found = []
    for number in range(windows):
        k = key(seed, number)
        found.append(estimator.estimate(problem, meta, state, problem.batches(k, STEPS), k))
        state = found[-1].state
    return found


def test_gradient_has_the_shape_of_meta_and_is_finite(name):
    meta = problem_for(name)[1]
    for found in run(name):
        assert {n: g.shape for n, g in found.grad.items()} == {n: m.shape for n, m in meta.items()}
        assert found.loss.shape == () and all(leaf.isfinite().all() for leaf in (found.loss, *found.grad.values()))
        assert all(value.shape == () for value in found.diagnostics.values())
        assert not any(leaf.requires_grad for leaf in tree.leaves(found) if isinstance(leaf, torch.Tensor))


def test_same_key_same_estimate(name):
    torch.testing.assert_close(run(name), run(name), rtol=0, atol=0)


def test_arguments_are_left_alone(name):
    (problem, meta), estimator = problem_for(name), ESTIMATORS[name]
    batches, state = problem.batches(key(0), STEPS), estimator.init(problem, meta, key(0))
    before = copy.deepcopy((meta, state, batches.inner(0), batches.outer))
    estimator.estimate(problem, meta, state, batches, key(1))
    torch.testing.assert_close((meta, state, batches.inner(0), batches.outer), before, rtol=0, atol=0)


def test_saved_state_goes_on_as_if_nothing_had_happened(name, tmp_path):
    (problem, meta), estimator = problem_for(name), copy.deepcopy(ESTIMATORS[name])
    whole = run(name, 2)
    torch.save(tree.pack(whole[0].state), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    state = tree.unpack(estimator.init(problem, meta, key(0)), saved)
    k = key(0, 1)
    resumed = estimator.estimate(problem, meta, state, problem.batches(k, STEPS), k)
    torch.testing.assert_close(resumed, whole[1], rtol=0, atol=0)


def test_memory_is_flat_over_windows(name):
    def alive():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    (problem, meta), estimator = problem_for(name), copy.deepcopy(ESTIMATORS[name])
    state, counts = estimator.init(problem, meta, key(0)), []
    gc.freeze()  # what was there before needs no looking through
    try:
        for number in range(12):
            k = key(0, number)
            state = estimator.estimate(problem, meta, state, problem.batches(k, STEPS), k).state
            counts.append(alive())
    finally:
        gc.unfreeze()
    assert max(counts[4:]) == min(counts[4:])


def test_refusals_raise_before_anything_runs(name):
    (problem, meta), estimator = problem_for(name), ESTIMATORS[name]
    problem.differentiable = False
    reason = estimator.refusal(problem)
    zeroth = isinstance(estimator, forward.ZerothOrder | evolution.Evolution)
    assert (reason is None) == zeroth
    if reason:
        with pytest.raises(ValueError, match=rf"\w+ cannot be used on {type(problem).__name__}"):
            estimator.init(problem, meta, key(0))
