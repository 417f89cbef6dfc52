"""The loop of a sweep: hand out cells, write down what became of them, go on where a killed sweep stopped."""

import collections
import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from metalearn.executors import Died
from metalearn.files import locked, write_whole
from metalearn.sweep.grid import COLUMN, SEED, Cell, Sweep
from metalearn.sweep.study import Study, Task
from metalearn.sweep.work import FAILURE, RESULT, Main, Outcome, failed, recalled, run_cell

SWEEP, CELLS, RUNS = "sweep.json", "cells.csv", "runs"
POLL_SECONDS = 0.05
DOOMED = 3  # runs that all broke down before any was complete: the sweep is stopped


class Reporter(Protocol):
    """Who is told what happens."""

    def recalled(self, complete: int, failed: int) -> None: ...
    def started(self, cell: Cell) -> None: ...
    def ended(self, cell: Cell, outcome: Outcome) -> None: ...


@dataclass(frozen=True)
class Options:
    """How a sweep is run. See ``metalearn sweep --help``."""

    workers: int | None = None  # runs at a time; by default what the executor has room for
    retries: int = 2
    retry_failed: bool = False
    budget_minutes: float | None = None


@dataclass
class Unit:
    """What a worker is given at once: one cell, or several that it trains together."""

    tasks: list[Task]
    attempts: int = 0
    future: Any = None
    executor: Executor | None = None  # that has the future


