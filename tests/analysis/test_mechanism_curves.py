"""Figures of mechanisms: what is drawn, where, and the mark at the transition."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.analysis.mechanism_curves import (
    plot_ablation,
    plot_attention,
    plot_decodability,
    plot_distances,
    save_mechanisms,
)

STEPS = (1, 2, 4, 8, 16)


@pytest.fixture
def frames() -> dict[str, pd.DataFrame]:
    heads = list(product(STEPS, (1, 2), (0, 1)))
    base = pd.DataFrame(heads, columns=["step", "layer", "head"])
    grows = base["step"] * base["layer"] / 100 + base["head"] / 10
    kinds = [
        base.assign(kind=kind, excess=grows * sign, standard_error=0.01)
        for kind, sign in (("previous token", 1), ("own token", 1), ("label copy", -1))
    ]
    probe = pd.DataFrame(list(product(STEPS, (0, 1))), columns=["step", "layer"])
    near = pd.DataFrame(list(product(STEPS, ("truth", "ridge"))), columns=["step", "other"])
    return {
        "attention": pd.concat(kinds),
        "ablation": base.assign(replacement="mean", accuracy_drop=grows, accuracy_drop_error=0.0),
        "task": probe.assign(position=31, accuracy=0.3 + 0.1 * probe["layer"], standard_error=0.0, chance=0.25),
        "distances": near.assign(
            agreement=near["step"] / 20,
            agreement_on_errors=np.where(near["other"] == "truth", np.nan, 0.5),
            standard_error=0.0,
        ),
    }


def entries(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_draws_a_line_per_head_a_colour_per_layer_and_the_transition(frames: dict[str, pd.DataFrame]) -> None:
    ax = plot_attention(frames["attention"].sample(frac=1, random_state=0), "label copy", transition=6)
    *heads, zero, mark = ax.get_lines()
    np.testing.assert_allclose(heads[0].get_xydata(), [(step, -step / 100) for step in STEPS])
    np.testing.assert_allclose(heads[3].get_ydata(), [-2 * step / 100 - 0.1 for step in STEPS])
    colours = [line.get_color() for line in heads]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert set(zero.get_ydata()) == {0} and set(mark.get_xdata()) == {6}
    assert entries(ax) == ["heads of layer 1", "heads of layer 2", "leaves the plateau (6)"]
    assert ax.get_title() == "label copy" and ax.get_xscale() == "log"


def test_marks_nothing_where_nothing_was_left(frames: dict[str, pd.DataFrame]) -> None:
    given = Figure().subplots()
    ax = plot_ablation(frames["ablation"], ax=given)
    assert ax is given and len(ax.get_lines()) == 5 and entries(ax) == ["heads of layer 1", "heads of layer 2"]
    assert ax.get_ylabel() == "accuracy drop" and ax.get_title() == "head replaced by mean"


def test_draws_layers_beside_chance_and_others_with_their_errors(frames: dict[str, pd.DataFrame]) -> None:
    zeroth, first, chance = plot_decodability(frames["task"]).get_lines()
    assert set(zeroth.get_ydata()) == {0.3} and set(first.get_ydata()) == {0.4} and set(chance.get_ydata()) == {0.25}
    truth, ridge, errors = plot_distances(frames["distances"]).get_lines()
    np.testing.assert_allclose(truth.get_ydata(), [step / 20 for step in STEPS])
    assert (
        errors.get_linestyle() == "--" and errors.get_color() == ridge.get_color() and set(errors.get_ydata()) == {0.5}
    )


def test_draws_squared_differences_of_regression() -> None:
    frame = pd.DataFrame({"step": STEPS, "other": "dMMSE", "squared_difference": 4.0, "standard_error": 0.1})
    ax = plot_distances(frame)
    assert ax.get_ylabel() == "mean squared difference" and set(ax.get_lines()[0].get_ydata()) == {4.0}
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 4


def test_refuses_frames_it_cannot_draw(frames: dict[str, pd.DataFrame]) -> None:
    with pytest.raises(ValueError, match="kind is 'copy'; the frame has: 'previous token', 'own token', 'label copy'"):
        plot_attention(frames["attention"], "copy")
    two = pd.concat([frames["ablation"], frames["ablation"].assign(replacement="zero")])
    with pytest.raises(ValueError, match=r"replacements \['mean', 'zero'\]"):
        plot_ablation(two)
    with pytest.raises(ValueError, match="value is 'loss_rise'"):
        plot_ablation(frames["ablation"], "loss_rise")
    with pytest.raises(ValueError, match=r"positions \[3, 31\]"):
        plot_decodability(pd.concat([frames["task"], frames["task"].assign(position=3)]))
    with pytest.raises(ValueError, match="the frame has 0 rows"):
        plot_distances(frames["distances"].iloc[:0])


def test_writes_a_panel_per_table_in_which_no_title_is_cut(
    frames: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *given, **options: (saved.append(figure), save(figure, *given, **options))
    )
    save_mechanisms(frames, tmp_path / "new" / "figure.pdf", transition=6, title="run")
    assert (tmp_path / "new" / "figure.pdf").read_bytes().startswith(b"%PDF")
    titles = [ax.title for ax in saved[0].axes if ax.axison]
    assert [title.get_text() for title in titles] == [
        "previous token",
        "label copy",
        "head replaced by mean",
        "task: what a layer tells after 31 examples",
        "answers beside others' (dashed: where they err)",
    ]
    saved[0].draw_without_rendering()
    boxes = [title.get_window_extent() for title in titles]
    assert not any(boxes[k].overlaps(boxes[k + 1]) for k in range(len(boxes) - 1))
