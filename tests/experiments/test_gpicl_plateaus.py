"""The experiment on a sweep that was made by hand, in which every plateau is known."""

import math

import pandas as pd
import pytest

from experiments import gpicl_plateaus

CHANCE, END = math.log(5), 400
# Step at which the loss falls, for training and for unseen tasks, by variant and seed; None for never.
FALLS = {
    "baseline": {0: (200, 200), 1: (320, 320), 2: (240, 240)},
    "zeal": {0: (100, 100), 1: (160, 160), 2: (120, 120)},  # half of it, for every seed
    "crammer": {0: (40, None), 1: (40, 380), 2: (40, None)},  # memorises what it trains on
}


@pytest.fixture
def sweep_dir(tmp_path):
    """cells.csv and logs.csv as a sweep leaves them; the last cell failed."""
    cells, logs = [], []
    for seed in range(3):
        for variant, falls in FALLS.items():
            cell = f"{variant}-{seed}"
            state = {"cell": cell, "run_dir": f"runs/{cell}", "seed": seed, "variant": variant, "step": END}
            accuracy = 0.2 if falls[seed][1] is None else 0.8
            cells.append(state | {"state": "complete", gpicl_plateaus.ACCURACY: accuracy})
            for metric, fall, every in zip(
                ("train/loss", gpicl_plateaus.LOSSES["unseen tasks"]), falls[seed], (10, 20), strict=True
            ):
                steps = range(every, END + 1, every)
                loss = [CHANCE if fall is None or step < fall else CHANCE - 1 for step in steps]
                logs += [
                    {"cell": cell, "metric": metric, "step": s, "value": v} for s, v in zip(steps, loss, strict=True)
                ]
    cells.append({"cell": "failed", "run_dir": "runs/failed", "seed": 3, "variant": "zeal", "state": "failed"})
    pd.DataFrame(cells).to_csv(tmp_path / "cells.csv", index=False)
    pd.DataFrame(logs).to_csv(tmp_path / "logs.csv", index=False)
    return tmp_path


def read(path):
    return pd.read_csv(path, index_col=0)


def test_matches_the_planted_plateaus(sweep_dir, capsys):
    gpicl_plateaus.main(["--sweep_dir", str(sweep_dir), "--smoothing", "0"])
    out = sweep_dir / "plateaus"
    for name in ("unseen_tasks", "training"):
        table = read(out / f"{name}_plateaus.csv")
        assert list(table.index) == list(FALLS)  # the first of the grid is what others are compared with
        assert table.loc["baseline", "median"] == 240
        assert table.loc["zeal", ["median", "left", "ratio", "ratio_low"]].tolist() == pytest.approx([120, 3, 0.5, 0.5])
    unseen, steps = read(out / "unseen_tasks_plateaus.csv"), read(out / "unseen_tasks_steps.csv")
    assert unseen.loc["crammer", "left"] == 1 and math.isinf(unseen.loc["crammer", "median"])
    assert math.isnan(unseen.loc["crammer", "ratio"])
    expected = [(400 - 200 + 380 - 320 + 400 - 240) / 3, (100 - 200 + 160 - 320 + 120 - 240) / 3]
    assert steps.loc[["crammer", "zeal"], "difference"].tolist() == pytest.approx(expected)
    assert steps.loc["zeal", "difference_high"] < 0 < steps.loc["crammer", "difference_low"]
    assert read(out / "training_plateaus.csv").loc["crammer", "median"] == 40  # less than chance without generalising
    assert read(out / "accuracy.csv").loc["crammer", "mean"] == pytest.approx(0.4)
    printed = capsys.readouterr().out
    assert "9 of 10 cells are complete; compared with variant = baseline" in printed
    for path in (*out.glob("*.csv"), *out.glob("*.tex"), *out.glob("*.png")):
        assert path.stat().st_size > 0
    assert len(list(out.glob("*.png"))) == 4


def test_refuses_an_axis_that_the_sweep_lacks(sweep_dir):
    with pytest.raises(ValueError, match="by is 'bias_fraction'; accepted: 'seed', 'variant'"):
        gpicl_plateaus.main(["--sweep_dir", str(sweep_dir), "--by", "bias_fraction"])


def test_refuses_fewer_classes_than_two(sweep_dir):
    with pytest.raises(SystemExit):
        gpicl_plateaus.main(["--sweep_dir", str(sweep_dir), "--classes", "1"])
