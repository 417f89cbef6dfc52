"""A learned optimizer beside hand-made ones at their best learning rates, on new training runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.base import Params, Rule
from metalearn.problems.baselines import HAND_MADE, Baseline, curves, decayed, tuned
from metalearn.problems.optimizees import Optimizee
from metalearn.problems.quadratics import Quadratics

Judged = Optimizee | Quadratics
LEARNED = "learned"
ADAM = "Adam"
RIVALS: Mapping[str, Baseline] = {
    "SGD with momentum": HAND_MADE["SGD with momentum"],
    ADAM: HAND_MADE[ADAM],
    "AdamW with cosine": decayed(HAND_MADE["AdamW"]),
}
TAIL = 10  # a tenth of the steps is the end of a run


class Comparison(NamedTuple):
    """What a learned optimizer is worth beside others."""

    numbers: dict[str, float]  # by name, as commands print them
    rows: list[dict[str, Any]]  # problem, horizon, optimizer, lr, step, loss, standard_error


def compare(
    problems: Sequence[Judged],
    meta: Params,
    *,
    tuning: Tensor,
    judging: Tensor,
    part: str,
    horizons: Sequence[int] = (1,),
    rivals: Mapping[str, Baseline] = RIVALS,
) -> Comparison:
    """Loss curves under the problems' own rule with the weights ``meta``, and under each rival tuned for the same steps.

    Numbers, of every problem (by its index where there are several) and horizon: "<optimizer>/mean_loss" over all steps,
    "<optimizer>/final_loss" over the last tenth, both means over runs, the rival's "lr"; of the learned rule "ratio", its
    mean loss over tuned Adam's, and "speed_up": the steps that tuned Adam takes to the rule's final loss over the steps
    of the rule, infinite where Adam does not get there in as many, NaN where a run of the rule diverges.

    Args:
        problems: what is trained.
        meta: the rule's weights.
        tuning: keys of the runs, on training examples, on which learning rates are chosen.
        judging: keys of the runs, on ``part``, that are compared.
        part: "validation" or "test".
        horizons: lengths of runs, in multiples of a problem's nominal horizon.
        rivals: hand-made optimizers by name, Adam among them.
    """
    numbers: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for index, problem in enumerate(problems):
        for multiple in horizons:
            assert problem.rule is not None
            steps = multiple * problem.nominal_horizon
            place = (f"{index}/" if len(problems) > 1 else "") + f"{multiple}x/"
            found = {LEARNED: (math.nan, curves(problem.on(part), problem.rule, meta, judging, steps))}
            for name, rival in rivals.items():
                rule = rival.rule(steps)
                lr = tuned(problem.on("train"), rule, tuning, steps, rival.rates).lr
                found[name] = lr, _curves_at(problem.on(part), rule, lr, judging, steps)
            numbers |= {place + name: value for name, value in _numbers(found).items()}
            rows += _rows(index, multiple, found)
    return Comparison(numbers, rows)


def mean_loss(problem: Judged, meta: Params, keys_R: Tensor, part: str) -> float:
    """The mean loss over the nominal horizon of new runs on a part."""
    assert problem.rule is not None
    return float(curves(problem.on(part), problem.rule, meta, keys_R, problem.nominal_horizon).mean())


def _curves_at(problem: Judged, rule: Rule, lr: float, keys_R: Tensor, steps: int) -> Tensor:
    return curves(problem, rule, {"lr": torch.tensor(lr, device=keys_R.device)}, keys_R, steps)


def _numbers(found: dict[str, tuple[float, Tensor]]) -> dict[str, float]:
    numbers = {}
    for name, (lr, losses_RT) in found.items():
        numbers[f"{name}/mean_loss"] = float(losses_RT.mean())
        numbers[f"{name}/final_loss"] = float(_tail(losses_RT).mean())
        if name != LEARNED:
            numbers[f"{name}/lr"] = lr
    numbers["ratio"] = numbers[f"{LEARNED}/mean_loss"] / numbers[f"{ADAM}/mean_loss"]
    numbers["speed_up"] = speed_up(found[LEARNED][1], found[ADAM][1])
    return numbers


def speed_up(losses_RT: Tensor, reference_RT: Tensor) -> float:
    """How many steps the reference needs for one step of the other: t / T.

    t is the first step at which the reference's mean loss over T/10 steps is no more than the other's over its last T/10;
    infinite where the reference does not get there within T steps, NaN where the other's end is not finite.
    """
    if not _tail(losses_RT).mean().isfinite():
        return math.nan
    window = max(1, losses_RT.shape[1] // TAIL)
    smooth_t = reference_RT.mean(0).unfold(0, window, 1).mean(1)
    reached = (smooth_t <= _tail(losses_RT).mean()).nonzero()
    return float("inf") if not len(reached) else (int(reached[0]) + window) / losses_RT.shape[1]


def _tail(losses_RT: Tensor) -> Tensor:
    return losses_RT[:, -max(1, losses_RT.shape[1] // TAIL) :]


def _rows(index: int, multiple: int, found: dict[str, tuple[float, Tensor]]) -> list[dict[str, Any]]:
    rows = []
    for name, (lr, losses_RT) in found.items():
        errors = losses_RT.std(0) / len(losses_RT) ** 0.5
        for step, (loss, error) in enumerate(zip(losses_RT.mean(0).tolist(), errors.tolist(), strict=True)):
            row = {"problem": index, "horizon": multiple, "optimizer": name, "lr": lr, "step": step}
            rows.append(row | {"loss": loss, "standard_error": error})
    return rows
