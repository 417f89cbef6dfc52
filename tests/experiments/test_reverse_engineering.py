"""The experiment in small: what is planted is found, and any rule is put through the same functions."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments import reverse_engineering
from metalearn.analysis.coordinates import Coordinate
from metalearn.optim.first_order import SGD
from metalearn.optim.learnable import LearnableMomentum
from metalearn.optim.saving import save_rule


def test_smoke_finds_what_was_planted_and_puts_an_lstm_through_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
    kept = {"momentum .9": reverse_engineering.PLANTED["momentum .9"]}
    monkeypatch.setattr(
        reverse_engineering, "PLANTED", kept
    )  # the others are found in tests/analysis/test_optimizers.py
    assert reverse_engineering.main(["--smoke", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "NO" not in printed and "untrained" in printed
    planted = pd.read_csv(tmp_path / "planted.csv")
    assert list(planted["rule"]) == list(kept) and (planted["error"] <= 0.1).all()
    found, remembered = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("findings", "memories"))
    assert found["scale"].item() > 0 and set(remembered["rule"]) == {"untrained"} and len(remembered) == 5
    assert {path.name for path in tmp_path.glob("*.png")} == {"planted.png", "learned.png"}


def test_a_rule_that_is_momentum_is_found_to_be_momentum(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reverse_engineering, "PLANTED", {"wrong": (SGD(0.1), "effective_step", 0.2)})
    monkeypatch.setattr(reverse_engineering, "plot_optimizers", lambda *rules: Figure())
    save_rule(tmp_path / "heavy.safetensors", LearnableMomentum(0.01, 0.8))
    assert not reverse_engineering.main(
        ["--rule", str(tmp_path / "heavy.safetensors"), "--out", str(tmp_path), "--steps", "20"]
    )
    assert "NO" in capsys.readouterr().out
    found = pd.read_csv(tmp_path / "findings.csv").iloc[0]
    assert found["momentum"] == pytest.approx(0.8, abs=1e-6) and found["effective_step"] == pytest.approx(0.01)
    assert found["edge"] == pytest.approx(2 * 1.8 / 0.01, rel=0.06)  # the grid's step
    assert pd.read_csv(tmp_path / "memories.csv")["ratio"].to_numpy() == pytest.approx(1, abs=1e-4)


def test_measures_what_quadratics_are_like() -> None:
    found = reverse_engineering.met(LearnableMomentum(1e-9, 0.0), "uniform", 3, 0)
    assert found.gradient == pytest.approx(5, rel=0.3)  # |2 W'y| near x = 0: ten products of two uniform numbers, twice
    assert found.curvature == pytest.approx(2 * (10 * 0.5) ** 2, rel=0.2)  # 2 |W|^2, nearly all of it that of W's mean
    with pytest.raises(ValueError, match=r"scale is -1\.0; accepted: scale > 0"):
        reverse_engineering.main(["--scale", "-1"])
    assert reverse_engineering.edge(Coordinate(SGD(0.1)), 10) == pytest.approx(20, rel=0.06)
