"""Figures show the numbers of their frames, and a rule has one colour in all of them."""

import numpy as np
import pandas as pd
import pytest

from metalearn.analysis.coordinates import Coordinate
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.optimizer_curves import (
    of_rules,
    plot_adaptation,
    plot_modes,
    plot_optimizers,
    plot_schedule,
    plot_stability,
    plot_update_curves,
)
from metalearn.analysis.optimizers import fixed_point, linearise, modes
from metalearn.optim.first_order import SGD


@pytest.fixture(scope="module")
def rules() -> dict[str, Coordinate]:
    return {"plain": Coordinate(SGD(0.1)), "heavy": Coordinate(SGD(0.1, momentum=0.5))}


def test_a_rule_without_modes_keeps_its_colour(rules: dict[str, Coordinate]) -> None:
    frame = of_rules(rules, lambda rule: modes(linearise(rule, fixed_point(rule))))
    assert list(frame["rule"]) == ["heavy"]
    (dots,) = plot_modes(frame).collections
    np.testing.assert_allclose(dots.get_offsets(), [[0.5, 0.0]])
    np.testing.assert_allclose(dots.get_facecolor()[0][:3], [int(COLOURS[1][k : k + 2], 16) / 255 for k in (1, 3, 5)])


def test_modes_that_the_update_hides_are_dots() -> None:
    frame = pd.DataFrame({"rule": "a", "eigenvalue": [0.5 + 0.1j, 0.2, 1.0], "strength": [2.0, 1e-9, np.inf]})
    large, small, lasting = plot_modes(frame).collections[0].get_sizes()
    assert large == lasting > 10 * small


def test_lines_are_the_columns(rules: dict[str, Coordinate]) -> None:
    grid = np.array([1.0, 2.0, 4.0])
    for plot, x, y, shown in (
        (plot_update_curves, "grad", "update", [-0.25, -0.5, -1.0]),
        (plot_schedule, "step", "effective_step", [0.25, 0.5, 1.0]),
        (plot_adaptation, "magnitude", "effective_step", [1.0, 2.0, 4.0]),
        (plot_stability, "curvature", "radius", [1.0, 2.0, 4.0]),
    ):
        line = plot(pd.DataFrame({"rule": "a", x: grid, y: grid})).get_lines()[0]
        np.testing.assert_allclose(line.get_xydata(), np.stack([grid, shown], 1))
    uphill = plot_adaptation(pd.DataFrame({"rule": "a", "magnitude": grid, "effective_step": [1.0, -1.0, 1.0]}))
    assert np.isnan(uphill.get_lines()[0].get_ydata()).tolist() == [False, True, False]


def test_all_four_panels_show_every_rule(rules: dict[str, Coordinate]) -> None:
    spectrum, *others = plot_optimizers(rules, scale=0.1, steps=4).axes
    assert [text.get_text() for text in spectrum.get_legend().get_texts()] == ["heavy"]
    for ax in others:
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "heavy"]
        assert [line.get_color() for line in ax.get_lines()] == list(COLOURS[:2])
