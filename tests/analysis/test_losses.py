"""Tables, curves and pictures of losses: closed forms, and what is drawn."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from metalearn.analysis.losses import (
    gradient_scales,
    hall_losses,
    loss_curves,
    plot_losses,
    read_hall_of_fame,
    save_losses,
    show,
)
from metalearn.losses.learned import load_loss
from metalearn.losses.program import Program
from metalearn.search.candidates import Candidate, Scored
from metalearn.search.hall_of_fame import HallOfFame

CROSS_ENTROPY = "mul(-1,mul(y,log(p)))"
TEXTS = (CROSS_ENTROPY, "square(sub(y,p))", "abs(sub(y,p))")


def hall(folder: Path, output: str = "softmax", **columns: list) -> Path:
    """A run folder with three losses, the first of them with weights, and these columns besides."""
    weights = [[1.0, 2.0, 1.0, 1.0, 1.5], [], []]
    frame = pd.DataFrame({"rank": [1, 2, 3], "error": [0.05, 0.06, 0.0625], "program": TEXTS})
    frame = frame.assign(weights=[json.dumps(one) for one in weights], **columns)
    frame.to_csv(folder / "hall_of_fame.csv", index=False)
    load_loss(CROSS_ENTROPY, output=output).save(folder / "best.json")
    return folder


# -- the table ---------------------------------------------------------------------------------------------------------


def test_show_prints_the_table_and_draws_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = show(str(hall(tmp_path, complexity=[7, 4, 4], rescored=[None] * 3)), best=2)
    # What the run has not done is not shown.
    assert list(table.columns) == ["rank", "error", "complexity", "pareto", "formula"]
    assert list(table["formula"]) == ["-2*y*log(1.5*p)", "(y - p)^2"]
    printed = capsys.readouterr().out
    assert "-2*y*log(1.5*p)" in printed and "0.05" in printed and "abs" not in printed
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_a_hall_without_further_columns_is_shown(tmp_path: Path) -> None:
    assert list(show(str(hall(tmp_path)), curves=1).columns) == ["rank", "error", "formula"]


def test_the_pareto_front_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert list(show(str(hall(tmp_path, complexity=[7, 4, 4])))["pareto"]) == [True, True, False]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3] for line in lines if line and line[0] in "123" and len(line) > 4][-3:-1] == ["*", "*"]
    # The run knows losses that its table has no room for.
    table = show(str(hall(tmp_path, complexity=[7, 4, 4], pareto=[0, 1, 0])), best=2)
    assert list(table["pareto"]) == [False, True]


def test_formulas_without_weights_are_simplified(tmp_path: Path) -> None:
    text = "square(sub(mul(p,1),abs(abs(y))))"
    rows = {"rank": [1, 2], "error": [0.1, 0.2], "program": [text, text]}
    weights = [json.dumps([1.0] * 7), json.dumps([1.0] * 6 + [2.0])]
    pd.DataFrame(rows | {"weights": weights}).to_csv(tmp_path / "hall_of_fame.csv", index=False)
    load_loss(text).save(tmp_path / "best.json")
    assert list(show(str(tmp_path), curves=1)["formula"]) == ["(abs(y) - p)^2", "(p - abs(abs(2*y)))^2"]


def test_losses_have_the_weights_that_are_better_on_untouched_data(tmp_path: Path) -> None:
    tuned = {"weights_tuned": [json.dumps([3.0] * 5), json.dumps([3.0] * 3), None]}
    frame = read_hall_of_fame(hall(tmp_path, rescored=[0.1, 0.1, None], rescored_tuned=[0.2, 0.05, None], **tuned))
    found = list(hall_losses(frame, "softmax").values())
    weights = [[1.0, 2.0, 1.0, 1.0, 1.5], [3.0] * 3, [1.0] * 3]
    assert [loss.weights.tolist() for loss in found] == weights
    assert [loss.program for loss in found] == [Program.parse(text) for text in TEXTS]


def test_reads_what_a_search_writes(tmp_path: Path) -> None:
    kept = HallOfFame(5)
    tuned = Scored(Candidate(Program.parse(CROSS_ENTROPY)), tuned=(2.0, 1.0, 1.0, 1.0, 1.0), errors=(0.04,))
    polynomial = Scored(Candidate(None, tuple(0.1 * k for k in range(8))), errors=(0.05,))
    for scored in (polynomial, tuned):
        kept.add(scored, {"generation": 3})
    numbers = {"rescored": 0.06, "rescored_tuned": 0.05, "weights_tuned": json.dumps([3.0, 1.0, 1.0, 1.0, 1.0])}
    kept.write(tmp_path / "hall_of_fame.csv", {tuned.candidate.canonical.name: numbers})
    load_loss(CROSS_ENTROPY).save(tmp_path / "best.json")
    table = show(str(tmp_path), curves=2)
    assert list(table["formula"]) == ["-3*y*log(p)", "taylor(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)"]
    assert list(table["rescored_tuned"].dropna()) == [0.05] and list(table["generation"]) == [3, 3]


def test_what_is_no_hall_of_fame_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hall_of_fame\.csv' does not exist; accepted: the folder of a run"):
        show(str(tmp_path))
    pd.DataFrame(columns=["rank", "error", "program"]).to_csv(tmp_path / "hall_of_fame.csv", index=False)
    with pytest.raises(ValueError, match="no losses yet"):
        show(str(tmp_path))
    pd.DataFrame({"rank": [1]}).to_csv(tmp_path / "hall_of_fame.csv", index=False)
    with pytest.raises(ValueError, match="has no error, program"):
        show(str(tmp_path))
    with pytest.raises(ValueError, match="curves is 7; accepted: 1 <= curves <= 6"):
        show(str(hall(tmp_path)), curves=7)


# -- curves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("loss", ["cross_entropy", CROSS_ENTROPY])
def test_matches_cross_entropy_of_a_softmax(loss: str, num_classes: int) -> None:
    curves = loss_curves({"it": load_loss(loss)}, num_classes)
    for y, value, descent in ((1, lambda p: -np.log(p), lambda p: 1 - p), (0, lambda p: 0 * p, lambda p: -p)):
        part = curves[curves["y"] == y]
        np.testing.assert_allclose(part["value"], value(part["x"]), atol=1e-12)
        np.testing.assert_allclose(part["descent"], descent(part["x"]), atol=1e-12)


def test_matches_binary_cross_entropy_of_a_sigmoid() -> None:
    curves = loss_curves({"it": load_loss("cross_entropy", output="sigmoid")})
    value = np.where(curves["y"] == 1, -np.log(curves["x"]), -np.log1p(-curves["x"]))
    np.testing.assert_allclose(curves["value"], value, atol=1e-12)
    np.testing.assert_allclose(curves["descent"], curves["y"] - curves["x"], atol=1e-12)


def test_matches_squared_error_of_a_residual() -> None:
    curves = loss_curves({"it": load_loss("square(sub(y,p))", output="identity")})
    assert set(curves["y"]) == {0, 1} and curves["x"].min() == -3
    np.testing.assert_allclose(curves["value"], curves["x"] ** 2, atol=1e-12)
    np.testing.assert_allclose(curves["descent"], -2 * curves["x"], atol=1e-12)


def test_losses_of_different_outputs_are_refused() -> None:
    losses = {"a": load_loss("mse"), "b": load_loss("mse", output="identity")}
    with pytest.raises(ValueError, match=r"identity', 'softmax.*accepted: losses of one kind"):
        loss_curves(losses)


def test_a_loss_is_drawn_on_top_of_its_multiples() -> None:
    weights = torch.ones(5)
    weights[0] = 5.0
    losses = {"one": load_loss(CROSS_ENTROPY), "five": load_loss(CROSS_ENTROPY, weights=None)}
    losses["five"].load_state_dict({"weights": weights})
    curves = loss_curves(losses)
    scales = gradient_scales(curves)
    assert scales["five"] / scales["one"] == pytest.approx(5)
    for ax in plot_losses(curves):
        lines = [line for line in ax.get_lines() if len(line.get_xdata()) > 2]
        half = len(lines) // 2
        for one, five in zip(lines[:half], lines[half:], strict=True):
            np.testing.assert_allclose(one.get_ydata(), five.get_ydata(), atol=1e-9)


def test_pictures_have_room_for_regression_and_poles(tmp_path: Path) -> None:
    save_losses({"a": load_loss("log(sub(y,p))", output="identity")}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    steep = plot_losses(loss_curves({"a": load_loss("log(p)"), "b": load_loss("log(log(p))")}))
    assert all(np.isfinite(ax.get_ylim()).all() for ax in steep)
