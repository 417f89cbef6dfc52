"""Figures: what is drawn, where, and that nothing leaks into pyplot."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.analysis.curves import plot_learning_curves, plot_training, save_learning_curves

STREAMS = ("seen_train", "unseen_held_out")


@pytest.fixture
def evaluation() -> pd.DataFrame:
    rows = [
        (stream, method, position, 8, 0.2 + 0.6 * position / 31, 0.02)
        for stream in STREAMS
        for method, positions in (("learner", range(32)), ("ridge", (31, 1, 5)))
        for position in positions
    ]
    return pd.DataFrame(rows, columns=["stream", "method", "position", "sequences", "accuracy", "standard_error"])


@pytest.fixture
def training() -> pd.DataFrame:
    rows = [(run, step, "train/loss", 1.0 / (1 + step)) for run in ("a", "b") for step in range(30)]
    rows += [("a", step, "validation/accuracy_last", step / 30) for step in (9, 19, 29)]
    return pd.DataFrame(rows, columns=["run", "step", "metric", "value"])


def labels(ax: Axes) -> list[str]:
    return [
        text.get_text() for legend in (ax.get_legend(), *ax.figure.legends) if legend for text in legend.get_texts()
    ]


def drawn(figure: Figure) -> np.ndarray:
    figure.savefig(Path("/dev/null"), format="png")
    return np.asarray(figure.canvas.buffer_rgba())


def test_draws_the_values_in_order_of_position(evaluation: pd.DataFrame) -> None:
    ax = plot_learning_curves(evaluation, chance=0.2)
    learner, ridge, chance = ax.get_lines()
    np.testing.assert_allclose(learner.get_xydata(), [(n, 0.2 + 0.6 * n / 31) for n in range(32)])
    np.testing.assert_allclose(ridge.get_xydata(), [(n, 0.2 + 0.6 * n / 31) for n in (1, 5, 31)])
    assert ridge.get_marker() != "None" and learner.get_marker() == "None"
    assert set(chance.get_ydata()) == {0.2}
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.18) and band[:, 1].max() == pytest.approx(0.82)


def test_has_one_panel_per_stream_and_one_legend(evaluation: pd.DataFrame) -> None:
    first = plot_learning_curves(evaluation, chance=0.2)
    panels = first.figure.axes
    assert panels[0] is first and [panel.get_title() for panel in panels] == ["seen train", "unseen held out"]
    assert panels[0].get_shared_y_axes().joined(*panels)
    assert [panel.get_ylabel() for panel in panels] == ["accuracy", ""]
    assert labels(first) == ["learner", "ridge", "chance"]


def test_method_looks_the_same_in_every_stream(evaluation: pd.DataFrame) -> None:
    evaluation = evaluation[~((evaluation["stream"] == "seen_train") & (evaluation["method"] == "learner"))]
    seen, unseen = plot_learning_curves(evaluation).figure.axes
    colours = [{line.get_label(): line.get_color() for line in panel.get_lines()} for panel in (seen, unseen)]
    assert colours[0]["ridge"] == colours[1]["ridge"] != colours[1]["learner"]


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_no_text_is_cut_off(evaluation: pd.DataFrame, streams: int) -> None:
    long_names = evaluation.replace({"learner": "1-nearest-neighbour", "ridge": "logistic regression"})
    one = long_names[long_names["stream"] == "seen_train"]
    frame = pd.concat([one.assign(stream=f"unseen_held_out_{k}") for k in range(streams)])
    figure = plot_learning_curves(frame, chance=0.2).figure
    figure.draw_without_rendering()
    for artist in (*figure.legends, *figure.axes):
        box = artist.get_tightbbox().transformed(figure.transFigure.inverted())
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1 and box.y1 <= 1
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    assert not any(a.overlaps(b) for a, b in pairwise(titles))


def test_draws_into_the_given_axes(evaluation: pd.DataFrame, training: pd.DataFrame) -> None:
    left, right = Figure().subplots(1, 2)
    one = evaluation[evaluation["stream"] == "unseen_held_out"]
    assert plot_learning_curves(one, left) is left and labels(left) == ["learner", "ridge"]
    assert plot_training(training, ["train/loss"], right) is right and labels(right) == ["train/loss"]


def test_refuses_frames_it_cannot_draw(evaluation: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"'seen_train', 'unseen_held_out'.*one for given axes"):
        plot_learning_curves(evaluation, Figure().subplots())
    with pytest.raises(ValueError, match=r"streams \[\]"):
        plot_learning_curves(evaluation.iloc[:0])
    with pytest.raises(ValueError, match="one run at a time"):
        plot_learning_curves(pd.concat([evaluation, evaluation]))


def test_draws_a_line_per_run_and_a_colour_per_metric(training: pd.DataFrame) -> None:
    ax = plot_training(training, ["train/loss", "validation/accuracy_last"])
    loss_a, loss_b, accuracy = ax.get_lines()
    assert loss_a.get_color() == loss_b.get_color() != accuracy.get_color()
    np.testing.assert_allclose(accuracy.get_xydata(), [(9, 9 / 30), (19, 19 / 30), (29, 29 / 30)])
    assert labels(ax) == ["train/loss", "validation/accuracy_last"]
    assert ax.get_ylabel() == "loss, accuracy last" and ax.get_xlabel() == "training step"
    with pytest.raises(ValueError, match="metric is 'train/lost'; 'a' has: train/loss"):
        plot_training(training, ["train/lost"])


@pytest.mark.parametrize(("name", "start"), [("curves.png", b"\x89PNG"), ("curves.pdf", b"%PDF")])
def test_writes_the_figure(evaluation: pd.DataFrame, tmp_path: Path, name: str, start: bytes) -> None:
    save_learning_curves(evaluation, tmp_path / "new" / name, title="quick", chance=0.2)
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_imports_no_pyplot_and_no_torch() -> None:
    modules = "metalearn.analysis.curves, metalearn.analysis.compare, sys"
    code = (
        f"import {modules}; print([m for m in ('torch', 'pytorch_lightning', 'matplotlib.pyplot') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
