"""``metalearn sweep``: many runs of one config, on every core and every machine."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import contextlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningModule, Trainer

from metalearn.base import require_choice, require_range
from metalearn.cli.ensemble import groups_of, train_together
from metalearn.cli.run import MetalearnCLI, one_line, run_lightning
from metalearn.executors import RayWorkers, Workers, start_importing
from metalearn.sweep.driver import CELLS, RUNS, Driver, Options
from metalearn.sweep.grid import Cell, Sweep, read_sweep_file
from metalearn.sweep.live import Show
from metalearn.sweep.work import RESULT, Main
from metalearn.training.in_context import InContextLearning

EXECUTORS = ("processes", "ray", "ensemble")
PROBES, PROBED_STEPS, PROBED_SECONDS = 4, 12, 10.0


def sweep(arguments: list[str], main: Main) -> int:
    """``metalearn sweep FILE --sweep_dir DIR``. Returns: the exit code, 1 where cells have failed."""
    parser = ArgumentParser(prog="metalearn sweep", description=run_sweep.__doc__, exit_on_error=False)
    parser.add_argument("file", type=str, help="the sweep: a YAML file with config and grid, or search")
    parser.add_argument(
        "--set", action="append", type=str, metavar="PATH=VALUE", help="a setting of every run, repeatable"
    )
    parser.add_argument("--retry_failed", action="store_true", help="run cells again that have failed before")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the cells and an estimate of the cost; run nothing"
    )
    own: set[str | int] = {"file", "main", "overrides", "retry_failed", "dry_run"}
    parser.add_function_arguments(run_sweep, skip=own, as_group=False)
    options = parser.parse_args(arguments).as_dict()
    return run_sweep(options.pop("file"), main, overrides=options.pop("set"), **options)


def run_sweep(
    file: str,
    main: Main,
    sweep_dir: str,
    executor: str = "processes",
    workers: int | None = None,
    threads: int | None = None,
    gpus: float = 0.0,
    address: str | None = None,
    members: int = 64,
    overrides: list[str] | None = None,
    timeout_minutes: float | None = None,
    budget_minutes: float | None = None,
    retries: int = 2,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run every cell of a sweep once. Kill it at any moment and repeat the command: it goes on where it stopped.

    Args:
        file: the sweep file.
        main: the command line, which runs a cell.
        sweep_dir: Folder of the sweep: one folder per cell under runs/, the table cells.csv, the study journal.log.
        executor: "processes" of this machine; "ray" for a Ray cluster; "ensemble" trains cells that differ only in
            seed, tasks or learning rate as one run on one device.
        workers: Runs (or ensembles) at a time; by default one per core, all those of the Ray cluster, or one ensemble.
        threads: Of each run; by default one, and for an ensemble all cores.
        gpus: Of each run, with ray; a fraction packs several runs onto one GPU.
        address: Of the Ray cluster, "auto" for the one this machine belongs to.
        members: Of an ensemble, at most: what its device has memory for.
        overrides: settings of every run, each "dotted.path=value".
        timeout_minutes: After which a run has failed.
        budget_minutes: After which no further run is started; repeat the command to go on.
        retries: How often a run is started again whose process died.
        retry_failed: run cells again that have failed before; what diverged is not, because it would again.
        dry_run: print the cells and an estimate of the cost, and run nothing.

    Raises:
        ValueError: for values out of range, a sweep that cannot be, or a run's config that is refused.
    """
    require_choice("executor", executor, EXECUTORS)
    require_range("retries", retries, 0)
    require_range("members", members, 1)
    if budget_minutes is not None:
        require_range("budget_minutes", budget_minutes, 0)
    if executor != "ray" and (gpus or address):
        raise ValueError(f"executor is {executor!r} with --gpus or --address; accepted with them: 'ray'")
    plan, folder = read_sweep_file(file, overrides or ()), Path(sweep_dir)
    if threads is None:
        threads = _cores() if executor == "ensemble" else 1
    require_range("threads", threads, 1)
    require_range("workers", 1 if workers is None else workers, 1)
    here = workers or max(1, _cores() // threads)
    if executor != "ray" and not dry_run:
        start_importing(threads)
    check(plan, folder)
    if dry_run:
        print("\n".join(cell.name for cell in plan.cells()) or f"{plan.trials} trials of {', '.join(plan.search)}")
        print(estimate(plan, here))
        return 0
    options = Options(workers, retries, retry_failed, budget_minutes)
    total = sum(1 for _ in plan.cells()) or plan.trials
    make = executor_maker(executor, here, threads, timeout_minutes, address=address, gpus=gpus)
    with Show(total, plan.objective.get("metric")) as show:
        driver = Driver(plan, folder, main, make, options, show)
        if executor == "ensemble":
            driver.together, driver.groups = train_together, partial(groups_of, members=members)
        outcomes = driver.run()
    failed = [name for name, outcome in outcomes.items() if outcome.reason]
    print(f"\n{len(outcomes) - len(failed)} of {total} cells complete, {len(failed)} failed: {folder / CELLS}")
    for name in failed:
        print(f"failed: {name}: {outcomes[name].reason} ({folder / 'runs' / name / 'log.txt'})")
    if driver.best:
        print("best: " + ", ".join(f"{name} {value:.6g}" for name, value in driver.best.items()))
    _report(plan, folder)
    return 1 if failed else 0


def executor_maker(
    kind: str, workers: int, threads: int, timeout_minutes: float | None, address: str | None = None, gpus: float = 0.0
) -> Callable[[], Executor]:
    """What makes the executor of that kind."""
    seconds = None if timeout_minutes is None else 60 * timeout_minutes
    if kind == "ray":
        return lambda: RayWorkers(address, threads, gpus, seconds)
    return lambda: Workers(workers, threads, seconds)


def check(plan: Sweep, folder: Path) -> None:
    """Build model and data of cells that have every value of every axis between them, so that a mistake is told at once.

    Cells that were started before are not built again.
    """
    cells = [cell for cell in plan.cells() if not (folder / RUNS / cell.name).exists()]
    chosen: dict[str, Cell] = {}
    seen: set[tuple[str, Any]] = set()
    for cell in cells:
        places = set(cell.point.items())
        if places - seen:
            chosen[cell.name] = cell
            seen |= places
    if plan.search:
        lowest = {path: given.choices[0] if given.choices else given.low for path, given in plan.search.items()}
        chosen["search"] = plan.proposed(lowest)
    for cell in chosen.values():
        try:
            _build(cell.config, CheckCLI)
        except (ValueError, ArgumentError, MisconfigurationException) as error:
            place = ", ".join(f"{axis} {label}" for axis, label in cell.point.items())
            raise ValueError(f"the run at {place} is refused: {one_line(error)}") from error


def estimate(plan: Sweep, workers: int) -> str:
    """What a sweep will take, from a few steps of some of its cells. Evaluation is not counted."""
    cells = list(plan.cells()) or [
        plan.proposed({p: r.choices[0] if r.choices else r.low for p, r in plan.search.items()})
    ]
    total = len(cells) if plan.axes else plan.trials
    probed = cells[:: max(1, len(cells) // PROBES)][:PROBES]
    seconds = []
    for cell in probed:
        timer = _build(cell.config, ProbeCLI).timer
        seconds.append(timer.seconds_per_step * timer.max_steps)
    hours = statistics.mean(seconds) * total / 3600
    return (
        f"{total} cells, {min(seconds):.0f} to {max(seconds):.0f} s of training each by {PROBED_STEPS} steps of {len(probed)} of "
        f"them: {hours:.2g} core-hours, {60 * hours / workers:.2g} minutes with {workers} workers"
    )


class FitCLI(MetalearnCLI):
    """Knows ``fit`` alone: a config is checked in less time without the parsers of other subcommands."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": MetalearnCLI.subcommands()["fit"]}


class CheckCLI(FitCLI):
    """Builds what ``fit`` would train, and leaves it at that."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[])

    def _run_subcommand(self, subcommand: str) -> None:
        if isinstance(self.model, InContextLearning):
            self.model.check(self.datamodule.tasks)


class ProbeCLI(FitCLI):
    """Trains for a few steps and takes the time."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        self.timer = StepTimer(settings.max_steps)
        self.save_config_callback = None
        settings.max_steps = min(settings.max_steps, PROBED_STEPS)
        settings.limit_val_batches, settings.enable_progress_bar, settings.callbacks = 0, False, [self.timer]
        return super().instantiate_trainer(logger=False)

    def after_fit(self) -> None:
        """Nothing is kept."""


class StepTimer(Callback):
    """Seconds per step: the median over all but the first."""

    def __init__(self, max_steps: int):
        self.max_steps = max_steps
        self.times: list[float] = []

    @property
    def seconds_per_step(self) -> float:
        """Median; of a single step, since training started."""
        gaps = [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(gaps[1:] or gaps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.times.append(time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.times.append(time.monotonic())
        trainer.should_stop = self.times[-1] - self.times[0] > PROBED_SECONDS


def _build(config: dict[str, Any], cli: type[MetalearnCLI]) -> Any:
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "cell.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        return run_lightning(["fit", "-c", str(file), "--run_dir", f"{folder}/run"], cli)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's remarks are the runs' own business."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _report(plan: Sweep, folder: Path) -> None:
    """The figure that the sweep file asks for."""
    if plan.report and any((folder / RUNS).glob(f"*/{RESULT}")):
        from metalearn.analysis.phases import report

        try:
            print(report(folder, plan.report["x"], plan.report.get("y")))
        except ValueError as error:
            print(f"no figure: {error}")
