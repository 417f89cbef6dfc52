"""What is done to a candidate whatever the others are: the rejection protocol, local search, training. Any process can do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metalearn.losses.learned import load_loss
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.candidates import Candidate, gradients_of
from metalearn.search.gradients import tabulated
from metalearn.search.halving import survivors
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening

Choice = Callable[[Tensor, float], Tensor]  # who survives a rung: places, from scores (P,) and the share that may go on


class Work(NamedTuple):
    """Tuning and training of candidates under settings that are the same for all: rows of numbers, a candidate each."""

    tasks: Sequence[LossTask]
    training: PopulationTraining
    screening: Screening | None
    local_search: LocalSearch | None
    key: Tensor

    def prepare(self, candidates: Sequence[Candidate]) -> list[list[float]]:
        """Whether the rejection protocol rejects each, 1 or 0; for those that it lets through, the weights after local search."""
        rejected = self._rejected(candidates)
        alive = [one for one, bad in zip(candidates, rejected, strict=True) if not bad]
        tuned = iter([()] * len(alive))
        if self.local_search is not None and alive:
            tuned = iter(self.local_search.tune(self.tasks[0], alive, fold(self.key, "local")))
        return [[1.0] if bad else [0.0, *next(tuned)] for bad in rejected]

    def _rejected(self, candidates: Sequence[Candidate]) -> list[bool]:
        if self.screening is None:
            return [False] * len(candidates)
        task = self.tasks[0]
        gradients = gradients_of(candidates, task.output)
        if not task.regression:  # a fraction of the cost; 0 of 64 verdicts differed
            gradients = tabulated(gradients, self.key.device)
        return self.screening.rejected(task, gradients, fold(self.key, "init"))

    def train(self, candidates: Sequence[Candidate], number: int = 0, choose: Choice = survivors) -> list[list[float]]:
        """The error of each on a task's validation examples: infinite if it diverged, NaN if it was halved.

        Args:
            candidates: with the weights that they are trained under.
            number: of the task.
            choose: as in ``PopulationTraining.train``.
        """
        task = self.tasks[number]
        gradients = gradients_of(candidates, task.output)
        trained = self.training.train(task, gradients, fold(self.key, "train", number), choose=choose)
        error_P = self.training.errors(task, trained, "validation").double()
        halved_P = (trained.steps_P < self.training.steps) & trained.finite_P
        return torch.where(halved_P, torch.nan, error_P).unsqueeze(1).tolist()

    def portable(self) -> Work:
        """The same, for other processes: tasks have no examples that are not needed, and nothing that could not travel."""
        return self._replace(tasks=[_portable(task) for task in self.tasks])


def _portable(task: LossTask) -> LossTask:
    portable = task.with_loss(load_loss(task.own_loss, output=task.output))
    portable.parts = {part: task.parts[part] for part in ("train", "validation")}
    portable.model = nn.Identity  # the module is made; what made it may be a lambda
    portable._on_device = {}
    return portable
