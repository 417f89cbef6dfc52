"""What a sweep costs and what it saves: ``python -m experiments.bench.sweeps``, on a machine that does nothing else.

The grid has nine cells: phases.yaml with 2^2 … 2^10 training tasks of digits, 500 steps each. A sweep is the whole command
``metalearn sweep`` in a process of its own: start-up, checks, runs, the figure. The tables of all sweeps must be equal
before there is a ratio. Nine cells of equal length take two workers as long as five take one: no ratio can be above 1.8.

The driver's overhead is the time that workers are without a run while cells are waiting: the sum, over all runs but the
first of every worker, of what passes from the end of the run before (its result.json) to the start of the next (its
cell.yaml), as a share of the sum of run times, from the start to the end of each. The end of a process, the start of the
next, the study and the table are in it; the set-up of a run is not, because ``metalearn fit`` has it, too.
"""

import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from jsonargparse import auto_cli

from experiments.bench import ensemble
from experiments.bench.report import Bounded, Row, header, report
from experiments.bench.timing import Comparison, UnequalError
from metalearn.base import require_choice, require_range

PHASES = Path(__file__).parents[2] / "configs" / "in_context" / "phases.yaml"
SIZES, STEPS, LOGGED = tuple(2**k for k in range(2, 11)), 500, 10
TASKS = "data.init_args.tasks.init_args.num_tasks"
BARS = {"speed-up": 1.7, "overhead": 0.05, "seconds": 120.0}
OWN_TIME = "seconds"  # the one column of the table that depends on the machine
TAIL = 20  # lines of a failed sweep's output that are shown


@dataclass(frozen=True)
class Bench:
    """How much of everything, and what is run."""

    sizes: Sequence[int] = SIZES
    steps: int = STEPS
    pairs: int = 1
    device: str = "cpu"
    members: int = 8
    command: Sequence[str] = field(default=(sys.executable, "-m", "metalearn", "sweep"))

    def bar(self, name: str) -> float | None:
        """Bars are on the whole grid of whole runs."""
        return BARS[name] if (self.sizes, self.steps) == (SIZES, STEPS) else None


class Swept(NamedTuple):
    """What one sweep left behind."""

    seconds: float  # of the whole command
    starts: list[float]  # of runs, sorted, in seconds
    ends: list[float]  # likewise
    inside_fit: float  # seconds, the sum over runs
    table: list[dict[str, str]]  # cells.csv without the times

    @property
    def running(self) -> float:
        """Sum of run times."""
        return sum(self.ends) - sum(self.starts)

    @property
    def after_start_up(self) -> float:
        """From the start of the first run to the end of the last."""
        return self.ends[-1] - self.starts[0]

    def waiting(self, workers: int) -> float:
        """Seconds that workers were without a run while cells were waiting: the k-th run to end makes room for the next."""
        return sum(self.starts[workers:]) - sum(self.ends[: len(self.starts) - workers])


