"""The memory of a sweep: an Optuna study in a journal on disk, written by one process."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from metalearn.sweep.grid import Cell, Range, Sweep
from metalearn.sweep.work import Outcome

JOURNAL = "journal.log"
_CELL = "cell"


class Task(NamedTuple):
    """A cell that is to be run, and the number of its trial."""

    number: int
    cell: Cell


class Study:
    """Which cells there are, which are running, and what became of the others.

    A grid's cells are enqueued once; a search's are proposed by TPE. What was running when the sweep was killed is
    handed out again first. The journal has one writer, who holds the lock of the sweep's folder; a line that a kill
    left unfinished is cut off.

    Args:
        sweep: what was asked for.
        folder: of the sweep, which holds the journal.
        retry_failed: enqueue failed cells again.
        seed: of the proposals of a search.
    """

    def __init__(self, sweep: Sweep, folder: Path, retry_failed: bool = False, seed: int = 0):
        self.sweep = sweep
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = folder / JOURNAL
        _cut_unfinished_line(journal)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal), lock_obj=_SingleWriter())),
            study_name="sweep",
            direction="maximize" if sweep.objective.get("direction") == "maximize" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed + journal.stat().st_size, constant_liar=True),
            load_if_exists=True,
        )
        self._ranges = {path: _distribution(given) for path, given in sweep.search.items()}
        self._cells = {cell.name: cell for cell in sweep.cells()} if not sweep.search else {}
        trials = self._study.get_trials(deepcopy=False)
        self._interrupted = [trial for trial in trials if trial.state == TrialState.RUNNING]
        known = {trial.user_attrs.get(_CELL) for trial in trials if not (retry_failed and _is_failed(trial))}
        for name in self._cells:
            if name not in known:
                self._study.enqueue_trial({}, user_attrs={_CELL: name})
        for trial in self._interrupted:
            if self._cell(trial) is None:  # killed while it was proposed, or of a grid that has changed
                self._study.tell(trial.number, state=TrialState.FAIL)
        counted = (t for t in trials if self._cell(t) is not None and not (retry_failed and _is_failed(t)))
        self._proposed = sum(1 for _ in counted)

    def __len__(self) -> int:
        """Cells of the sweep, run or not."""
        return len(self._cells) or self.sweep.trials

    def next(self) -> Task | None:
        """A cell to run: one that was interrupted, one that waits, or one that the search proposes; None when there is none."""
        while self._interrupted:
            trial = self._interrupted.pop()
            if (cell := self._cell(trial)) is not None:
                return Task(trial.number, cell)
        if self.sweep.search:
            if self._proposed >= self.sweep.trials:
                return None
            self._proposed += 1
            trial = self._study.ask(self._ranges)
            return Task(trial.number, self.sweep.proposed(trial.params))
        while any(trial.state == TrialState.WAITING for trial in self._study.get_trials(deepcopy=False)):
            trial = self._study.ask()
            if (cell := self._cells.get(trial.user_attrs[_CELL])) is not None:
                return Task(trial.number, cell)
        return None

    def tell(self, number: int, outcome: Outcome) -> None:
        """What became of a trial. A failure is a failure, and never a value; a grid's value is its number of steps."""
        if outcome.reason or outcome.result is None:
            self._study.tell(number, state=TrialState.FAIL)
            return
        metric = self.sweep.objective.get("metric")
        value = outcome.result["global_step"] if metric is None else outcome.metrics.get(metric)
        if value is None:
            raise ValueError(f"objective.metric is {metric!r}; accepted: {', '.join(sorted(outcome.metrics))}")
        self._study.tell(number, float(value))

    def cells(self) -> Iterable[tuple[Cell, str]]:
        """Every cell that is known so far and its state: "complete", "failed", "running" or "waiting"; the last try counts."""
        states = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}
        found: dict[str, tuple[Cell, str]] = {name: (cell, "waiting") for name, cell in self._cells.items()}
        for trial in self._study.get_trials(deepcopy=False):
            if (cell := self._cell(trial)) is not None:
                found[cell.name] = cell, states.get(trial.state, "waiting")
        return found.values()

    def best(self) -> dict[str, Any]:
        """Parameters and value of the best trial of a search."""
        trial = self._study.best_trial
        return {**trial.params, "value": trial.value}

    def _cell(self, trial: FrozenTrial) -> Cell | None:
        """The cell of a trial; None for one that a changed grid no longer has."""
        if not self.sweep.search:
            return self._cells.get(trial.user_attrs.get(_CELL, ""))
        return self.sweep.proposed(trial.params) if trial.params.keys() == self._ranges.keys() else None


class _SingleWriter(BaseJournalFileLock):
    """No lock: the folder of the sweep is locked, and a lock of Optuna's own would outlive a killed process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _is_failed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL


def _distribution(given: Range) -> BaseDistribution:
    if given.choices is not None:
        return CategoricalDistribution(given.choices)
    assert given.low is not None and given.high is not None
    if isinstance(given.low, int) and isinstance(given.high, int):
        return IntDistribution(given.low, given.high, log=given.log)
    return FloatDistribution(given.low, given.high, log=given.log)


def _cut_unfinished_line(journal: Path) -> None:
    journal.touch()
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)
