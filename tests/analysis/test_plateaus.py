"""Planted plateaus are as long as planted; medians and ratios say what their seeds allow."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from metalearn.analysis.plateaus import (
    intervention_table,
    plateau_length,
    plateau_lengths,
    plot_interventions,
    plot_plateaus,
    smoothed,
)

CHANCE = math.log(5)


def test_matches_the_moving_average_of_pandas() -> None:
    losses = np.random.default_rng(0).normal(size=50)
    expected = pd.Series(losses).ewm(alpha=0.1, adjust=False).mean()
    np.testing.assert_allclose(smoothed(range(50), losses, 0.9), expected)


def test_smoothing_counts_steps_and_not_points() -> None:
    steps = np.array([0, 1, 5, 30, 100])
    step_down = np.array([2.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(smoothed(steps, step_down, 0.9)[1:], 1 + 0.9 ** steps[1:])
    with pytest.raises(ValueError, match="steps do not increase"):
        smoothed([0, 0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"smoothing is 1\.0"):
        smoothed([0, 1], [1.0, 1.0], 1.0)


@pytest.mark.parametrize("margin", [0.05, 0.2])
def test_length_of_a_planted_plateau_is_in_closed_form(margin: float) -> None:
    at, depth, steps = 200, 1.0, np.arange(600)
    losses = np.where(steps < at, CHANCE, CHANCE - depth)
    # k steps after the drop the average has lost depth (1 - .95^k).
    after = math.ceil(math.log(1 - margin / depth) / math.log(0.95) + 1e-9)
    assert plateau_length(steps, losses, CHANCE, margin) == at - 1 + after
    assert plateau_length(steps, losses, CHANCE, margin, smoothing=0) == at


def test_noise_and_dips_do_not_end_a_plateau() -> None:
    rng, steps = np.random.default_rng(1), np.arange(1000)
    losses = CHANCE + 0.05 * rng.normal(size=1000)
    losses[100] -= 0.5
    assert plateau_length(steps, losses, CHANCE) == math.inf
    assert plateau_length(steps, np.full(1000, np.nan), CHANCE) == math.inf, "a run that diverged never left"
    losses[700:] -= 0.5
    assert 700 <= plateau_length(steps, losses, CHANCE) <= 715


def planted(lengths: dict[str, list[float]]) -> pd.DataFrame:
    """Logs of every fifth step, in no order; the loss drops at the planted step."""
    steps = np.arange(0, 500, 5)
    parts = [
        pd.DataFrame({"cell": f"{variant}{seed}", "variant": variant, "seed": seed, "step": steps}).assign(
            value=np.where(steps < length, CHANCE, CHANCE - 1)
        )
        for variant, own in lengths.items()
        for seed, length in enumerate(own)
    ]
    return pd.concat(parts).sample(frac=1, random_state=0)


def test_lengths_of_all_cells() -> None:
    table = plateau_lengths(planted({"a": [100, 200], "b": [50, math.inf]}), CHANCE)
    by_cell = table.set_index("cell")["plateau"].to_dict()
    assert by_cell == {"a0": 100, "a1": 200, "b0": 50, "b1": math.inf}
    assert set(table["steps"]) == {495} and list(table.columns) == ["cell", "variant", "seed", "plateau", "steps"]


def table_of(lengths: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(variant, seed, length) for variant, own in lengths.items() for seed, length in enumerate(own)]
    return intervention_table(pd.DataFrame(rows, columns=["variant", "seed", "plateau"])).set_index("variant")


def test_recovers_a_planted_ratio() -> None:
    base = [900.0, 1000.0, 1100.0, 1300.0, 700.0]
    table = table_of({"base": base, "half": [length / 2 for length in base], "never": [800.0, *[math.inf] * 4]})
    assert table.loc["half", ["ratio", "ratio_low", "ratio_high"]].tolist() == pytest.approx([0.5] * 3)
    assert table.loc["half", "median"] == 500 and table.loc["half", "pairs"] == 5
    never = table.loc["never"]
    assert never["left"] == 1 and never["median"] == never["high"] == math.inf and never["low"] == 800
    assert np.isnan(never["ratio"]) and np.isnan(table.loc["base", "ratio"])


@pytest.mark.parametrize(("seeds", "rank", "coverage"), [(5, 1, 0.9375), (6, 1, 0.96875), (20, 6, 0.9586)])
def test_interval_of_the_median_has_its_exact_coverage(seeds: int, rank: int, coverage: float) -> None:
    values = [float(value) for value in range(1, seeds + 1)]
    row = table_of({"only": values}).loc["only"]
    assert (row["low"], row["high"]) == (rank, seeds + 1 - rank)
    assert row["coverage"] == pytest.approx(coverage, abs=1e-4)
    sides = binom(seeds, 0.5)
    assert row["coverage"] == pytest.approx(sides.cdf(seeds - rank) - sides.cdf(rank - 1))


def test_one_seed_has_a_median_and_no_interval() -> None:
    row = table_of({"only": [300.0]}).loc["only"]
    assert row["median"] == 300 and np.isnan(row["low"]) and np.isnan(row["coverage"])


def test_figures_show_every_run_and_every_variant() -> None:
    logs = planted({"a": [100, 200], "b": [50, math.inf]})
    ax = plot_plateaus(logs, "variant", CHANCE, zoom=0.2)
    dots = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    assert sorted(dots) == [50, 100, 200] and ax.get_ylim() == pytest.approx((CHANCE - 0.2, CHANCE + 0.2))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    table = intervention_table(plateau_lengths(logs, CHANCE))
    ax = plot_interventions(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a (2 of 2)", "b (1 of 2)"]
    assert "50 % interval" in ax.get_title(), "two seeds enclose the median with probability a half"
    assert [line.get_marker() for line in ax.get_lines()].count(">") == 1