@dataclass
class Driver:
    """Runs the cells of a sweep in ``folder``, each in ``folder/runs/<cell>``.

    Three nets hold a sweep whose power fails. A run starts from its own last checkpoint; a cell whose worker dies is
    handed out again, ``retries`` times; the study on disk knows what was done, and what was running is run again.

    Args:
        sweep: what to run.
        folder: of the sweep; locked while it runs.
        main: the command line, which a worker calls for each cell.
        make_executor: where: anything with ``submit`` and futures with ``done`` and ``result``; called again for one that broke.
        options: how.
        reporter: told of every start and end.
        together: trains several cells as one, instead of one cell at a time: called in a worker with the cells' configs
            and their folders, for their outcomes.
        groups: divides cells into those that ``together`` can take at once.

    Raises:
        ValueError: if the folder holds another sweep, or another process sweeps in it.
    """

    sweep: Sweep
    folder: Path
    main: Main
    make_executor: Callable[[], Executor]
    options: Options
    reporter: Reporter
    together: Callable[[Sequence[dict[str, Any]], Sequence[str]], list[Outcome]] | None = None
    groups: Callable[[Sequence[Cell]], list[list[int]]] | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()  # workers may stand elsewhere
        self.best: dict[str, Any] | None = None

    def run(self) -> dict[str, Outcome]:
        """Run what is left. Returns: outcomes by name of the cell, those of earlier starts among them."""
        refusal = f"another process sweeps in {self.folder}; accepted: wait for it, or choose another --sweep_dir"
        with locked(self.folder, refusal):
            self._claim()
            study = Study(self.sweep, self.folder, self._forgotten)
            self._recall(study)
            self._write_table(study)
            self.executor = self.make_executor()
            try:
                self._loop(study)
            except BaseException:
                _shut_down(self.executor, cancel=True)
                raise
            _shut_down(self.executor)
            self._write_table(study)
            self.best = study.best() if self.sweep.search else None
        return self.outcomes

    def _claim(self) -> None:
        """The folder is this sweep's: refuse one that was made of another config."""
        path = self.folder / SWEEP
        made_of = self.sweep.base
        if self.sweep.search:
            search = {name: asdict(given) for name, given in self.sweep.search.items()}
            made_of = {"base": made_of, "search": search, "objective": self.sweep.objective}
        text = json.dumps(made_of, indent=1, sort_keys=True, default=str)
        if path.is_file() and path.read_text() != text:
            raise ValueError(
                f"{self.folder} holds a sweep of another config (see {path}); accepted: the same config, --set, search "
                "and objective, with more values on the axes of a grid if need be, or another --sweep_dir"
            )
        write_whole(path, text)

    def _forgotten(self, name: str) -> bool:
        """Whether a cell that has ended is to be run again: its folder is gone, or it failed and that is what was asked for."""
        outcome = recalled(self.folder / RUNS / name)
        return outcome is None or (self.options.retry_failed and outcome.result is None)

    def _recall(self, study: Study) -> None:
        """What earlier starts wrote down."""
        for cell, state in study.cells():
            outcome = recalled(self.folder / RUNS / cell.name) if state in ("complete", "failed") else None
            if outcome is not None:
                self.outcomes[cell.name] = outcome
        lost = sum(outcome.reason is not None for outcome in self.outcomes.values())
        self.reporter.recalled(len(self.outcomes) - lost, lost)

    def _loop(self, study: Study) -> None:
        budget, workers = self.options.budget_minutes, self.options.workers or getattr(self.executor, "capacity", 1)
        deadline = float("inf") if budget is None else time.monotonic() + 60 * budget
        waiting: collections.deque[Unit] = collections.deque()
        running: list[Unit] = []
        while True:
            while len(running) < workers and time.monotonic() < deadline:
                if not waiting:
                    waiting.extend(self._units(study))
                if not waiting:
                    break
                running.append(self._submit(waiting.popleft()))
            if not running:
                return
            for unit in [unit for unit in running if unit.future.done()]:
                running.remove(unit)
                outcomes = self._outcomes(unit)
                if not all(outcome.final for outcome in outcomes) and unit.attempts <= self.options.retries:
                    waiting.appendleft(unit)
                    continue
                self._settle(study, unit, outcomes)
            time.sleep(POLL_SECONDS)

    def _units(self, study: Study) -> list[Unit]:
        """The next cell, or all that are left in the groups in which they are trained together."""
        if self.groups is None:
            task = study.next()
            return [] if task is None else [Unit([task])]
        tasks = list(iter(study.next, None))
        return [Unit([tasks[i] for i in group]) for group in self.groups([task.cell for task in tasks])]

    def _submit(self, unit: Unit) -> Unit:
        unit.attempts += 1
        folders = [str(self.folder / RUNS / task.cell.name) for task in unit.tasks]
        for task, folder in zip(unit.tasks, folders, strict=True):
            if unit.attempts == 1:
                self.reporter.started(task.cell)
            (Path(folder) / FAILURE).unlink(missing_ok=True)
        unit.executor = self.executor
        if self.together is None:
            unit.future = self.executor.submit(run_cell, self.main, unit.tasks[0].cell.config, folders[0])
        else:
            configs = [task.cell.config for task in unit.tasks]
            unit.future = self.executor.submit(self.together, configs, folders)
        return unit

    def _outcomes(self, unit: Unit) -> list[Outcome]:
        """What a worker returned, or how it ended without returning."""
        folders = [self.folder / RUNS / task.cell.name for task in unit.tasks]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            found = unit.future.result()
            return found if self.together is not None else [found]
        except TimeoutError:
            reason, final = "took longer than the timeout", True
        except (Died, BrokenExecutor) as error:
            if isinstance(error, BrokenExecutor) and unit.executor is self.executor:
                _shut_down(self.executor, cancel=True)
                self.executor = self.make_executor()
            reason, final = f"its process died ({error}) {unit.attempts} times", False
        except Exception as error:  # of the worker outside the run, or of the executor: a full disk, a lost connection
            reason, final = f"{type(error).__name__}: {error}, {unit.attempts} times", False
        finished = [recalled(folder) if (folder / RESULT).is_file() else None for folder in folders]
        return [outcome or failed(folder, reason, final) for outcome, folder in zip(finished, folders, strict=True)]

    def _settle(self, study: Study, unit: Unit, outcomes: Sequence[Outcome]) -> None:
        for task, outcome in zip(unit.tasks, outcomes, strict=True):
            self.outcomes[task.cell.name] = outcome
            study.tell(task.cell, outcome)
            self.reporter.ended(task.cell, outcome)
        self._write_table(study)
        known = list(self.outcomes.values())
        if len(known) >= min(DOOMED, len(study)) and all(outcome.result is None for outcome in known):
            raise ValueError(
                f"the first {len(known)} runs of the sweep all failed: {outcomes[-1].reason}; see "
                f"{self.folder / RUNS / unit.tasks[-1].cell.name}/log.txt. accepted: mend it and add --retry_failed"
            )

    def _write_table(self, study: Study) -> None:
        """``cells.csv``: a row per cell with its axes, what became of it and its metrics."""
        rows, axes, metrics = [], {COLUMN[SEED]: None}, set()
        for cell, state in study.cells():
            outcome = self.outcomes.get(cell.name)
            axes |= dict.fromkeys(cell.point)
            row = {"cell": cell.name, "run_dir": f"{RUNS}/{cell.name}", "state": state}
            row |= {COLUMN[SEED]: cell.config.get(SEED), **cell.point}
            if outcome is not None:
                result = outcome.result or {}
                row |= {"reason": outcome.reason, "step": result.get("global_step"), "seconds": result.get("seconds")}
                row |= outcome.metrics
                metrics |= outcome.metrics.keys()
            rows.append(row)
        text = io.StringIO()
        columns = ["cell", "run_dir", "state", "reason", *axes, "step", "seconds", *sorted(metrics)]
        table = csv.DictWriter(text, columns)
        table.writeheader()
        table.writerows(rows)
        write_whole(self.folder / CELLS, text.getvalue())


def _shut_down(executor: Executor, cancel: bool = False) -> None:
    """End an executor, if it is of a kind that can be ended; submitit's, whose jobs are the cluster's, is not."""
    if hasattr(executor, "shutdown"):
        executor.shutdown(cancel_futures=cancel)
