"""The table and the figure of a comparison of optimizers."""

import pandas as pd
import pytest

from metalearn.analysis.training_curves import (
    format_training,
    plot_training_runs,
    read_training_curves,
    save_training_runs,
    summarise_training,
)


@pytest.fixture
def frame():
    rows = []
    for horizon, name, factor in ((1, "learned", 1.0), (1, "Adam", 2.0), (3, "learned", 3.0), (3, "Adam", 4.0)):
        lr = None if name == "learned" else 0.05
        for step in range(20 * horizon):
            row = {"problem": 0, "horizon": horizon, "optimizer": name, "lr": lr, "step": step}
            rows.append(row | {"loss": factor * (20 * horizon - step), "standard_error": 0.1})
    return pd.DataFrame(rows)


def test_summary_is_of_all_steps_and_of_the_last_tenth(frame):
    rows = summarise_training(frame).set_index(["horizon", "optimizer"])
    assert rows.loc[(1, "learned"), "mean_loss"] == pytest.approx(10.5)
    assert rows.loc[(1, "Adam"), "final_loss"] == pytest.approx(2 * 1.5)
    assert rows.loc[(3, "learned"), "final_loss"] == pytest.approx(3 * 3.5)
    assert rows.loc[(3, "Adam"), "lr"] == 0.05 and pd.isna(rows.loc[(3, "learned"), "lr"])
    text = format_training(frame).splitlines()
    assert len(text) == 3 and text[2].split() == ["Adam", "21.0000", "3.0000", "0.05", "122.0000", "14.0000", "0.05"]


def test_the_figure_has_a_panel_per_horizon_and_a_line_per_optimizer(frame, tmp_path):
    frame.to_csv(tmp_path / "validation_curves.csv", index=False)
    read = read_training_curves(tmp_path)
    panels = plot_training_runs(read).figure.axes
    assert [len(panel.lines) for panel in panels] == [2, 2] and panels[0].get_yscale() == "log"
    assert list(panels[1].lines[1].get_xdata()[[0, -1]]) == [1, 60]
    save_training_runs(read, tmp_path / "validation.png")
    assert (tmp_path / "validation.png").stat().st_size > 1000


def test_refuses_other_frames(frame, tmp_path):
    with pytest.raises(ValueError, match="has 2 pairs of problem and horizon"):
        plot_training_runs(frame, ax=plot_training_runs(frame))
    with pytest.raises(ValueError, match="the frame lacks loss"):
        summarise_training(frame.drop(columns="loss"))
    with pytest.raises(ValueError, match="make it with: metalearn validate"):
        read_training_curves(tmp_path)
    with pytest.raises(ValueError, match="stage is 'fit'"):
        read_training_curves(tmp_path, "fit")
