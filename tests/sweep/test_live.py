"""What is shown of a sweep."""

import io

from rich.console import Console

from metalearn.sweep.grid import Cell
from metalearn.sweep.live import Show
from metalearn.sweep.work import Outcome


def cell(seed):
    return Cell({"seed": seed}, {"seed_everything": seed})


def test_says_what_ended_and_counts_earlier_starts(monkeypatch):
    now = iter([10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0])
    monkeypatch.setattr("metalearn.sweep.live.time.monotonic", lambda: next(now))
    text = io.StringIO()
    with Show(5, "loss", Console(file=text, width=200)) as show:
        show.recalled(1, 1)
        show.started(cell(0))
        show.started(cell(1))
        show.ended(cell(0), Outcome({"global_step": 3, "metrics": {"loss": 0.25}}))
        show.ended(cell(1), Outcome(None, "crashed"))
        table = Console(width=200)
        with table.capture() as shown:
            table.print(show.table())
    first, second = text.getvalue().splitlines()
    assert first == "3/5 seed 0: 20 s loss 0.25, about 1.0 minutes left"  # 30 s after the first began, for each of two
    assert second.startswith("failed: seed 1: crashed (runs/seed=1-") and second.endswith("/log.txt)")
    assert "done 2, running 0, failed 2, to do 1, about 0.4 minutes left" in shown.get()
