import math

import pandas as pd
import pytest

from experiments.betty_reweighting import MEMORY_HIDDEN, METHODS, SMOKE, Run, main, memory_rise, table


def test_smoke_prints_every_method_and_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.betty_reweighting.fresh_memory_rise", lambda *_: 1.0)
    found = main(["--smoke", "--seeds", "0", "1", "--imbalance", "50", "--out", str(tmp_path / "table")])
    assert list(found["method"]) == list(METHODS) and set(found["seeds"]) == {2}
    assert found["accuracy"].between(5, 100).all() and (found["time"] > 0).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), found, check_dtype=False)
    assert "Betty" not in capsys.readouterr().out


def test_budget_stops_before_the_first_run(monkeypatch, capsys):
    assert main(["--smoke", "--seeds", "0", "--imbalance", "50", "--budget_minutes", "-1"]).empty
    assert "stopped by --budget_minutes before imbalance 50, seed 0, plain" in capsys.readouterr().out


def test_table_matches_means_and_paired_gains_by_hand():
    runs = [Run(9, seed, "plain", 60 + seed, 2.0) for seed in (1, 2, 3)]
    runs += [
        Run(9, seed, "SAMA", 60 + seed + gain, 2.0 * cost) for seed, gain, cost in ((1, 3, 4), (2, -1, 5), (3, 4, 9))
    ]
    _, row = table(runs, {"plain": 0.0, "SAMA": 7.5}).to_dict("records")
    assert row["accuracy"] == pytest.approx(64) and row["gain"] == pytest.approx(2) and row["better"] == 2
    assert row["gain_sd"] == pytest.approx(math.sqrt((1 + 9 + 4) / 2)) and (row["time"], row["MiB"]) == (5.0, 7.5)


def test_memory_rises_by_the_activations_of_the_large_classifier():
    activations = 300 * MEMORY_HIDDEN * 4 / 2**20
    assert memory_rise(SMOKE, 50, "unrolled (store)") > activations
