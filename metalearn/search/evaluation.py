"""From proposals to scores: known, screened, tuned, trained, each candidate at most once, ranks or processes sharing the work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from metalearn.base import require_range
from metalearn.losses.operators import OPERATORS
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.cache import Cache, settings_hash
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.halving import survivors
from metalearn.search.local import LocalSearch
from metalearn.search.population import PopulationTraining
from metalearn.search.screening import Screening, same_gradient
from metalearn.search.work import Work

UNTRAINED = ("dead", "not finite", "wrong sign", "rejected")  # verdicts of screening


class Evaluation:
    """Scores candidates: the validation errors of the models that are trained under them.

    A score is a function of the canonical candidate, the settings and the key: equal candidates share it, wherever and
    whenever they are proposed (with convolutions to about 1e-8, as their rounding may depend on how many go together).
    With ``world`` ranks, each tunes and trains its share of the candidates, and all know all scores. With several ``shards``
    the share is divided once more, and ``map`` is called with what is done to a shard and with the shards.

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
        map: what calls a picklable function of shards, as the builtin does, or ``mapped`` with an executor.
        shards: that ``map`` is given at a time, at least 1.

    Raises:
        ValueError: for shards below 1, or several of them with halving, for which all candidates are compared on the way.
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
        map: Callable[..., Any] = map,
        shards: int = 1,
    ):
        require_range("shards", shards, 1)
        if shards > 1 and training.halving:
            raise ValueError(
                f"halving is given with {shards} workers, which cannot compare candidates on the way; accepted: null"
            )
        self.map, self.shards = map, shards
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
        alive, tuned = self._prepared([one for one in new if one not in verdicts], verdicts)
        found = self._reused(alive, tuned)
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

    def _prepared(
        self, candidates: list[Candidate], verdicts: dict[Candidate, str]
    ) -> tuple[list[Candidate], list[Candidate]]:
        """Those that the rejection protocol lets through, before and after local search; the others' verdicts are added."""
        if not candidates:
            return [], []
        columns = self._columns(Work.prepare, candidates, 1 + max(one.num_weights for one in candidates))
        verdicts |= {one: "rejected" for one, row in zip(candidates, columns, strict=True) if row[0]}
        alive = [one for one in candidates if one not in verdicts]
        if self.local_search is None:
            return alive, alive
        weights = columns[columns[:, 0] == 0, 1:]
        tuned = [
            one._replace(weights=tuple(row[: one.num_weights].tolist()))
            for one, row in zip(alive, weights, strict=True)
        ]
        return alive, tuned

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
        """Errors on validation examples of every task."""
        if not candidates:
            return []
        columns = []
        for number in range(len(self.tasks)):
            together = _SharedChoice(self, len(candidates))
            choose = together if self.training.halving else survivors
            work = functools.partial(Work.train, number=number, choose=choose)
            columns.append(self._columns(work, candidates, 1))
            together.finish()
        errors = torch.cat(columns, 1)
        return [_scored(one, row.tolist()) for one, row in zip(candidates, errors, strict=True)]

    def _columns(
        self, function: Callable[[Work, list[Candidate]], list[list[float]]], candidates: list[Candidate], width: int
    ) -> Tensor:
        """What ``function`` makes of each candidate, (count, width), from every shard of every rank's share of them."""
        work = Work(self.tasks, self.training, self.screening, self.local_search, self.key)
        work = work if self.shards == 1 else work.portable()
        share = candidates[self.rank :: self.world]
        shards = [share[first :: self.shards] for first in range(min(self.shards, len(share)))]
        found = list(self.map(functools.partial(function, work), shards))
        rows = [found[place % len(shards)][place // len(shards)] for place in range(len(share))]
        return self._gathered(rows, len(candidates), width)

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
