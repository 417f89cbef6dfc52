import copy
import functools
import io
import math
import pickle

import pytest
import torch
from optim.guard_tasks import LEARNED, PERIOD, SGD, STEPS, Task, alone, assert_same, descended, guarded, run
from torch import nn

from metalearn import tree
from metalearn.optim.guard import GL2O, LossGuard


def branch(build, point, state, start):
    """Points after 1 ... PERIOD steps of one optimizer from a point, their losses on the next batches, and its state after."""
    task = Task()
    task.move(point)
    optimizer = build(task.params)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    points, losses = [], []
    for step in range(start, start + PERIOD):
        optimizer.step(task.closure(step))
        points.append(task.point())
        losses.append(task.loss(step + 1).item())
    return points, losses, copy.deepcopy(optimizer.state_dict())


def onlooker(build, points, state, start):
    """The state of an optimizer that was shown the gradients at these points, and did not decide where to go."""
    task = Task()
    optimizer = build(task.params)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for step, point in enumerate(points, start):
        for p, value in zip(task.params, point, strict=True):
            p.data.copy_(value)
        optimizer.step(task.closure(step))
    return copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED.keys())
def test_matches_branches_that_are_run_one_after_the_other(learned):
    """Point by point, and never above the guard's branch on the batches of a period, by one bit."""
    optimizer, task = guarded(learned, period=PERIOD)
    builds, states = (learned, SGD), [None, None]
    point, kept, chosen = task.point(), 1, []
    for start in range(0, STEPS - PERIOD + 1, PERIOD):
        points, losses, ended = zip(
            *(branch(*pair, start) for pair in zip(builds, [point] * 2, states, strict=True)), strict=True
        )
        found = run(optimizer, task, range(start, start + PERIOD))
        for step in range(PERIOD):
            sums = [sum(values[:step]) for values in losses]
            leader = kept if not step else int(not (math.isfinite(sums[0]) and sums[0] <= sums[1]))
            if not all(value.isfinite().all() for value in points[0][step]):
                leader = 1
            assert_same(found[step], points[leader][step])
        sums = [sum(values) for values in losses]
        kept = int(not (math.isfinite(sums[0]) and sums[0] <= sums[1]))
        assert sums[kept] <= sums[1]
        seen = [point, *points[kept][:-1]]
        states = [ended[k] if k == kept else onlooker(builds[k], seen, states[k], start) for k in range(2)]
        point = points[kept][-1]
        chosen.append(kept)
    run(optimizer, task, [start + PERIOD])  # which ends the last period
    assert optimizer.periods == len(chosen) and optimizer.periods_learned == chosen.count(0)
    assert learned is not LEARNED["adam"] or set(chosen) == {0, 1}


@pytest.mark.parametrize("kind", ["explodes", "breaks"])
@pytest.mark.parametrize("period", [1, 3, 10])
def test_follows_the_guard_exactly_where_the_learned_optimizer_diverges(kind, period):
    optimizer, task = guarded(LEARNED[kind], period=period)
    points = run(optimizer, task, range(STEPS))
    expected = alone(SGD)
    if kind == "explodes":
        assert_same(points, expected)
    if kind == "explodes" or period >= 3:  # what breaks is the best of all until it does
        assert_same(points[::period], expected[::period])
        assert optimizer.fraction_learned == 0.0
    assert all(value.isfinite().all() for point in points for value in point)


def test_follows_a_learned_optimizer_that_is_better_exactly():
    learned = functools.partial(torch.optim.Adam, lr=0.01)
    optimizer, task = guarded(learned, functools.partial(torch.optim.SGD, lr=0.0), period=3)
    assert math.isnan(optimizer.fraction_learned)
    points = run(optimizer, task, range(STEPS))
    assert_same(points[1:], alone(learned)[1:])  # after one step nothing speaks for it yet
    assert optimizer.fraction_learned == 1.0 and optimizer.periods == (STEPS - 1) // 3


def test_a_margin_asks_for_more_than_a_tie():
    tied, task = guarded(SGD, period=2)
    run(tied, task, range(7))
    strict, task = guarded(SGD, period=2, margin=1e-9)
    run(strict, task, range(7))
    assert (tied.fraction_learned, strict.fraction_learned) == (1.0, 0.0)


