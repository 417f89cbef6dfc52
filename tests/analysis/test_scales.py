"""Axes of a sweep: distances, edges and labels."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from metalearn.analysis.scales import scale_of, show_scale


def test_numbers_stand_at_their_logarithms() -> None:
    scale = scale_of([64, 4, 16, 4])
    assert scale.values == [4, 16, 64] and scale.labels == ["4", "16", "64"]
    np.testing.assert_allclose(scale.places, [2, 4, 6])
    np.testing.assert_allclose(scale.lows, [1, 3, 5])
    np.testing.assert_allclose(scale.highs, [3, 5, 7])
    np.testing.assert_allclose(scale.place([16, 4]), [4, 2])


def test_infinity_has_a_column_of_its_own_behind_a_gap() -> None:
    scale = scale_of([2.0, np.inf, 1024.0, 512.0])
    assert scale.labels == ["$2^{1}$", "$2^{9}$", "$2^{10}$", "∞"]
    assert scale.lows[-1] > scale.highs[-2] and scale.lows[-1] < scale.places[-1] < scale.highs[-1]
    assert scale_of([np.inf]).labels == ["∞"]


def test_names_keep_their_order() -> None:
    scale = scale_of(["shift", "paper", "shift", "interleaved"])
    assert scale.values == ["shift", "paper", "interleaved"] and list(scale.places) == [0, 1, 2]
    assert scale_of([0, 1]).labels == ["0", "1"], "zero has no logarithm"
    with pytest.raises(ValueError, match="no values"):
        scale_of([])


def test_ticks_are_the_values() -> None:
    ax = Figure().subplots()
    show_scale(ax, scale_of([4, 8]), "num_tasks", vertical=True)
    assert list(ax.get_yticks()) == [2, 3] and ax.get_ylabel() == "number of tasks"
