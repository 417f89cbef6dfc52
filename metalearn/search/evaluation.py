"""From proposals to scores: known, screened, tuned, trained, each candidate at most once, ranks sharing the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from metalearn.losses.operators import OPERATORS
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.cache import Cache, settings_hash
from metalearn.search.candidates import Candidate, Scored, gradients_of
from metalearn.search.gradients import tabulated
from metalearn.search.halving import survivors
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening, same_gradient

UNTRAINED = ("dead", "not finite", "wrong sign", "rejected")  # verdicts of screening


class Evaluation:
    """Scores candidates: the validation errors of the models that are trained under them.

    A score is a function of the canonical candidate, the settings and the key: equal candidates share it, wherever and
    whenever they are proposed (with convolutions to about 1e-8, as their rounding may depend on how many go together).
    With ``world`` ranks, each tunes and trains its share of the candidates, and all know all scores.

    Args:
        tasks: what candidates are trained on; all of one output. Weights are tuned on the first.
        training: how.
        screening: what is decided before; None for nothing.
        local_search: how weights are tuned; None for weights as proposed, or ones.
        key: of all draws.
        cache: file of scores from before; None for none. Of several ranks the first reads and writes it.
        precision: of the matrix products, as the Trainer's; scores are those of one precision.
        rank: of this process.
        world: processes that share the work.
    """

    def __init__(
        self,
        tasks: Sequence[LossTask],
        training: PopulationTraining,
        screening: Screening | None,
        local_search: LocalSearch | None,
        key: Tensor,
        cache: Path | None = None,
        rank: int = 0,
        world: int = 1,
        precision: str = "32-true",
    ):
        self.tasks, self.training, self.screening, self.local_search = list(tasks), training, screening, local_search
        self.key, self.rank, self.world = key, rank, world
        self.counts: dict[str, int] = {}
        self.known: dict[str, str] = {}  # what screening knows of earlier candidates; part of a checkpoint
        settings = evaluation_settings(tasks, training, screening, local_search, key, precision)
        self.cache = Cache(cache if rank == 0 else None, settings)
        if world > 1:
            found = [[scored.to_builtins() for scored in self.cache.known.values()]]
            torch.distributed.broadcast_object_list(found)
            self._remember(found[0])

    def state(self) -> dict[str, Any]:
        """All that is known of candidates, in builtins: a resumed search needs no file."""
        return {"known": dict(self.known), "scored": [scored.to_builtins() for scored in self.cache.known.values()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Know what ``state`` says, before what the file may say of later generations."""
        later, self.cache.known, self.known = self.cache.known, {}, dict(state["known"])
        self._remember(state["scored"])
        self.cache.known = self.cache.known | {name: one for name, one in later.items() if name not in self.cache.known}

    def _remember(self, saved: list[dict[str, Any]]) -> None:
        found = [Scored.from_builtins(one) for one in saved]
        self.cache.known = {scored.candidate.name: scored for scored in found}

    @property
    def task(self) -> LossTask:
        """The first task."""
        return self.tasks[0]

    @property
    def weighted(self) -> bool:
        """Whether weights are tuned, so that programs stand for families of losses."""
        return self.local_search is not None

    def score(self, candidates: Sequence[Candidate]) -> list[Scored]:
        """What becomes of each, in their order; ``counts`` says afterwards how many were what.

        Of duplicates, all but the first get the first's score, and its form.
        """
        canonical = [candidate.canonical for candidate in candidates]
        unique = list(dict.fromkeys(canonical))
        verdicts, firsts = self._screened(unique)
        new = [one for one in unique if firsts[one] == one.name and one.name not in self.cache.known]
        alive = self._protocol([one for one in new if one not in verdicts], verdicts)
        found = self._reused(alive, self._tuned(alive))
        self.cache.add([Scored(one, verdict=verdicts[one]) if one in verdicts else found[one] for one in new])
        scores = [self.cache.known[firsts[one]] for one in canonical]
        self.counts = {
            "unique": len(set(firsts.values())),
            "rejected": len({scored.candidate for scored in scores if scored.verdict in UNTRAINED}),
            "known": len(unique) - len(new),
            "trained": len(alive),
        }
        return scores

    def _screened(self, candidates: list[Candidate]) -> tuple[dict[Candidate, str], dict[Candidate, str]]:
        """Verdicts of those that are not trained, and the name of the first candidate that each is equal to.

        Those that are known already take part, so that a resumed run finds the duplicates that it would have found.
        """
        if self.screening is None:
            return {}, {one: one.name for one in candidates}
        known = {key: name for key, name in self.known.items() if name in self.cache.known}
        found = self.screening.screen(candidates, self.task.output, self.weighted, known)
        self.known = found.known
        verdicts = {one: verdict for one, verdict in zip(candidates, found.verdicts, strict=True) if verdict}
        return verdicts, dict(zip(candidates, found.names, strict=True))

    def _protocol(self, candidates: list[Candidate], verdicts: dict[Candidate, str]) -> list[Candidate]:
        """Those that the rejection protocol lets through; the others' verdicts are added."""
        if self.screening is None or not candidates:
            return candidates
        gradients = gradients_of(candidates, self.task.output)
        if not self.task.regression:  # a fraction of the cost; 0 of 64 verdicts differed
            gradients = tabulated(gradients, self.key.device)
        rejected = self.screening.rejected(self.task, gradients, fold(self.key, "init"))
        verdicts |= {one: "rejected" for one, bad in zip(candidates, rejected, strict=True) if bad}
        return [one for one in candidates if one not in verdicts]

    def _tuned(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with weights after local search, each rank's share tuned by it."""
        if self.local_search is None or not candidates:
            return candidates
        share = candidates[self.rank :: self.world]
        tuned = self.local_search.tune(self.task, share, fold(self.key, "local")) if share else []
        lengths = [one.num_weights for one in candidates]
        columns = self._gathered([list(weights) for weights in tuned], len(candidates), max(lengths))
        return [
            one._replace(weights=tuple(row[:length].tolist()))
            for one, row, length in zip(candidates, columns, lengths, strict=True)
        ]

    def _reused(self, candidates: list[Candidate], tuned: list[Candidate]) -> dict[Candidate, Scored]:
        """Scores; those whose gradient after tuning is that of an earlier one take over its errors."""
        before = [scored for scored in self.cache.known.values() if scored.verdict == "scored"]
        first = list(range(len(tuned)))
        if self.screening is not None and self.weighted and tuned:
            places = same_gradient([*(scored.best for scored in before), *tuned], self.task.output)
            first = [place - len(before) for place in places[len(before) :]]
        own = [place for place, earlier in enumerate(first) if earlier == place]
        errors = dict(zip(own, self._trained([tuned[place] for place in own]), strict=True))
        found = {}
        for place, (one, earlier) in enumerate(zip(candidates, first, strict=True)):
            weights = tuned[place].weights if self.weighted else ()
            like = before[earlier].family if earlier < 0 else candidates[earlier].name if earlier < place else ""
            source = before[earlier] if earlier < 0 else errors[earlier]
            found[one] = source._replace(candidate=one, tuned=weights, like=like)
        return found

    def _trained(self, candidates: list[Candidate]) -> list[Scored]:
        """Errors on validation examples of every task, each rank's share trained by it."""
        if not candidates:
            return []
        share, columns = candidates[self.rank :: self.world], []
        for number, task in enumerate(self.tasks):
            together = _SharedChoice(self, len(candidates))
            if share:
                gradients = gradients_of(share, self.task.output)
                trained = self.training.train(task, gradients, fold(self.key, "train", number), choose=together)
                error_P = self.training.errors(task, trained, "validation").double()
                columns.append(
                    torch.where((trained.steps_P < self.training.steps) & trained.finite_P, torch.nan, error_P)
                )
            together.finish()
        shares = torch.stack(columns, 1).tolist() if columns else []
        errors = self._gathered(shares, len(candidates), len(self.tasks))
        return [_scored(one, row.tolist()) for one, row in zip(candidates, errors, strict=True)]

    def _gathered(self, rows: list[list[float]], count: int, width: int) -> Tensor:
        """All ranks' rows (count, width), float64, in the order of the candidates; short rows are filled up with 0."""
        found = torch.zeros(count, width, dtype=torch.float64, device=self.key.device)
        for place, row in zip(range(self.rank, count, self.world), rows, strict=True):
            found[place, : len(row)] = torch.tensor(row, dtype=torch.float64)
        if self.world > 1:
            torch.distributed.all_reduce(found)
        return found.cpu()


def evaluation_settings(
    tasks: Sequence[LossTask],
    training: PopulationTraining,
    screening: Screening | None,
    local_search: LocalSearch | None,
    key: Tensor,
    precision: str,
) -> str:
    """A hash of all that scores depend on besides the candidate."""
    key = key.cpu()
    identity = []
    for task in tasks:
        # Not what the model computes, whose last bits depend on the machine and the number of threads.
        parts = [(type(part).__name__, _builtins(vars(part))) for part in task.module.modules()]
        sizes = task.batch_size, task.outer_batch_size, task.init_seed, task.sigmoid, task.scale_targets
        identity.append((task.record(), str(task.module), parts, task.initial(fold(key, "init")), task.rule, sizes))
    operators = {name: astuple(row) for name, row in OPERATORS.items()}  # in whatever order, whatever a row remembers
    procedure = training, screening, local_search
    return settings_hash(identity, procedure, operators, int(key), precision, torch.__version__)


def _builtins(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, str | int | float | bool | tuple)}


