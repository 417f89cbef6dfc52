"""``metalearn loss show`` and ``metalearn loss transfer`` as a user types them."""

import json
from pathlib import Path

import pandas as pd
import pytest
from test_cli import refused

from metalearn.cli import main
from metalearn.losses.learned import load_loss

TEXT = "mul(-1,mul(y,log(p)))"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with one loss."""
    row = {"rank": 1, "error": 0.04, "complexity": 7, "program": TEXT, "weights": json.dumps([1.5, 1, 1, 1, 1])}
    pd.DataFrame([row]).to_csv(tmp_path / "hall_of_fame.csv", index=False)
    load_loss(TEXT).save(tmp_path / "best.json")
    return tmp_path


def test_show(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["loss", "show", str(run_dir), "--curves", "1"]) == 0
    assert "-1.5*y*log(p)" in capsys.readouterr().out and (run_dir / "losses.png").exists()


def test_transfer_compares_with_standard_losses_and_leaves_its_table(
    run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--model", "linear", "--seeds", "2", "--steps", "30", "--rates", "[0.003,0.03,0.3]"]
    rule = ["--rule", "Adam", "--rule.lr", "0.01"]
    assert main(["loss", "transfer", str(run_dir), "square(sub(y,p))", "--data", "digits", *options, *rule]) == 0
    table = pd.read_csv(run_dir / "transfer_digits_linear.csv").set_index("loss")
    assert list(table.index) == ["cross_entropy", "focal", "label_smoothing", run_dir.name, "square(sub(y,p))"]
    assert (table["error"] < 0.2).all()
    # The learned loss is cross-entropy; the two part at steep rates only, where p is 0 in single precision.
    assert abs(table.loc[run_dir.name, "difference"]) < 0.01
    assert table["p_holm"].notna().sum() >= 3
    assert "difference from cross_entropy with 95% paired t interval" in capsys.readouterr().out


def test_landscape_draws_planes_and_rates(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--model", "linear", "--steps", "20", "--rates", "[0.003,0.03,0.3]", "--points", "5"]
    assert main(["loss", "landscape", str(run_dir), *options]) == 0
    planes = pd.read_csv(run_dir / "landscape_digits_linear.csv")
    assert planes.groupby("loss", sort=False).size().to_dict() == {"cross_entropy": 25, run_dir.name: 25}
    assert (run_dir / "landscape_digits_linear.png").stat().st_size > 10_000
    assert "explained" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "loss command is 'draw'; accepted: 'show', 'transfer', 'landscape'" in refused(capsys, "loss", "draw")
    assert "accepted: the folder of a run of loss search" in refused(capsys, "loss", "show", tmp_path / "none")
    transfer = ("loss", "transfer")
    assert "device is 'cuda:99'; accepted" in refused(capsys, *transfer, TEXT, "--device", "cuda:99")
    assert "points is 1; accepted: 2 <= points" in refused(capsys, "loss", "landscape", TEXT, "--points", 1)
    assert "seeds is 1; accepted: 2 <= seeds" in refused(capsys, *transfer, TEXT, "--seeds", 1)
    assert "model is 'net'" in refused(capsys, *transfer, TEXT, "--model", "net")
    assert "position 4" in refused(capsys, *transfer, "mul(q,p)", "--model", "linear")
    assert "path is 'nothing_of_that_name.csv'" in refused(
        capsys, *transfer, TEXT, "--data", "nothing_of_that_name.csv"
    )