def test_each_step_calls_the_closure_once_on_each_branch_with_the_same_draws():
    optimizer, task = guarded(LEARNED["adam"], task=Task(dropout=0.5), period=3)
    plain, other = SGD(Task().params), Task(dropout=0.5)
    torch.manual_seed(5)
    for step in range(4):
        calls = []
        returned = optimizer.step(task.closure(step, calls))
        assert len(calls) == 2 and returned.item() == calls[0] and (step or calls[0] == calls[1])
    after = torch.random.get_rng_state()
    torch.manual_seed(5)
    for step in range(4):
        plain.step(other.closure(step))
    assert torch.equal(after, torch.random.get_rng_state())  # as many as without a guard


@pytest.mark.parametrize("kind", [LossGuard, GL2O])
def test_optimizers_may_write_into_gradients(kind):
    """torch's SGD with nesterov and foreach, which is what it takes on a GPU, does."""

    def points(foreach):
        guard = functools.partial(SGD, nesterov=True, foreach=foreach)
        return run(*guarded(LEARNED["adam"], guard, kind=kind), range(STEPS))

    assert_same(points(True), points(False))


def test_the_last_period_is_decided_by_finish():
    """A learned branch that jumps in the last step of all is left, as no other step would have said."""

    class Jumps(torch.optim.SGD):
        def step(self, closure=None):
            returned = super().step(closure)
            for p in self.param_groups[0]["params"]:
                count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
                if count == 6:
                    with torch.no_grad():
                        p.add_(1e3)
            return returned

    slow = functools.partial(torch.optim.SGD, lr=1e-3)
    optimizer, task = guarded(functools.partial(Jumps, lr=0.05), slow, period=PERIOD)
    run(optimizer, task, range(6))
    assert task.loss(6) > 1e3 and (optimizer.periods, optimizer.inside) == (1, "learned")
    calls = []
    optimizer.finish(task.closure(6, calls))
    assert len(calls) == 2 and task.loss(6).item() == min(calls) < 10
    assert optimizer.periods == 2 and all(p.grad is None for p in task.params)
    point = task.point()
    optimizer.finish(task.closure(7))  # there is no period at hand
    assert optimizer.periods == 2
    assert_same(task.point(), point)
    run(optimizer, task, range(6, 12))
    assert optimizer.periods == 3  # the next one began with the step after


def test_a_gradient_that_is_no_number_loses():
    """The learned branch goes where the loss is smallest, and has no derivative."""
    p = nn.Parameter(torch.tensor([1.0]))
    guard = torch.optim.SGD([p], lr=0.1, momentum=0.5)
    optimizer = LossGuard(torch.optim.SGD([p], lr=1.0), guard, period=1)
    for _ in range(2):
        optimizer.step(lambda: descended(p, (p * p).sqrt().sum()))
    assert optimizer.fraction_learned == 0.0
    assert all(value.isfinite().all() for value in (p, guard.state[p]["momentum_buffer"]))


@pytest.mark.parametrize("kind", [LossGuard, GL2O])
def test_accumulated_gradients_are_refused(kind):
    optimizer, task = guarded(LEARNED["adam"], kind=kind)
    run(optimizer, task, range(3))
    task.loss(3).backward()
    with pytest.raises(ValueError, match="gradients from before the step"):
        optimizer.step(task.closure(4))
    optimizer.zero_grad(set_to_none=False)
    run(optimizer, task, range(4, 6))


@pytest.mark.parametrize("learned", ["adam", "rule"])
@pytest.mark.parametrize("stop", [1, 2, 4, 5, 10])
def test_a_state_dictionary_goes_on_bit_for_bit_within_a_period(learned, stop):
    whole, task = guarded(LEARNED[learned], period=PERIOD)
    expected = run(whole, task, range(STEPS))
    first, task = guarded(LEARNED[learned], period=PERIOD)
    assert_same(run(first, task, range(stop)), expected[:stop])
    file = io.BytesIO()
    torch.save((first.state_dict(), task.model.state_dict()), file)
    file.seek(0)
    saved, model = torch.load(file, weights_only=True)
    second, other = guarded(LEARNED[learned], period=PERIOD)
    other.model.load_state_dict(model)
    second.load_state_dict(saved)
    assert_same(run(second, other, range(stop, STEPS)), expected[stop:])
    for name in ("learned", "guard"):
        ours, theirs = (optimizer.state_dict()["state"][name]["state"] for optimizer in (second, whole))
        assert_same(tree.leaves(ours), tree.leaves(theirs))
    assert second.periods == whole.periods and second.fraction_learned == whole.fraction_learned


