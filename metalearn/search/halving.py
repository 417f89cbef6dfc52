"""Early stopping of what looks bad: successive halving, all at once or as results come in, of anything with a score."""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.base import require_range


def survivors(scores: Tensor, keep: float) -> Tensor:
    """Places of the ``ceil(keep P)`` lowest of the scores (P,), in ascending order of place: int64 (at most that many,).

    Of equal scores the earlier survive. What is not finite does not survive, even where there is room.
    """
    require_range("keep", keep, 0, 1)
    count = math.ceil(keep * len(scores) - 1e-9)  # 10 * 0.1 ** 1 must be 1, not 2
    best = torch.where(scores.isfinite(), scores, math.inf).argsort(stable=True)[:count]
    return best[scores[best].isfinite()].sort().values


@dataclass(frozen=True)
class Halving:
    """Successive halving: at each rung the worse share of the runs is stopped.

    After rung i at most ``ceil(keep^(i + 1) P)`` of P runs go on.

    Args:
        rungs: steps after which runs are compared, in ascending order, each at least 1.
        keep: share that survives a rung, in (0, 1].
        examples: validation examples that runs are compared on, the same for all, at least 1; null for all.

    Raises:
        ValueError: for values out of range.

    Source: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization", figure 3;
    ``1 / keep`` is the eta of Hyperband.
    """

    rungs: tuple[int, ...] = (50, 100, 200)
    keep: float = 0.5
    examples: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rungs", tuple(self.rungs))
        _require_rungs(self.rungs)
        require_range("keep", self.keep, math.ulp(0.0), 1)
        require_range("examples", 1 if self.examples is None else self.examples, 1)


class AsynchronousHalving:
    """Successive halving that never waits: a run is promoted once it is in the best ``1 / reduction`` of its rung so far.

    ``next()`` says what a free worker does: go on with a run, or begin a new one. ``report`` takes in what came of it.

    Args:
        rungs: resources (steps, epochs) of a run at each rung, in ascending order, each at least 1.
        reduction: eta, at least 2.

    Raises:
        ValueError: for values out of range.

    Source: Li et al. 2020, "A system for massively parallel hyperparameter tuning", algorithm 2. Differs from the paper:
    the resources of the rungs are given one by one instead of as ``r eta^(s + k)``; scores that are not finite never win.
    """

    def __init__(self, rungs: Sequence[int], reduction: int = 4):
        _require_rungs(tuple(rungs))
        require_range("reduction", reduction, 2)
        self.rungs, self.reduction = tuple(rungs), reduction
        self.scores: list[dict[Hashable, float]] = [{} for _ in rungs]  # by run, at each rung
        self.promoted: list[set[Hashable]] = [set() for _ in rungs]

    def report(self, run: Hashable, rung: int, score: float) -> None:
        """The score of a run at the end of a rung: the lower the better.

        Raises:
            ValueError: for a rung that there is not, or that the run was not promoted to.
        """
        require_range("rung", rung, 0, len(self.rungs) - 1)
        if rung and run not in self.promoted[rung - 1]:
            raise ValueError(f"run {run!r} reports from rung {rung}; accepted: a rung that next() sent it to, or 0")
        self.scores[rung][run] = score

    def next(self) -> tuple[Hashable, int] | None:
        """The run to go on with and its new rung, the highest that any can go to; None to begin a new run at rung 0."""
        for rung in reversed(range(len(self.rungs) - 1)):
            scores = self.scores[rung]
            ranked = sorted((run for run in scores if math.isfinite(scores[run])), key=scores.__getitem__)
            for run in ranked[: len(scores) // self.reduction]:
                if run not in self.promoted[rung]:
                    self.promoted[rung].add(run)
                    return run, rung + 1
        return None


def _require_rungs(rungs: tuple[int, ...]) -> None:
    if not rungs or rungs[0] < 1 or any(later <= before for before, later in itertools.pairwise(rungs)):
        raise ValueError(f"rungs is {rungs}; accepted: at least one number of steps, from 1 on, in ascending order")
