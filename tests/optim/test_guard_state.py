"""What guards keep, and what becomes of it where something goes wrong."""

import copy
import functools
import math

import pytest
import torch
from optim.guard_tasks import LEARNED, PERIOD, SGD, STEPS, Task, alone, assert_same, guarded, run
from torch import nn

from metalearn import tree
from metalearn.optim.guard import GL2O, LossGuard
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.torch_face import LearnedOptimizer

KINDS = [LossGuard, GL2O]


class Counts(torch.optim.SGD):
    """SGD whose rate falls with a count that it keeps in its groups, as some optimizers keep theirs."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        return super().step(closure)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learned", ["adam", "explodes"])
@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("step", [0, 1, PERIOD, PERIOD + 2])
def test_where_a_closure_raises_nothing_has_happened(kind, learned, evaluation, step):
    options = {"period": PERIOD} if kind is LossGuard else {}
    plain, task = guarded(LEARNED[learned], kind=kind, **options)
    expected = run(plain, task, range(STEPS))
    optimizer, task = guarded(LEARNED[learned], kind=kind, **options)
    run(optimizer, task, range(step))
    point, seen = task.point(), 0

    def fails():
        nonlocal seen
        seen += 1
        loss = task.closure(step)()
        if seen == evaluation:
            raise ArithmeticError("a factorisation failed")
        return loss

    with pytest.raises(ArithmeticError, match="a factorisation failed"):
        optimizer.step(fails)
    assert_same(task.point(), point)
    if kind is GL2O:
        assert math.isnan(optimizer.mu) == (step == 0)
    assert_same(run(optimizer, task, range(step, STEPS)), expected[step:])
    ours, theirs = (tree.leaves(each.state_dict()["state"]) for each in (optimizer, plain))
    assert_same(*([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_optimizers_keep_in_their_groups_follows_their_own_steps(kind):
    """Beside a branch that is never kept, the guard's steps are those that it takes alone."""
    options = {"alpha": 0.0} if kind is GL2O else {}
    optimizer, task = guarded(LEARNED["explodes"], Counts, kind=kind, **options)
    points = run(optimizer, task, range(STEPS))
    assert_same(points, alone(Counts))
    assert optimizer.guard.param_groups[0]["count"] == STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("shapes", [[(2,), (5,)], [(5, 3), (5,), (1, 5), (2,)]])
def test_a_state_of_other_parameters_is_refused_and_nothing_changes(kind, steps, shapes):
    optimizer, task = guarded(LEARNED["adam"], kind=kind)
    run(optimizer, task, range(steps))
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    other = kind(LEARNED["adam"](params), SGD(params))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"the state is of parameters of shapes .*; accepted: \[\["):
        other.load_state_dict(optimizer.state_dict())
    assert str(other.state_dict()) == str(before)


@pytest.mark.parametrize("kind", KINDS)
def test_where_an_optimizer_refuses_its_state_groups_stay_those_of_both(kind):
    optimizer, task = guarded(LEARNED["rule"], kind=kind)
    run(optimizer, task, range(3))
    task = Task()
    other = kind(LearnedOptimizer(task.params, rule=SmallMLP(hidden_sizes=[3])), SGD(task.params))
    with pytest.raises(ValueError, match="the state is of a rule with"):
        other.load_state_dict(optimizer.state_dict())
    for group in other.param_groups:
        group["lr"] = 0.125
    assert [each.param_groups[0]["lr"] for each in (other.learned, other.guard)] == [0.125, 0.125]


class Views(torch.optim.Optimizer):
    """SGD through a buffer, of which its group holds views, as some keep theirs."""

    def __init__(self, params):
        buffer = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
        views = [view.view_as(p) for view, p in zip(buffer.split([p.numel() for p in params]), params, strict=True)]
        super().__init__([{"params": params, "buffer": buffer, "views": views}], {"lr": 0.05})

    def step(self, closure=None):
        (group,) = self.param_groups
        with torch.no_grad():
            group["buffer"].copy_(torch.cat([p.grad.flatten() for p in group["params"]]))
            for p, view in zip(group["params"], group["views"], strict=True):
                p.sub_(view, alpha=group["lr"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_groups_share_memory_with_they_go_on_sharing(kind):
    plain = functools.partial(torch.optim.SGD, lr=0.05)
    points = [run(*guarded(LEARNED["adam"], guard, kind=kind), range(STEPS)) for guard in (plain, Views)]
    torch.testing.assert_close(*points)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_may_return_the_same_tensor_every_time(kind):
    optimizer, task = guarded(LEARNED["explodes"], kind=kind)
    expected = run(optimizer, task, range(STEPS))
    optimizer, task = guarded(LEARNED["explodes"], kind=kind)
    returned = torch.zeros((), dtype=torch.float64)
    for step in range(STEPS):
        optimizer.step(lambda step=step: returned.copy_(task.closure(step)().detach()))
        assert_same(task.point(), expected[step])


def test_the_end_of_a_run_that_raises_leaves_it_as_it_was():
    optimizer, task = guarded(LEARNED["adam"], period=PERIOD)
    run(optimizer, task, range(2))
    point, closure = task.point(), task.closure(2)

    def fails():
        closure()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.finish(fails)
    assert_same(task.point(), point)
    run(optimizer, task, range(2, STEPS))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_state_dictionaries_are_called(kind):
    optimizer, task = guarded(LEARNED["adam"], kind=kind)
    run(optimizer, task, range(3))
    optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved})
    other, _ = guarded(LEARNED["adam"], kind=kind)
    other.register_load_state_dict_pre_hook(lambda _, saved: saved["wrapped"])
    steps = []
    other.register_load_state_dict_post_hook(lambda guard: steps.append(guard.steps))
    other.load_state_dict(optimizer.state_dict())
    assert steps == [optimizer.steps] == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_must_be_a_number(kind):
    optimizer, _ = guarded(LEARNED["adam"], kind=kind)
    for loss in ({"loss": 1.0}, torch.ones(2), "1"):
        with pytest.raises(ValueError, match=r"closure returns .*; accepted: the loss, a number or a tensor of one"):
            optimizer.step(lambda loss=loss: loss)


def test_processes_keep_the_same_branch(monkeypatch):
    """Here the learned branch is better, elsewhere it is not: the mean decides, and both sums of losses are means."""

    class Falls(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.sub_(1.0)

    here = []

    def all_reduce(loss):
        here.append(loss.item())
        loss += 10.0 if here[-1] < 0 else 0.0  # the other process's

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    p = nn.Parameter(torch.tensor([0.0]))
    optimizer = LossGuard(Falls([p], lr=1.0), torch.optim.SGD([p], lr=0.0), period=2)

    def closure():
        (p.sum() * 1.0).backward()
        return p.detach().clone()

    for _ in range(3):
        optimizer.step(closure)
    assert (optimizer.periods, optimizer.periods_learned) == (1, 0)
    assert -1.0 in here and p.item() == 0.0
