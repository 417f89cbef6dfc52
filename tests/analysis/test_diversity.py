"""Learners that are planted between dMMSE and ridge are found where they were planted."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from metalearn.analysis.diversity import (
    Predictors,
    compared,
    plot_task_diversity,
    save_task_diversity,
    summarise_task_diversity,
    task_diversity_threshold,
)

POOLS = [1, 4, 16, 64, 256, 1024, 4096, None]


def planted(num_tasks, seed, share, stream="unseen", noise=0.0):
    """A learner that answers dMMSE + share · (ridge - dMMSE), and something that has nothing to do with either."""
    generator = torch.Generator().manual_seed(seed)
    y, ridge, dmmse, apart = torch.randn(4, 400, 6, generator=generator).double()
    apart -= (apart * (ridge - dmmse)).sum() / (ridge - dmmse).square().sum() * (ridge - dmmse)
    own = dmmse + share * (ridge - dmmse) + noise * apart
    return compared(num_tasks, seed, stream, y, own, ridge, None if num_tasks is None else dmmse)


@pytest.fixture
def points():
    """A transition at 2^5."""
    shares = {k: 1 / (1 + math.exp(5 - math.log2(k or 1e9))) for k in POOLS}
    return [planted(k, seed, shares[k], noise=0.2) for k in POOLS for seed in range(3)]


@pytest.mark.parametrize("share", [-0.2, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_towards_ridge_matches_the_planted_share(share, noise):
    point = planted(8, 0, share, noise=noise)
    assert point.towards_ridge == pytest.approx(share, abs=1e-9)
    if not noise:
        assert point.from_ridge == pytest.approx((1 - share) ** 2 * point.apart)
        assert point.from_dmmse == pytest.approx(share**2 * point.apart)


def test_without_a_pool_there_is_no_dmmse():
    point = planted(None, 0, 0.5)
    assert point.num_tasks == math.inf
    assert all(math.isnan(number) for number in (point.dmmse, point.from_dmmse, point.apart, point.towards_ridge))
    assert point.ridge == pytest.approx(2, rel=0.1)  # two independent normals


def test_finds_the_planted_threshold_on_unseen_tasks_alone(points):
    seen = [planted(point.num_tasks, point.seed, 1.0, stream="seen") for point in points if point.num_tasks < math.inf]
    found = task_diversity_threshold([*seen, *points])
    assert found.found and found.low <= 2**5 <= found.high and found.high / found.low < 8
    assert not task_diversity_threshold([planted(k, seed, 1.0) for k in POOLS for seed in range(3)]).found


def test_summary_matches_means_over_seeds(points):
    table = summarise_task_diversity(points)
    assert table["num_tasks"].tolist() == [1, 4, 16, 64, 256, 1024, 4096, math.inf] and set(table["seeds"]) == {3}
    for name in ("learner", "from_ridge", "towards_ridge"):
        own = [getattr(point, name) for point in points if point.num_tasks == 64]
        assert table.set_index("num_tasks")[name][64] == pytest.approx(sum(own) / 3)


def test_draws_every_predictor_and_the_threshold(points, tmp_path):
    axes = Figure().subplots(1, 2)
    for ax, quantity in zip(axes, ("error", "distance"), strict=True):
        plot_task_diversity(points, "unseen", ax, quantity)
        assert len(ax.get_legend_handles_labels()[1]) == 3
        assert [label.get_text() for label in ax.get_xticklabels()][-2:] == ["$2^{12}$", "∞"]
    with pytest.raises(ValueError, match="stream is 'seen', of which there is no point"):
        plot_task_diversity(points, "seen", axes[0])
    for chosen in (points, points[:3]):  # three points have no transition
        save_task_diversity(chosen, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_point_is_plain_numbers(points):
    assert all(isinstance(value, int | float | str) for value in points[0]) and isinstance(points[0], Predictors)
