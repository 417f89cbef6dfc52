"""The memory of a sweep: an Optuna study in a journal on disk, written by one process."""

import collections
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState

from metalearn.sweep.grid import Cell, Range, Sweep, column
from metalearn.sweep.work import Outcome

JOURNAL = "journal.log"
_CELL = "cell"


class Task(NamedTuple):
    """A cell that is to be run, and the number of its trial."""

    number: int
    cell: Cell


class Study:
    """Which cells there are, which are running, and what became of the others.

    A grid's cells get a trial when they are handed out; a search's are proposed by TPE, and what is proposed twice is
    run once. What was running when the sweep was killed is handed out again first. Cells that a changed grid no longer
    has are left as they are. The journal has one writer, who holds the lock of the sweep's folder; a line that a kill
    left unfinished is cut off.

    Args:
        sweep: what was asked for.
        folder: of the sweep, which holds the journal.
        forgotten: whether a cell whose trial has ended is to be run again, by its name.
        seed: of the proposals of a search.
    """

    def __init__(
        self, sweep: Sweep, folder: Path, forgotten: Callable[[str], bool] = lambda name: False, seed: int = 0
    ):
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
        self._ended: dict[str, FrozenTrial] = {}  # by cell, the trial that tells what became of it
        self._interrupted: collections.deque[FrozenTrial] = collections.deque()
        self._running: dict[str, list[int]] = {}  # by cell, its trial and those that proposed it once more
        for trial in self._study.get_trials(deepcopy=False):
            cell = self._cell(trial)
            if cell is None:
                continue
            if trial.state == TrialState.RUNNING:
                self._interrupted.append(trial)
            elif not forgotten(cell.name):
                self._ended[cell.name] = trial
        self._todo = collections.deque(name for name in self._cells if name not in self._ended)
        self._proposed = len(self._interrupted) + len(self._ended)

    def __len__(self) -> int:
        """Cells of the sweep, run or not."""
        return len(self._cells) or self.sweep.trials

    def next(self) -> Task | None:
        """A cell to run: one that was interrupted, one that waits, or one that the search proposes; None when there is none."""
        while self._interrupted:
            trial = self._interrupted.popleft()
            cell = self._cell(trial)
            assert cell is not None
            if self._begin(cell, trial.number):
                return Task(trial.number, cell)
        while self._todo:
            cell = self._cells[self._todo.popleft()]
            if cell.name not in self._running.keys() | self._ended.keys():
                trial = self._study.ask()
                trial.set_user_attr(_CELL, cell.name)
                self._begin(cell, trial.number)
                return Task(trial.number, cell)
        while self.sweep.search and self._proposed < self.sweep.trials:
            self._proposed += 1
            trial = self._study.ask(self._ranges)
            cell = self.sweep.proposed(trial.params)
            if self._begin(cell, trial.number):
                return Task(trial.number, cell)
        return None

    def _begin(self, cell: Cell, number: int) -> bool:
        """Whether the cell is to be run for this trial: neither is it running, nor is it known what becomes of it."""
        if (ended := self._ended.get(cell.name)) is not None:
            self._study.tell(number, ended.values, ended.state)
            return False
        self._running.setdefault(cell.name, []).append(number)
        return len(self._running[cell.name]) == 1

    def tell(self, cell: Cell, outcome: Outcome) -> None:
        """What became of a cell. A failure is a failure, and never a value; a grid's value is its number of steps."""
        numbers = self._running.pop(cell.name)
        value, state = None, TrialState.FAIL
        if outcome.reason is None and outcome.result is not None:
            metric = self.sweep.objective.get("metric")
            value = outcome.result["global_step"] if metric is None else outcome.metrics.get(metric)
            if value is None:
                raise ValueError(f"objective.metric is {metric!r}; accepted: {', '.join(sorted(outcome.metrics))}")
            value, state = float(value), TrialState.COMPLETE
        for number in numbers:
            self._ended[cell.name] = self._study.tell(number, value, state)

    def cells(self) -> Iterable[tuple[Cell, str]]:
        """Every cell that is known so far and its state: "complete", "failed", "running" or "waiting"."""
        found = {name: (cell, "waiting") for name, cell in self._cells.items()}
        for trial in [*self._interrupted, *self._ended.values()]:
            cell = self._cell(trial)
            assert cell is not None
            states = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed"}
            found[cell.name] = cell, states.get(trial.state, "waiting")
        for name in self._running.keys() & found.keys():
            found[name] = found[name][0], "running"
        return found.values()

    def best(self) -> dict[str, Any] | None:
        """Parameters and value of the best trial of a search; None before the first is complete."""
        if not any(trial.state == TrialState.COMPLETE for trial in self._ended.values()):
            return None
        trial = self._study.best_trial
        return {**{column(path): value for path, value in trial.params.items()}, "value": trial.value}

    def _cell(self, trial: FrozenTrial) -> Cell | None:
        """The cell of a trial; None for one that a changed grid no longer has, or that a kill left without a cell."""
        if not self.sweep.search:
            return self._cells.get(trial.user_attrs.get(_CELL, ""))
        return self.sweep.proposed(trial.params) if trial.params.keys() == self._ranges.keys() else None


class _SingleWriter(BaseJournalFileLock):
    """No lock: the folder of the sweep is locked, and a lock of Optuna's own would outlive a killed process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


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
