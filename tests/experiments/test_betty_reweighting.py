import csv
import math

import pytest

from experiments.betty_reweighting import MEMORY_HIDDEN, METHODS, RESET, SMOKE, Run, fresh_memory_rise, main, summary


def test_smoke_prints_every_method_and_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.betty_reweighting.fresh_memory_rise", lambda *_: 1.0)
    rows = main(["--smoke", "--seeds", "0", "1", "--imbalance", "50", "--out", str(tmp_path / "table")])
    assert [row["method"] for row in rows] == list(METHODS) and {row["seeds"] for row in rows} == {2}
    assert all(5 < row["accuracy"] < 100 and row["time"] > 0 for row in rows)
    written = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [float(row["gain"]) for row in written] == pytest.approx([row["gain"] for row in rows])
    assert "Betty" not in capsys.readouterr().out


def test_budget_stops_before_the_first_run(monkeypatch, capsys):
    assert main(["--smoke", "--seeds", "0", "--imbalance", "50", "--budget_minutes", "-1"]) == []
    assert "stopped by --budget_minutes before imbalance 50, seed 0, plain" in capsys.readouterr().out


def test_table_matches_means_and_paired_gains_by_hand():
    runs = [Run(9, seed, "plain", 60 + seed, 2.0) for seed in (1, 2, 3)]
    runs += [
        Run(9, seed, "SAMA", 60 + seed + gain, 2.0 * cost) for seed, gain, cost in ((1, 3, 4), (2, -1, 5), (3, 4, 9))
    ]
    _, row = summary(runs, {"plain": 0.0, "SAMA": 7.5})
    assert row["accuracy"] == pytest.approx(64) and row["gain"] == pytest.approx(2) and row["better"] == 2
    assert row["gain_sd"] == pytest.approx(math.sqrt((1 + 9 + 4) / 2)) and (row["time"], row["MiB"]) == (5.0, 7.5)


@pytest.mark.skipif(not RESET.exists(), reason="the system does not tell the peak")
def test_memory_rises_by_the_activations_of_the_large_classifier():
    activations = 300 * MEMORY_HIDDEN * 4 / 2**20
    assert fresh_memory_rise(SMOKE, 50, "unrolled (store)") > activations
