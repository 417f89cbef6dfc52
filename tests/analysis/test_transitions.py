"""Planted transitions are found where they are, and nowhere else."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit
from scipy.special import expit

from metalearn.analysis.transitions import CriticalNumber, critical_number, critical_table, measured

STEEP = 2 * np.log(9)


def planted(
    rng: np.random.Generator,
    centre: float = 6.3,
    octaves: float = 1.0,
    before: float = 0.2,
    after: float = 0.8,
    seeds: int = 5,
    noise: float = 0.03,
    logs: tuple[float, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10),
) -> pd.DataFrame:
    rows = [
        (2.0**log, seed, before + (after - before) * expit(STEEP * (log - centre) / octaves) + noise * rng.normal())
        for seed in range(seeds)
        for log in logs
    ]
    return pd.DataFrame(rows, columns=["num_tasks", "seed", "value"]).assign(state="complete")


def found(frame: pd.DataFrame, resamples: int = 199) -> CriticalNumber:
    return critical_number(frame, value="value", resamples=resamples)


@pytest.mark.parametrize("setting", [{}, {"octaves": 0.1}, {"before": 0.8, "after": 0.2}, {"seeds": 3, "octaves": 3.0}])
def test_interval_covers_a_planted_transition(setting: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    results = [found(planted(rng, **setting)) for _ in range(20)]
    assert all(result.found for result in results)
    covered = [result.low <= 2**6.3 <= result.high for result in results]
    assert sum(covered) >= 16, "a 95 % interval misses in more than four of twenty with probability .003"
    middle = np.mean([np.log2(result.estimate) for result in results])
    assert abs(middle - 6.3) < 0.25, "the planted centre lies between two numbers of tasks, an octave apart"


def test_matches_scipy_curve_fit() -> None:
    frame = planted(np.random.default_rng(1), octaves=1.7)
    result = found(frame)
    logistic = lambda x, c, w, low, high: low + (high - low) * expit(STEEP * (x - c) / w)  # noqa: E731
    expected, _ = curve_fit(logistic, np.log2(frame["num_tasks"]), frame["value"], p0=(6, 1, 0.2, 0.8))
    assert np.log2(result.estimate) == pytest.approx(expected[0], abs=0.04)
    assert (result.before, result.after) == pytest.approx(expected[2:], abs=0.01)
    assert result.octaves == pytest.approx(expected[1], rel=0.5), "twelve widths are tried"


def test_finds_none_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    results = [found(planted(rng, after=0.2, noise=0.1)) for _ in range(40)]
    assert sum(result.found for result in results) <= 3, "of 40 at level .01"
    assert sum(result.p <= 0.05 for result in results) <= 7
    assert all(np.isnan(result.estimate) and result.reason for result in results if not result.found)
    assert str(results[0]).startswith("none: value is not seen to depend on num_tasks")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"after": 0.25, "noise": 0.001}, "the levels differ by 0.05 < 0.1"),
        ({"centre": 10}, "do not show both levels"),
        ({"octaves": 30}, "do not show both levels"),
        ({"logs": (2, 10)}, "2 finite values of num_tasks"),
    ],
)
def test_says_why_there_is_none(setting: dict[str, float], reason: str) -> None:
    result = found(planted(np.random.default_rng(3), **setting))
    assert not result.found and reason in str(result)


def test_interval_has_all_that_the_grid_cannot_tell() -> None:
    result = found(planted(np.random.default_rng(4), centre=6.5, octaves=0.01, noise=0.0))
    assert 2**6 < result.low < 2**6.2 and 2**6.8 < result.high < 2**7
    assert result.estimate == pytest.approx(2**6.5, rel=0.02)


def test_infinitely_many_tasks_are_at_the_level_after() -> None:
    frame = planted(np.random.default_rng(5), logs=(2, 4, 6, 8, 10, np.inf))
    result = found(frame)
    assert result.found and result.cells == 30 and result.after == pytest.approx(0.8, abs=0.03)
    finite = found(frame[np.isfinite(frame["num_tasks"])])
    assert np.log2(result.estimate) == pytest.approx(np.log2(finite.estimate), abs=0.2)


def test_one_seed_has_no_interval() -> None:
    result = found(planted(np.random.default_rng(6), seeds=1))
    assert result.found and np.isnan(result.low) and result.seeds == 1 and "no interval" in str(result)


def test_only_complete_cells_with_a_value_count() -> None:
    frame = planted(np.random.default_rng(7))
    clean = found(frame)
    spoilt = pd.concat([frame, frame.assign(state="failed", value=0.0), frame.assign(value=np.nan)])
    assert found(spoilt) == clean and clean.cells == 45 and clean.seeds == 5
    with pytest.raises(ValueError, match="column is 'other'; accepted: num_tasks"):
        measured(frame, ["other"])
    with pytest.raises(ValueError, match=r"num_tasks has 0\.0; accepted: positive"):
        found(frame.assign(num_tasks=0.0))


def test_table_has_a_row_for_every_place_and_metric() -> None:
    rng = np.random.default_rng(8)
    frame = pd.concat([planted(rng, centre=centre).assign(width=width) for width, centre in ((8, 7.0), (64, 5.0))])
    table = critical_table(frame.assign(flat=0.2), "num_tasks", ["value", "flat"], by="width", resamples=199)
    assert list(table["width"]) == [8, 8, 64, 64] and list(table["found"]) == [True, False, True, False]
    np.testing.assert_allclose(np.log2(table["estimate"].dropna()), [7.0, 5.0], atol=0.2)
