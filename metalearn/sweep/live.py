"""What a sweep shows while it runs: a table that is kept up to date in a terminal, a line per cell elsewhere."""

import statistics
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from metalearn.sweep.grid import Cell
from metalearn.sweep.work import Outcome

SHOWN = 12  # running cells in the table


class Show:
    """A reporter for a terminal, or for a log.

    Args:
        total: cells of the sweep.
        workers: that share them.
        metric: of a result, shown with every cell that is done.
        console: where to; standard output by default.
    """

    def __init__(self, total: int, workers: int, metric: str | None = None, console: Console | None = None):
        self.total, self.workers, self.metric = total, workers, metric
        self.console = console or Console(soft_wrap=True)
        self.begun: dict[str, float] = {}
        self.seconds: list[float] = []
        self.done = self.failed = 0
        self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self.table)

    def __enter__(self) -> "Show":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def recalled(self, done: int, failed: int) -> None:
        """Cells of earlier starts."""
        self.done, self.failed = done, failed

    def started(self, cell: Cell) -> None:
        """A worker was given the cell."""
        self.begun[cell.name] = time.monotonic()

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """The cell is complete, or has failed for good."""
        self.seconds.append(time.monotonic() - self.begun.pop(cell.name))
        ok = outcome.reason is None
        self.done, self.failed = self.done + ok, self.failed + (not ok)
        if not ok:
            self.console.print(f"failed: {_place(cell)}: {outcome.reason} (runs/{cell.name}/log.txt)", highlight=False)
        elif not self.console.is_terminal:
            value = outcome.metrics.get(self.metric) if self.metric else None
            shown = "" if value is None else f" {self.metric} {value:.4g}"
            line = f"{self.done + self.failed}/{self.total} {_place(cell)}: {self.seconds[-1]:.0f} s{shown}{self._remaining()}"
            self.console.print(line, highlight=False)

    def table(self) -> Table:
        """Counts, time left, and what is running."""
        left = self.total - self.done - self.failed
        counts = f"done {self.done}, running {len(self.begun)}, failed {self.failed}, to do {left - len(self.begun)}"
        table = Table(title=counts + self._remaining(), title_justify="left", box=None)
        table.add_column("running")
        table.add_column("seconds", justify="right")
        names = list(self.begun.items())
        for name, begun in names[:SHOWN]:
            table.add_row(name.rsplit("-", 1)[0], f"{time.monotonic() - begun:.0f}")
        return table

    def _remaining(self) -> str:
        left = self.total - self.done - self.failed
        if not self.seconds or not left:
            return ""
        return f", about {statistics.mean(self.seconds) * left / self.workers / 60:.1f} minutes left"


def _place(cell: Cell) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in cell.point.items())