class _SharedChoice:
    """Who survives a rung, among the candidates of all ranks; every rank is asked at every rung, alive or not."""

    def __init__(self, evaluation: Evaluation, count: int):
        self.evaluation, self.count = evaluation, count
        halving = evaluation.training.halving
        self.shares = [halving.keep ** (rung + 1) for rung in range(len(halving.rungs))] if halving else []

    def __call__(self, scores_P: Tensor, keep: float) -> Tensor:
        """Places of this rank's survivors."""
        self.shares.pop(0)
        everyone = self.evaluation._gathered([[score] for score in scores_P.tolist()], self.count, 1).squeeze(1)
        chosen = survivors(everyone, keep)
        own = chosen[chosen % self.evaluation.world == self.evaluation.rank]
        return ((own - self.evaluation.rank) // self.evaluation.world).to(scores_P.device)

    def finish(self) -> None:
        """Take part in the rungs that this rank's own candidates did not live to see."""
        share = len(range(self.evaluation.rank, self.count, self.evaluation.world))
        while self.shares:
            self(torch.full((share,), math.inf, dtype=torch.float64), self.shares[0])


def _scored(candidate: Candidate, errors: list[float]) -> Scored:
    """A NaN is the error of a candidate that was not trained to the end, an infinite one that of a diverged one."""
    if any(math.isnan(error) for error in errors):
        return Scored(candidate, verdict="halved")
    if any(math.isinf(error) for error in errors):
        return Scored(candidate, verdict="diverged")
    return Scored(candidate, errors=tuple(errors))
