"""What predicts how well a learner learns: the size of its state, or the number of its parameters?

Shape letters: N groups (a learner of one size), B resamples.
"""

from itertools import cycle
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata

from metalearn.analysis.curves import COLOURS, MARKERS
from metalearn.analysis.transitions import measured
from metalearn.base import require_range

STATE, PARAMETERS = "model/state_size", "model/parameters"


class RankCorrelations(NamedTuple):
    """Spearman's rank correlations of a metric with the sizes of learners; ``str`` of it is one line for a report.

    ``low`` and ``high`` are the ends of the interval of ``difference``, state minus parameters.
    """

    state: float
    parameters: float
    difference: float
    low: float
    high: float
    groups: int
    seeds: int
    cells: int

    def __str__(self) -> str:
        sizes = f"with log state {self.state:.2f}, with log parameters {self.parameters:.2f}"
        basis = f"{self.groups} learners, {self.seeds} seeds, {self.cells} cells"
        return f"{sizes}, difference {self.difference:.2f} [{self.low:.2f}, {self.high:.2f}]; {basis}"


def rank_correlations(
    frame: pd.DataFrame, value: str, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> RankCorrelations:
    """Rank correlation of a metric with state size and with number of parameters, and their difference.

    Cells of one state size and one number of parameters are a group, whose mean over seeds counts once: seeds of a
    group share both sizes and tell nothing about these. The bootstrap draws groups, and seeds within each.

    Args:
        frame: of ``analysis.sweeps.read_sweep``, over learners of different kinds and sizes.
        value: column of a metric.
        confidence: probability of the interval, in (0, 1).
        resamples: of the bootstrap (>= 99).
        seed: of the resampling.

    Returns:
        Correlations in -1 ... 1; those of an axis on which all groups are equal are NaN, and so is then the difference.

    Raises:
        ValueError: for values out of range, a missing column, or fewer than four groups.
    """
    require_range("confidence", confidence, 0, 1)
    require_range("resamples", resamples, 99)
    cells = measured(frame, [value, STATE, PARAMETERS, "seed"])
    groups = [(sizes, own.to_numpy(float)) for sizes, own in cells.groupby([STATE, PARAMETERS])[value]]
    if len(groups) < 4:
        raise ValueError(f"the frame has {len(groups)} different learners; accepted: at least 4")
    sizes_N2 = np.array([sizes for sizes, _ in groups], dtype=float)
    mean_N = np.array([own.mean() for _, own in groups])
    state, parameters = (float(_spearman(mean_N[None], sizes_N2[None, :, axis])[0]) for axis in (0, 1))
    rng = np.random.default_rng(seed)
    drawn_BN = rng.integers(len(groups), size=(resamples, len(groups)))
    redrawn_BN = np.stack([own[rng.integers(len(own), size=(resamples, len(own)))].mean(1) for _, own in groups], 1)
    value_BN = np.take_along_axis(redrawn_BN, drawn_BN, axis=1)
    difference_B = _spearman(value_BN, sizes_N2[drawn_BN, 0]) - _spearman(value_BN, sizes_N2[drawn_BN, 1])
    known_B = difference_B[np.isfinite(difference_B)]  # a resample of one group has no correlation
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(known_B, ends).tolist() if len(known_B) else (float("nan"), float("nan"))
    counts = len(groups), len(set(cells["seed"])), len(cells)
    return RankCorrelations(state, parameters, state - parameters, low, high, *counts)


def plot_state_size(
    frame: pd.DataFrame, value: str, by: str = STATE, ax: Axes | None = None, architecture: str = "architecture"
) -> Axes:
    """Draw a metric against a size, on a logarithmic axis: light points per seed, a dark one for their mean.

    Args:
        frame: of ``read_sweep``.
        value: column of a metric.
        by: column of the size, ``model/state_size`` or ``model/parameters``; size zero stands at the left end.
        ax: where to draw; without it, a new figure.
        architecture: column that names the kind of learner, which has a colour and a marker.
    """
    ax = Figure(figsize=(5.4, 4.0), layout="constrained").subplots() if ax is None else ax
    cells = measured(frame, [value, by, architecture])
    sizes = cells[by].to_numpy(float)
    smallest = float(sizes[sizes > 0].min())
    zero = smallest / 4
    for (name, own), colour, marker in zip(
        cells.groupby(architecture, sort=False), cycle(COLOURS), cycle(MARKERS), strict=False
    ):
        shown = own.assign(size=own[by].where(own[by] > 0, zero))
        means = shown.pivot_table(index="size", values=value).loc[:, value]
        ax.plot(shown["size"], shown[value], marker, color=colour, markersize=4, alpha=0.35, markeredgewidth=0)
        ax.plot(
            means.index.to_numpy(),
            means.to_numpy(),
            marker=marker,
            color=colour,
            markersize=7,
            linewidth=1.0,
            label=name,
        )
    ax.set(xscale="log", xlabel=by.rsplit("/", 1)[-1].replace("_", " "))
    if (sizes == 0).any():
        ax.axvline(zero * 2, color="0.8", linewidth=1.0)
        below = {"xytext": (0, -6), "textcoords": "offset points", "ha": "center", "va": "top"}
        ax.annotate("0", (zero, 0), xycoords=("data", "axes fraction"), **below)
    ax.set_ylabel(value.rsplit("/", 1)[-1].replace("_", " "))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    return ax


def _spearman(a_BN: NDArray[np.float64], b_BN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation of each row; NaN where all values of a row are equal."""
    a, b = (rankdata(values, axis=1) - (a_BN.shape[1] + 1) / 2 for values in (a_BN, b_BN))
    scale = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return np.where(scale > 0, (a * b).sum(1) / np.where(scale > 0, scale, 1), np.nan)
