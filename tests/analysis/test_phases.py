"""Phase diagrams show the means of their cells, and the report of a made-up sweep finds what was planted in it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection, QuadMesh

from metalearn.analysis.phases import plot_phase_diagram, plot_transitions, report
from metalearn.analysis.regimes import regimes
from metalearn.analysis.sweeps import read_sweep
from metalearn.models.saving import CARD

SWEEP = Path(__file__).parents[1] / "data" / "sweeps" / "phases"
UNSEEN = "validation/unseen_held_out/accuracy_last"
PLANTED = {8: 7.5, 16: 7.0, 32: 6.5, 64: 6.0}  # log2 of the critical number of tasks, of tests/data/sweeps/make.py


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    shutil.copytree(SWEEP, tmp_path / "phases")
    return tmp_path / "phases"


def small() -> pd.DataFrame:
    """Two widths, three numbers of tasks and infinity, two seeds; one cell failed and one place is empty."""
    rows = [
        (tasks, width, seed, value + 0.1 * seed)
        for (tasks, width), value in {
            (4.0, 8): 0.1, (8.0, 8): 0.2, (16.0, 8): 0.7, (np.inf, 8): 0.8, (4.0, 16): 0.1, (8.0, 16): 0.6, (16.0, 16): 0.7,
        }.items()
        for seed in range(2)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["num_tasks", "width", "seed", "value"]).assign(state="complete")
    frame.loc[0, "state"] = "failed"
    return frame


def test_colours_are_the_means_of_complete_cells() -> None:
    ax = plot_phase_diagram(small(), "num_tasks", "width", "value")
    finite, infinite = (mesh for mesh in ax.collections if isinstance(mesh, QuadMesh))
    np.testing.assert_allclose(finite.get_array(), [[0.2, 0.25, 0.75], [0.15, 0.65, 0.75]])
    assert infinite.get_array()[0] == pytest.approx(0.85) and infinite.get_array().mask.ravel().tolist() == [
        False,
        True,
    ]
    np.testing.assert_allclose(finite.get_coordinates()[0, :, 0], [1.5, 2.5, 3.5, 4.5])
    assert "(1-2 runs per cell)" in ax.get_title()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "8", "16", "∞"]


def test_threshold_runs_between_the_cells_that_it_parts() -> None:
    ax = plot_phase_diagram(small(), "num_tasks", "width", "value", threshold=0.5)
    (lines,) = (lines for lines in ax.collections if isinstance(lines, LineCollection))
    segments = {tuple(map(tuple, segment)) for segment in lines.get_segments()}
    assert segments == {((3.5, 2.5), (3.5, 3.5)), ((2.5, 3.5), (2.5, 4.5)), ((2.5, 3.5), (3.5, 3.5))}


def test_one_row_and_names_are_diagrams_too() -> None:
    frame = small().assign(width=["a", "b"] * 7)
    ax = plot_phase_diagram(frame, "num_tasks", None, "value", threshold=0.5)
    mesh = next(mesh for mesh in ax.collections if isinstance(mesh, QuadMesh))
    assert mesh.get_array().shape == (1, 3)
    ax = plot_phase_diagram(frame, "num_tasks", "width", "value")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="column is 'none'"):
        plot_phase_diagram(frame, "num_tasks", None, "none")


def test_transitions_have_a_line_per_seed_and_one_for_the_median() -> None:
    frame = small().rename(columns={"value": "validation/unseen/improvement"})
    ax = plot_transitions(frame[frame["width"] == 16], streams=["unseen"])
    lines = [line.get_xydata().tolist() for line in ax.get_lines()]
    np.testing.assert_allclose(lines[0], [(2, 0.1), (3, 0.6), (4, 0.7)])
    np.testing.assert_allclose(lines[2], [(2, 0.15), (3, 0.65), (4, 0.75)])
    assert ax.get_legend().get_texts()[0].get_text() == "unseen (2 seeds)"


def test_report_finds_what_was_planted(sweep_dir: Path) -> None:
    text = report(sweep_dir, "num_tasks", "width", chance=0.2)
    assert "failed: c005: the loss became NaN at step 120" in text and "not complete yet: 1 of 171 cells" in text
    pattern = r"at width (\d+), .*: [\d.]+ \[([\d.]+), ([\d.]+)\], .* (\d+) seeds, (\d+) cells"
    found = {int(width): (float(low), float(high)) for width, low, high, _, _ in re.findall(pattern, text)}
    assert found.keys() == PLANTED.keys()
    assert all(low <= 2 ** PLANTED[width] <= high for width, (low, high) in found.items()), found
    assert (sweep_dir / "phases.png").stat().st_size > 20_000
    table = pd.read_csv(sweep_dir / "phases.csv")
    assert len(table) == 40 and table["cells"].sum() == 169
    assert "learning-to-learn" in (sweep_dir / "phases.tex").read_text()


def test_report_takes_chance_from_a_checkpoint(sweep_dir: Path) -> None:
    cells = pd.read_csv(sweep_dir / "cells.csv")
    cells[cells["width"] == 64].to_csv(sweep_dir / "cells.csv", index=False)
    with pytest.raises(ValueError, match=r"chance is None and .* does not exist"):
        report(sweep_dir, "num_tasks")
    folder = sweep_dir / cells.loc[cells["width"] == 64, "run_dir"].iloc[0] / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({CARD: {"num_classes": 5}}, folder / "last.ckpt")
    assert "critical num_tasks, by" in report(sweep_dir, "num_tasks")
    expected = regimes(read_sweep(sweep_dir), 1 / 5).groupby("num_tasks")["regime"].agg(lambda own: own.mode()[0])
    assert pd.read_csv(sweep_dir / "phases.csv")["regime"].tolist() == expected.tolist()


def test_report_of_nothing_is_refused(sweep_dir: Path) -> None:
    pd.read_csv(sweep_dir / "cells.csv").assign(state="failed").to_csv(sweep_dir / "cells.csv", index=False)
    with pytest.raises(ValueError, match="no complete cell among 171"):
        report(sweep_dir, "num_tasks", "width", 0.2)