def sweep(bench: Bench, workers: int) -> Swept:
    """Run the command in a folder that is thrown away.

    Raises:
        RuntimeError: with the end of its output, where it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        file, folder = Path(place) / "nine.sweep.yaml", Path(place) / "sweep"
        grid = {"seed_everything": [0], TASKS: list(bench.sizes)}
        plan = {"config": str(PHASES), "grid": grid, "report": {"x": "num_tasks"}}
        file.write_text(yaml.safe_dump(plan))
        shorter = [f"trainer.{name}={bench.steps}" for name in ("max_steps", "val_check_interval")]
        words = [*bench.command, file, "--sweep_dir", folder, "--workers", workers]
        words += [word for setting in shorter for word in ("--set", setting)]
        began = time.perf_counter()
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-TAIL:])
            raise RuntimeError(f"{' '.join(bench.command)} ended with {done.returncode}: {said}")
        return _read(seconds, folder)


def _read(seconds: float, folder: Path) -> Swept:
    runs = list((folder / "runs").iterdir())
    starts, ends = (sorted((run / name).stat().st_mtime for run in runs) for name in ("cell.yaml", "result.json"))
    inside_fit = sum(json.loads((run / "result.json").read_text())[OWN_TIME] for run in runs)
    with open(folder / "cells.csv") as file:
        table = [{name: value for name, value in row.items() if name != OWN_TIME} for row in csv.DictReader(file)]
    return Swept(seconds, starts, ends, inside_fit, table)


def require_equal_tables(sweeps: Sequence[Swept]) -> None:
    """Raise ``UnequalError`` unless all sweeps made the same table, to the last digit of every metric."""
    first = sweeps[0].table
    for other in sweeps[1:]:
        if len(other.table) != len(first):
            raise UnequalError(f"tables of {len(first)} and {len(other.table)} cells")
        for ours, theirs in zip(first, other.table, strict=True):
            if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
                name = differing[0]
                raise UnequalError(f"{name} of {ours['cell']} is {ours.get(name)} and {theirs.get(name)}")


# -- what is measured ----------------------------------------------------------------------------------------------------


def workers(bench: Bench) -> Iterator[Row | Bounded]:
    """Sweeps with two workers and with one, in turns; the first of all, which loads files from disk, has two."""
    two: list[Swept] = []
    one: list[Swept] = []
    for pair in range(bench.pairs):
        sides = [(2, two), (1, one)]
        for count, side in sides if pair % 2 == 0 else reversed(sides):
            side.append(sweep(bench, count))
    require_equal_tables([*two, *one])
    cells, median = len(bench.sizes), sorted(two, key=lambda swept: swept.seconds)[len(two) // 2]
    ceiling = cells / math.ceil(cells / 2)
    print(f"{len(median.table[0])} columns of {cells} cells are equal; at most {ceiling:.2f} can come of two workers")
    print(
        f"two workers: {median.seconds - median.after_start_up:.1f} s of start-up, table and figure; "
        f"{median.running / cells:.1f} s a run, {median.inside_fit / cells:.1f} s of it inside fit",
        flush=True,
    )
    name, amount = f"{cells} cells of {bench.steps} steps", 60.0 * cells
    whole = Comparison([swept.seconds for swept in two], [swept.seconds for swept in one])
    yield Row(f"{name}: two workers / one", whole, bench.bar("speed-up"), amount, "cells/min")
    later = Comparison([swept.after_start_up for swept in two], [swept.after_start_up for swept in one])
    yield Row(f"{name}, after start-up: two workers / one", later, bench.bar("speed-up"), amount, "cells/min")
    for count, side, said in ((1, one, "one worker"), (2, two, "two workers")):
        idle, running = [swept.waiting(count) for swept in side], [swept.running for swept in side]
        yield Bounded(f"driver's overhead / run time, {said}", idle, running, "s", bench.bar("overhead"))
    yield Bounded(f"{name}: the whole command", list(whole.ours), [1.0] * len(two), "s", bench.bar("seconds"))


def stacked(bench: Bench) -> Iterator[Row]:
    """An ensemble's training against its members', one after the other."""
    yield ensemble.against_one_by_one(bench.members, device=bench.device, pairs=max(3, bench.pairs))


# -- the report --------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[Bench], Iterator[Row | Bounded]]] = {"workers": workers, "ensemble": stacked}


def main(
    steps: int = STEPS,
    pairs: int = 1,
    only: str | None = None,
    device: str = "cpu",
    members: int | None = None,
    json: Path | None = None,
) -> None:
    """Print a row per measurement.

    Args:
        steps: of every run of the grid, at least 10, when the first loss is logged; there are bars for 500.
        pairs: of sweeps with two workers and with one, at least 1.
        only: groups of measurements, as "workers,ensemble"; null for both.
        device: of the ensemble, "cpu" or "cuda".
        members: of the ensemble, at least 1; by default 64 on a GPU and 8 on a CPU.
        json: file that the rows are written to.
    """
    chosen = list(GROUPS) if only is None else only.split(",")
    for group in chosen:
        require_choice("only", group, GROUPS)
    require_range("steps", steps, LOGGED)
    require_range("pairs", pairs, 1)
    require_choice("device", device, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    torch.set_num_threads(1)
    count = members or (64 if device == "cuda" else 8)
    print(header("digits"), flush=True)
    measure(Bench(steps=steps, pairs=pairs, device=device, members=count), chosen, json)


def measure(bench: Bench, chosen: Sequence[str], path: Path | None) -> None:
    """Print these groups' rows as they come, and write them to a file where there is one."""
    report({group: partial(GROUPS[group], bench) for group in chosen}, path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
