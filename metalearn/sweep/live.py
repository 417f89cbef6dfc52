"""What a sweep shows while it runs: a table that is kept up to date in a terminal, a line per cell elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from metalearn.sweep.grid import Cell
from metalearn.sweep.work import Outcome

SHOWN = 12  # running cells in the table


class Show:
    """A reporter for a terminal, or for a log.

    Args:
        total: cells of the sweep.
        metric: of a result, shown with every cell that is done.
        console: where to; standard output by default.
    """

    def __init__(self, total: int, metric: str | None = None, console: Console | None = None):
        self.total, self.metric = total, metric
        self.console = console or Console(soft_wrap=True)
        self.begun: dict[str, float] = {}
        self.first: float | None = None  # when the first cell of this start began
        self.done = self.failed = self.earlier = 0
        self._live = Live(console=self.console, refresh_per_second=2, get_renderable=self.table)

    def __enter__(self) -> "Show":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def recalled(self, complete: int, failed: int) -> None:
        """Cells of earlier starts."""
        self.done, self.failed, self.earlier = complete, failed, complete + failed

    def started(self, cell: Cell) -> None:
        """A worker was given the cell."""
        self.begun[cell.name] = time.monotonic()
        self.first = self.begun[cell.name] if self.first is None else self.first

    def ended(self, cell: Cell, outcome: Outcome) -> None:
        """The cell is complete, or has failed for good."""
        seconds = time.monotonic() - self.begun.pop(cell.name)
        ok = outcome.reason is None
        self.done, self.failed = self.done + ok, self.failed + (not ok)
        if not ok:
            self.console.print(f"failed: {_place(cell)}: {outcome.reason} (runs/{cell.name}/log.txt)", highlight=False)
        elif not self.console.is_terminal:
            value = outcome.metrics.get(self.metric) if self.metric else None
            shown = "" if value is None else f" {self.metric} {value:.4g}"
            line = f"{self.done + self.failed}/{self.total} {_place(cell)}: {seconds:.0f} s{shown}{self._remaining()}"
            self.console.print(line, highlight=False)

    def table(self) -> Group:
        """Counts, time left, and what is running."""
        left = self.total - self.done - self.failed
        counts = f"done {self.done}, running {len(self.begun)}, failed {self.failed}, to do {left - len(self.begun)}"
        table = Table(box=None)
        table.add_column("running")
        table.add_column("seconds", justify="right")
        names = list(self.begun.items())
        for name, begun in names[:SHOWN]:
            table.add_row(name.rsplit("-", 1)[0], f"{time.monotonic() - begun:.0f}")
        return Group(counts + self._remaining(), table)

    def _remaining(self) -> str:
        """The time left at the pace of this start."""
        left, ended = self.total - self.done - self.failed, self.done + self.failed - self.earlier
        if self.first is None or not ended or left <= 0:
            return ""
        return f", about {(time.monotonic() - self.first) / ended * left / 60:.1f} minutes left"


def _place(cell: Cell) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in cell.point.items())
