"""Training runs side by side: loss curves of many runs at once, and hand-made optimizers at their best learning rate.

Letters: R runs, T steps, G learning rates of a grid.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metalearn import random, tree
from metalearn.base import Batches, InnerProblem, InnerState, Params, Rule, StepOutput, require_range
from metalearn.optim.first_order import SGD, Adam, AdamW, RMSProp, Scheduled
from metalearn.optim.schedules import Cosine
from metalearn.unroll import differentiable_kernels, seeded, unroll

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SMALLEST_GRID = 8
BEYOND, EXTENSIONS = 2, 4  # rates that a grid goes on by where its best is at an end, and how often


class Baseline(NamedTuple):
    """A hand-made optimizer, whose learning rate is to be tuned, or an optimizer that has its own."""

    rule: Callable[[int], Rule]  # of the number of steps that it is to take
    rates: tuple[float, ...] = RATES


def _sgd(steps: int) -> Rule:
    return SGD()


def _momentum(steps: int) -> Rule:
    return SGD(momentum=0.9)


def _nesterov(steps: int) -> Rule:
    return SGD(momentum=0.9, nesterov=True)


def _rmsprop(steps: int) -> Rule:
    return RMSProp()


def _adam(steps: int) -> Rule:
    return Adam()


def _adamw(steps: int) -> Rule:
    return AdamW()


def decayed(baseline: Baseline) -> Baseline:
    """The same with a learning rate that falls to 0 along half a cosine over the steps that it is to take."""
    return Baseline(lambda steps: Scheduled(baseline.rule(steps), Cosine(steps)), baseline.rates)


HAND_MADE = {
    "SGD": Baseline(_sgd),
    "SGD with momentum": Baseline(_momentum),
    "NAG": Baseline(_nesterov),
    "RMSProp": Baseline(_rmsprop),
    "Adam": Baseline(_adam),
    "AdamW": Baseline(_adamw),
}


class Tuned(NamedTuple):
    """A hand-made optimizer at the best of a grid of learning rates."""

    rule: Rule
    lr: float
    grid: dict[float, float]  # the mean loss over steps and runs at each learning rate


def curves(
    problem: InnerProblem, rule: Rule, meta: Params, keys_R: Tensor, steps: int, per_run: bool = False
) -> Tensor:
    """The loss of every step of R runs under ``rule``: float (R, T), NaN or infinite where a run diverged.

    A run, its start and its data, is a function of its key alone: two rules on equal keys train on the same batches.
    Only what modules draw from torch's global generator (dropout) follows from the first key, and from a run's place.
    Episodes do not end; a step's loss is the share of the meta-objective that the problem gives it, times its horizon.

    Args:
        problem: a problem whose steps draw their own data, and have losses of their own.
        rule: what takes the place of the problem's own rule.
        meta: what the rule is given.
        keys_R: a key for each run.
        steps: T, at least 1.
        per_run: whether the leaves of ``meta`` have a first axis of runs.
    """
    require_range("steps", steps, 1)
    problem = under(problem, rule)
    metas = meta if per_run else {name: value.expand(len(keys_R), *value.shape) for name, value in meta.items()}
    losses: list[Tensor] = []

    def step(
        problem: InnerProblem, meta: Params, state: InnerState, batches: Batches, key: Tensor, k: int
    ) -> tuple[InnerState, StepOutput]:
        each = problem.step_runs
        if problem.global_generator:  # as dropout does, for each run its own numbers
            each = vmap(problem.step, (0, 0, None, 0), randomness="different")
        with seeded(problem, random.fold(key, "draws", k)):
            state, output = each(meta, state, batches.inner(k), random.fold(keys_R, "step", k))
        losses.append(output.loss)
        return state, StepOutput(output.loss.mean(), output.done.all())

    with torch.no_grad(), differentiable_kernels():
        begun = [problem.init(tree.index(metas, run), random.fold(key, "init")) for run, key in enumerate(keys_R)]
        batches = problem.batches(random.fold(keys_R[0], "data"), steps)
        unroll(problem, metas, tree.stack(begun), batches, keys_R[0], step=step)
    return torch.stack(losses, 1) * (problem.horizon or 1)


def under(problem: InnerProblem, rule: Rule) -> Any:
    """The same problem with another rule, which is given the meta-parameters as they are."""
    copied = copy.copy(problem)
    copied.rule = rule
    return copied


def tuned(
    problem: InnerProblem,
    rule: Rule,
    keys_R: Tensor,
    steps: int,
    rates: Sequence[float] = RATES,
    tail: int | None = None,
) -> Tuned:
    """``rule`` at the learning rate that has the smallest mean loss over all steps (or the last ``tail``) of all runs.

    Where that is the first or the last of the grid, the grid goes on beyond it, by two rates of the ratio that it ends with,
    at most four times. A rate under which any run diverges is not chosen while there is another.

    Args:
        problem: as in ``curves``; its tasks should be others than those that the choice is judged on.
        rule: one whose meta-parameter "lr" is the learning rate.
        keys_R: a key for each run.
        steps: T of ``curves``.
        rates: G learning rates, at least 8, ascending.
        tail: how many last steps count; null for all.
    """
    require_range("learning rates of a baseline", len(rates), SMALLEST_GRID)

    def scores(rates: Sequence[float]) -> dict[float, float]:
        each = torch.tensor(rates).repeat_interleave(len(keys_R)).to(keys_R.device)
        losses = curves(problem, rule, {"lr": each}, keys_R.repeat(len(rates)), steps, per_run=True)
        scores_G = losses[:, -tail if tail else 0 :].mean(1).unflatten(0, (len(rates), -1)).mean(1)
        return dict(zip(rates, scores_G.nan_to_num(torch.inf, torch.inf, torch.inf).tolist(), strict=True))

    grid = scores(rates)
    for _ in range(EXTENSIONS):
        further = _beyond(grid)
        if not further:
            break
        grid |= scores(further)
    grid = dict(sorted(grid.items()))
    return Tuned(rule, min(grid, key=grid.__getitem__), grid)


def _beyond(grid: dict[float, float]) -> list[float]:
    """Learning rates past the end of the grid that is better than all others."""
    rates = sorted(grid)
    for end, neighbour in ((rates[0], rates[1]), (rates[-1], rates[-2])):
        if all(grid[end] < grid[rate] for rate in rates if rate != end):
            return [end * (end / neighbour) ** k for k in range(1, BEYOND + 1)]
    return []
