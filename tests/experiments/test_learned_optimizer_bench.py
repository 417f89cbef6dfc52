"""The bench of learned optimizers on a network of a few parameters."""

import json

import pytest
import torch

from experiments.bench import learned_optimizers as bench
from experiments.bench.held import peak
from experiments.bench.meta_gradients import Effort
from experiments.bench.timing import UnequalError
from experiments.bench.unfolded import Unfolded
from metalearn.optim.factored_mlp import FactoredMLP

SMALL = bench.Bench(Effort(pairs=1, seconds=0.0), sizes=(6, 5, 3))


@pytest.mark.parametrize(("group", "num_rows"), [("step", 6), ("star", 1), ("memory", 5), ("guard", 1), ("meta", 3)])
def test_groups_give_rows_without_bars_on_other_networks(group, num_rows, monkeypatch):
    monkeypatch.setattr(bench, "keep_freed_memory", bool)  # other tests in this process measure memory
    rows = list(bench.GROUPS[group](SMALL))
    assert len(rows) == num_rows
    for row in rows:
        assert row.bar is None and row.ratio > 0 and row.name in str(row)


def test_other_steps_are_not_timed(monkeypatch):
    ours, theirs = FactoredMLP([4, 4]), Unfolded([4, 4], step_mult=1.1e-3)
    with pytest.raises(UnequalError, match="parameters after 3 steps"):
        bench.require_same_steps(*(bench.stepped(each, SMALL, torch.float64) for each in (ours, theirs)))


def test_peak_is_of_what_is_held_at_once():
    given = torch.ones(100)

    def call():
        first = given.view(10, 10) + 1  # 400 bytes, and a view that holds nothing of its own
        second = first * 2  # 800 held
        del first
        return (second * 2).sum()  # 800 again, then 4 more

    assert peak(call) == 804


def test_report_writes_rows_and_refusals(tmp_path, capsys, monkeypatch):
    def unequal(bench):
        raise UnequalError("steps differ")
        yield

    monkeypatch.setitem(bench.GROUPS, "unequal", unequal)
    path = tmp_path / "rows.json"
    bench.measure(SMALL, ["star", "unequal"], path)
    rows = json.loads(path.read_text())
    assert [row["name"] for row in rows] == ["step, hidden 4, STAR / factored MLP", "unequal"]
    assert "NOT MEASURED: steps differ" in capsys.readouterr().out