@pytest.mark.parametrize("kind", [LossGuard, GL2O])
@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(kind, through):
    optimizer, task = guarded(LEARNED["adam"], kind=kind)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which puts a step of its own into the optimizer
    run(optimizer, task, range(5))
    copied, own = through((optimizer, task))
    point = task.point()
    later = run(copied, own, range(5, 12))
    assert_same(task.point(), point)
    assert_same(run(optimizer, task, range(5, 12)), later)


def test_schedulers_change_both_rates_and_parameters_are_listed_once():
    optimizer, task = guarded(LEARNED["adam"], period=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.1**step])
    for step in range(2):
        optimizer.step(task.closure(step))
        schedule.step()
    assert optimizer.learned.param_groups[0]["lr"] == pytest.approx(0.05 / 4)
    assert optimizer.guard.param_groups[0]["lr"] == pytest.approx(0.05 / 100)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(task.params)
    other, _ = guarded(LEARNED["adam"], period=2)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.05 / 4, 0.05 / 100])
    other.param_groups[1]["lr"] = 7.0
    assert other.guard.param_groups[0]["lr"] == 7.0


@pytest.mark.parametrize("kind", [LossGuard, GL2O])
@pytest.mark.parametrize("zeroed", ["in place", "outside", "never"])
def test_closures_may_leave_old_gradients_or_write_zeros_over_them(kind, zeroed):
    options = {"period": 3} if kind is LossGuard else {}
    plain, task = guarded(LEARNED["adam"], kind=kind, **options)
    expected = run(plain, task, range(STEPS))
    optimizer, task = guarded(LEARNED["adam"], kind=kind, **options)
    for step in range(STEPS):

        def closure(step=step):
            if zeroed == "in place":
                optimizer.zero_grad(set_to_none=False)
            loss = task.loss(step)
            loss.backward()
            return loss

        if zeroed == "outside":
            optimizer.zero_grad()
        optimizer.step(closure)
        assert_same(task.point(), expected[step])


@pytest.mark.parametrize("kind", [LossGuard, GL2O])
def test_what_cannot_be_guarded_is_refused(kind):
    task, other = Task(), Task()
    with pytest.raises(ValueError, match="learned and guard have other parameters; accepted"):
        kind(SGD(task.params), SGD(other.params))
    with pytest.raises(ValueError, match="an optimizer is LBFGS; accepted"):
        kind(torch.optim.LBFGS(task.params), SGD(task.params))
    with pytest.raises(ValueError, match="guard is None; accepted: a torch"):
        kind(SGD(task.params), None)
    with pytest.raises(ValueError, match="learned and guard are the same object; accepted"):
        kind(*[SGD(task.params)] * 2)
    optimizer = kind(SGD(task.params), SGD(task.params))
    table = nn.Embedding(3, 2, sparse=True)
    with pytest.raises(ValueError, match="a gradient is sparse; accepted: dense"):
        kind(SGD(table.parameters()), SGD(table.parameters())).step(
            lambda: descended(table.weight, table(torch.tensor([1])).sum())
        )
    with pytest.raises(ValueError, match="closure is None; accepted: a function"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure returns None; accepted: the loss"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match="a group is added to a guard; accepted"):
        optimizer.add_param_group({"params": other.params})
    with pytest.raises(ValueError, match=r"the state lacks \[.*'guard', .*; accepted: that of a"):
        optimizer.load_state_dict(SGD(task.params).state_dict())
    for name in ("period", "margin") if kind is LossGuard else ("alpha", "theta"):
        with pytest.raises(ValueError, match=f"{name} is -1; accepted"):
            kind(SGD(task.params), SGD(task.params), **{name: -1})
    if kind is LossGuard:
        with pytest.raises(ValueError, match=r"period is 2\.5; accepted: whole numbers"):
            kind(SGD(task.params), SGD(task.params), period=2.5)
