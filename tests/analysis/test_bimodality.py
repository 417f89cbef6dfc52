"""The dip test against its definition, a peer's numbers and its own level; planted clusters."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog

from metalearn.analysis.bimodality import bimodality, bimodality_table, dip, plot_bimodality


def dip_by_definition(values: np.ndarray) -> float:
    """Least d with a unimodal distribution function within d everywhere: a linear program for each place of the mode."""
    points, counts = np.unique(values, return_counts=True)
    above = np.cumsum(counts) / len(values)
    below = above - counts / len(values)
    return max(0.5 / len(values), min(_distance(points, below, above, mode) for mode in range(len(points))))


def _distance(points: np.ndarray, below: np.ndarray, above: np.ndarray, mode: int) -> float:
    # Variables: the function at points up to the mode (there its limit from the left), at points from the mode on, and d.
    place = np.r_[points[: mode + 1], points[mode:]]
    least, most = (
        np.r_[above[:mode], below[mode], above[mode:]],
        np.r_[below[: mode + 1], above[mode], below[mode + 1 :]],
    )
    size, rows, bounds = len(place), [], []

    def at_most(terms: dict[int, float], bound: float) -> None:
        row = np.zeros(size + 1)
        for index, factor in terms.items():
            row[index] += factor
        rows.append(row)
        bounds.append(bound)

    for i in range(size):
        at_most({i: -1, size: -1}, -least[i])
        at_most({i: 1, size: -1}, most[i])
    for i in range(size - 1):
        at_most({i: 1, i + 1: -1}, 0)
    for first in [*range(mode - 1), *range(mode + 1, size - 2)]:
        left, right = place[first + 1] - place[first], place[first + 2] - place[first + 1]
        sign = 1 if first < mode else -1  # convex, then concave
        at_most({first: -sign / left, first + 1: sign / left + sign / right, first + 2: -sign / right}, 0)
    result = linprog(np.eye(size + 1)[size], np.array(rows), bounds, bounds=[(0, 1)] * (size + 1))
    return result.fun


def test_matches_the_definition() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.random(size) for size in (2, 5, 9, 14)]
    samples += [np.r_[rng.normal(size=6), 4 + rng.normal(size=5)], rng.exponential(size=12)]
    samples += [rng.integers(0, high, 10).astype(float) for high in (2, 3, 6)]
    for sample in samples:
        assert dip(sample) == pytest.approx(dip_by_definition(sample), abs=1e-9), sample


def test_matches_a_peer() -> None:
    # diptest 0.12: dip and p (table of Hartigan and Hartigan, interpolated) of these twenty numbers.
    result = bimodality(np.r_[np.linspace(0, 1, 12), np.linspace(3, 4, 8)])
    assert result.dip == pytest.approx(0.13333333333333333) and result.p == pytest.approx(0.0021, abs=0.003)


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_rejects_one_mode_no_more_often_than_its_level(draw: str) -> None:
    rng = np.random.default_rng(1)
    rejected = sum(bimodality(getattr(rng, draw)(size=20)).p <= 0.05 for _ in range(200))
    low, high = (3, 19) if draw == "uniform" else (0, 6)  # .998 of Binomial(200, .05); the normal law has fewer
    assert low <= rejected <= high


def test_finds_planted_clusters() -> None:
    rng = np.random.default_rng(2)
    for share in (6, 10, 14):
        values = rng.permutation(np.r_[rng.normal(0.2, 0.03, 20 - share), rng.normal(0.8, 0.03, share)])
        result = bimodality(values)
        assert result.p < 0.02 and result.values == 20
        assert (result.lower, result.upper) == pytest.approx((0.2, 0.8), abs=0.03)
        assert result.share_upper == pytest.approx(share / 20) and result.share_close == 1
    between = bimodality([0.0] * 9 + [1.0] * 9 + [0.4] * 2)
    assert between.share_close == pytest.approx(0.9), "the mean of the lower cluster is at .073"


def test_few_values_get_no_p() -> None:
    result = bimodality([0.2, 0.2, 0.8, 0.8])
    assert np.isnan(result.p) and "too few values for a test, n = 4" in str(result)
    with pytest.raises(ValueError, match="at least 2"):
        dip([0.2])
    with pytest.raises(ValueError, match="not finite"):
        dip([0.2, np.nan])


def test_tests_every_number_of_tasks() -> None:
    rng = np.random.default_rng(3)
    parts = {
        4.0: rng.normal(0.2, 0.02, 20),
        64.0: np.r_[rng.normal(0.2, 0.02, 9), rng.normal(0.8, 0.02, 11)],
        np.inf: [0.8] * 3,
    }
    rows = [(tasks, seed, value) for tasks, values in parts.items() for seed, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["num_tasks", "seed", "value"])
    table = bimodality_table(frame, "num_tasks", "value")
    assert list(table["num_tasks"]) == [4, 64, np.inf] and list(table["values"]) == [20, 20, 3]
    assert table["p"][0] > 0.1 and table["p"][1] < 0.01 and np.isnan(table["p"][2])
    ax = plot_bimodality(frame, "num_tasks", "value")
    assert sorted(height for line in ax.get_lines() for height in line.get_ydata()) == sorted(frame["value"])
    notes = [text.get_text() for text in ax.texts]
    assert notes[0].startswith("n = 20\np = ") and notes[2] == "n = 3"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "64", "∞"]
