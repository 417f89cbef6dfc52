"""Planted laws of state and of parameters are told apart, and none is told where there is none."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from metalearn.analysis.state_size import PARAMETERS, STATE, plot_state_size, rank_correlations


def planted(law: str, seeds: int = 3) -> pd.DataFrame:
    """Eighteen learners whose two sizes are independent; the metric follows ``law``, a size or noise."""
    rng = np.random.default_rng(0)
    sizes = np.stack([4.0 ** np.arange(18), 3.0 ** rng.permutation(18)], 1)
    rows = []
    for index, (state, parameters) in enumerate(sizes):
        level = {STATE: np.log(state), PARAMETERS: np.log(parameters), "noise": 10 * rng.normal()}[law]
        rows += [(f"kind {index % 6}", state, parameters, seed, level + rng.normal()) for seed in range(seeds)]
    return pd.DataFrame(rows, columns=["architecture", STATE, PARAMETERS, "seed", "value"])


@pytest.mark.parametrize(("law", "sign"), [(STATE, 1), (PARAMETERS, -1)])
def test_tells_which_size_matters(law: str, sign: int) -> None:
    frame = planted(law)
    result = rank_correlations(frame, "value")
    assert sign * result.difference > 0.4 and min(sign * result.low, sign * result.high) > 0
    assert result.low < result.difference < result.high
    assert (result.groups, result.seeds, result.cells) == (18, 3, 54) and "18 learners, 3 seeds" in str(result)


def test_tells_nothing_where_neither_matters() -> None:
    result = rank_correlations(planted("noise"), "value")
    assert result.low < 0 < result.high and result.high - result.low > 0.3


def test_matches_scipy_on_the_means_over_seeds() -> None:
    frame = planted("noise")
    means = frame.groupby([STATE, PARAMETERS])["value"].mean().reset_index()
    result = rank_correlations(frame, "value", resamples=99)
    assert result.state == pytest.approx(spearmanr(np.log(means[STATE]), means["value"]).statistic)
    assert result.parameters == pytest.approx(spearmanr(np.log(means[PARAMETERS]), means["value"]).statistic)


def test_learners_of_one_size_have_no_correlation() -> None:
    frame = planted(STATE).assign(**{PARAMETERS: 7.0})
    result = rank_correlations(frame, "value", resamples=99)
    assert result.state > 0.9 and np.isnan(result.parameters) and np.isnan(result.low)
    with pytest.raises(ValueError, match="3 different learners; accepted: at least 4"):
        rank_correlations(frame.head(9), "value")


def test_draws_a_line_per_architecture_and_a_place_for_no_state() -> None:
    frame = planted(STATE)
    frame.loc[frame[STATE] == 1, STATE] = 0
    ax = plot_state_size(frame, "value")
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in named] == [f"kind {index}" for index in range(6)]
    points = np.concatenate([line.get_xydata() for line in named])
    means = frame.groupby(STATE)["value"].mean()
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(means))
    assert points[:, 0].min() == 1 and [text.get_text() for text in ax.texts] == ["0"]
