"""Fronts, found by comparing every pair by hand, and how they are drawn."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from metalearn.analysis.fronts import dominators, plot_front, save_front

COSTS = ["time", "memory", "loss"]


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [
        ("fast", 1.0, 8.0, 0.9),
        ("good", 9.0, 16.0, 0.5),
        ("slow", 10.0, 16.0, 0.5),
        ("light", 9.5, 4.0, 0.8),
        ("failed", 2.0, 8.0, np.nan),
    ]
    return pd.DataFrame(rows, columns=["name", *COSTS])


def test_matches_every_pair_by_hand(frame: pd.DataFrame) -> None:
    assert dominators(frame, COSTS) == [[], [], ["good"], [], ["fast"]]
    assert dominators(frame, ["time", "loss"]) == [[], [], ["good"], ["good"], ["fast"]]
    assert dominators(pd.concat([frame, frame.assign(name="twin")]), COSTS)[0] == []  # equals do not exclude each other
    values = np.random.default_rng(0).integers(0, 4, (40, 3)).astype(float)
    found = dominators(pd.DataFrame(values, columns=COSTS).assign(name=range(40)), COSTS)
    for i, row in enumerate(values):
        others = [j for j, other in enumerate(values) if all(other <= row) and any(other < row)]
        assert found[i] == others
    with pytest.raises(ValueError, match="0 rows"):
        dominators(frame.head(0), COSTS)


def test_draws_the_front_filled_and_the_rest_hollow(frame: pd.DataFrame, tmp_path) -> None:
    ax = plot_front(frame.assign(loss_low=0.4, loss_high=0.95), "time", "loss", COSTS)
    edge, *points = ax.get_lines()
    assert np.asarray(edge.get_xdata()).tolist() == [1.0, 9.0]
    hollow = {str(line.get_label()): to_hex(line.get_markerfacecolor()) == "#ffffff" for line in points}
    assert hollow == {"fast": False, "good": False, "slow": True, "light": False, "failed": True}
    assert len(ax.collections) == 5 and ax.get_xscale() == "log"
    save_front(frame, COSTS, tmp_path / "new" / "front.png")
    assert (tmp_path / "new" / "front.png").stat().st_size > 1000
