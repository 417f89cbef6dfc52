"""Do seeds of one setting end in two clusters? Hartigan's dip test, and the clusters themselves."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from metalearn.analysis.curves import COLOURS
from metalearn.analysis.scales import scale_of, show_scale
from metalearn.analysis.transitions import measured
from metalearn.base import require_range

Array = NDArray[np.float64]

MIN_VALUES = 10
CLOSE = 0.25


class Bimodality(NamedTuple):
    """A dip test and the two clusters of the values; ``str`` of it is one line for a report.

    ``lower`` and ``upper`` are the means of the two clusters into which the values fall with least squared distance, whether
    or not they are bimodal; ``share_upper`` is the share of values in the upper one, and ``share_close`` that of values
    closer to the mean of their cluster than a given part of the distance between the two. ``p`` is NaN for too few values.
    """

    dip: float
    p: float
    values: int
    lower: float
    upper: float
    share_upper: float
    share_close: float

    def __str__(self) -> str:
        test = f"dip {self.dip:.3f}, p = {self.p:.2g}" if np.isfinite(self.p) else "too few values for a test"
        where = f"{self.lower:.3g} ({1 - self.share_upper:.0%}) and {self.upper:.3g} ({self.share_upper:.0%})"
        return f"{test}, n = {self.values}; clusters at {where}, {self.share_close:.0%} of values close to one"


def dip(values: ArrayLike) -> float:
    """Greatest distance between the values' distribution function and the nearest unimodal one: 1/(2 n) ... 1/4.

    Left of the mode a unimodal distribution function is convex, right of it concave. The interval of possible modes is shrunk
    as long as the greatest convex minorant and the least concave majorant in it are further apart than the function is from
    the nearest convex one to its left or concave one to its right.

    Args:
        values: (n,), at least two.

    Raises:
        ValueError: for fewer values, or values that are not finite.

    Source: Hartigan and Hartigan 1985, "The Dip Test of Unimodality", section 3.
    """
    sample = np.asarray(values, dtype=float)
    if sample.size < 2 or not np.isfinite(sample).all():
        raise ValueError(f"values are {sample.size} numbers, or not finite; accepted: at least 2 finite ones")
    points, counts = np.unique(sample, return_counts=True)
    above = np.cumsum(counts) / sample.size  # the distribution function, and its limits from the left
    below = above - counts / sample.size
    low, high, largest = 0, len(points) - 1, 1 / sample.size
    while high > low:
        span = np.arange(low, high + 1)
        convex, concave = low + _hull(points[span], below[span], 1), low + _hull(points[span], above[span], -1)
        minorant = np.interp(points[span], points[convex], below[convex])
        majorant = np.interp(points[span], points[concave], above[concave])
        widest, left, right = _modal_interval(convex, concave, (majorant - minorant)[np.r_[convex, concave] - low])
        if widest <= largest:
            break
        # Not at the ends themselves: a unimodal distribution function may jump at its mode.
        to_the_left, to_the_right = (above[span] - minorant)[: left - low], (majorant - below[span])[right - low + 1 :]
        largest = max(largest, *to_the_left, *to_the_right)
        if (left, right) == (low, high):
            break
        low, high = left, right
    return float(largest / 2)


def bimodality(
    values: ArrayLike, resamples: int = 2000, min_values: int = MIN_VALUES, close: float = CLOSE
) -> Bimodality:
    """Test whether values have more than one mode, and split them into two clusters.

    p is the share of samples of as many uniform numbers whose dip is at least as large; the uniform distribution is the
    unimodal one that is hardest to tell, so that the test errs on the side of one mode.

    Args:
        values: one per seed, (n,); n >= 2.
        resamples: of the uniform distribution (>= 99); they are the same in every call.
        min_values: fewer values get no p (>= 4).
        close: part of the distance between the clusters' means within which a value belongs clearly to one, in (0, 0.5].

    Raises:
        ValueError: for values out of range.

    Source: Hartigan and Hartigan 1985; for two clusters of trained learners Kirsch et al. 2022, section 4.
    """
    require_range("resamples", resamples, 99)
    require_range("min_values", min_values, 4)
    require_range("close", close, 0, 0.5)
    sample = np.sort(np.asarray(values, dtype=float))
    distance = dip(sample)
    p = float("nan")
    if len(sample) >= min_values:
        # Rounding must not tell apart dips that are equal, of which small samples have many.
        p = float(1 + np.count_nonzero(_uniform_dips(len(sample), resamples) >= distance - 1e-12)) / (resamples + 1)
    first = _best_split(sample)
    lower, upper = float(sample[:first].mean()), float(sample[first:].mean())
    nearest = np.r_[np.abs(sample[:first] - lower), np.abs(sample[first:] - upper)]
    share_close = float((nearest <= close * (upper - lower)).mean())
    return Bimodality(distance, p, len(sample), lower, upper, 1 - first / len(sample), share_close)


def bimodality_table(frame: pd.DataFrame, x: str, value: str, min_values: int = MIN_VALUES) -> pd.DataFrame:
    """``bimodality`` over seeds at each x that has two or more complete cells: one row each, for ``compare.write_table``."""
    groups = measured(frame, [x, value]).groupby(x, sort=False)[value]
    rows = [{x: place} | bimodality(own, min_values=min_values)._asdict() for place, own in groups if len(own) > 1]
    return pd.DataFrame(rows, columns=[x, *Bimodality._fields]).sort_values(x, ignore_index=True)


def plot_bimodality(
    frame: pd.DataFrame, x: str, value: str, ax: Axes | None = None, min_values: int = MIN_VALUES
) -> Axes:
    """Draw the value of every cell against x, with the number of seeds and the dip test's p above each x.

    Args:
        frame: of ``read_sweep``.
        x: column of an axis.
        value: column of a metric.
        ax: where to draw; without it, a new figure.
        min_values: fewer seeds get no p.
    """
    ax = Figure(figsize=(7.0, 4.2), layout="constrained").subplots() if ax is None else ax
    cells = measured(frame, [x, value])
    scale = scale_of(cells[x])
    for place, width, name in zip(scale.places, scale.highs - scale.lows, scale.values, strict=True):
        own = np.sort(cells.loc[cells[x] == name, value].to_numpy(float))
        # Side by side within a fifth of the column, so that equal values do not hide one another.
        aside = width * 0.2 * np.tile([0.0, -1.0, 1.0, -0.5, 0.5], 1 + len(own) // 5)[: len(own)]
        ax.plot(place + aside, own, "o", color=COLOURS[0], alpha=0.6, markersize=5, markeredgewidth=0)
        p = bimodality(own, min_values=min_values).p if len(own) > 1 else float("nan")
        text = f"n = {len(own)}" + (f"\np = {p:.2g}" if np.isfinite(p) else "")
        ax.annotate(
            text, (place, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize="x-small"
        )
    show_scale(ax, scale, x)
    ax.set_ylabel(value.rsplit("/", 1)[-1].replace("_", " "))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    return ax


def _hull(x: Array, y: Array, sign: int) -> NDArray[np.intp]:
    """Vertices of the greatest convex minorant (sign 1) or the least concave majorant (sign -1) of points in order of x."""
    kept: list[int] = []
    for new in range(len(x)):
        while len(kept) > 1:
            first, middle = kept[-2], kept[-1]
            turn = (y[middle] - y[first]) * (x[new] - x[first]) - (y[new] - y[first]) * (x[middle] - x[first])
            if sign * turn < 0:
                break
            kept.pop()
        kept.append(new)
    return np.array(kept)


def _modal_interval(convex: NDArray[np.intp], concave: NDArray[np.intp], apart: Array) -> tuple[float, int, int]:
    """Where minorant and majorant are furthest apart: the distance, and the vertices on either side of the mode."""
    widest = int(apart.argmax())
    if widest < len(convex):  # at a vertex of the minorant: the majorant's next vertex bounds the mode
        left = int(convex[widest])
        return float(apart[widest]), left, int(concave[np.searchsorted(concave, left)])
    right = int(concave[widest - len(convex)])
    return float(apart[widest]), int(convex[np.searchsorted(convex, right, side="right") - 1]), right


@lru_cache(maxsize=64)
def _uniform_dips(size: int, resamples: int) -> Array:
    rng = np.random.default_rng(size)
    return np.array([dip(sample) for sample in rng.random((resamples, size))])


def _best_split(sample: Array) -> int:
    """How many of the sorted values are in the lower of two clusters with least squared distance to their means."""
    sizes = np.arange(1, len(sample))
    sums = np.cumsum(sample - sample.mean())[:-1]
    return int(sizes[(np.square(sums) / (sizes * (len(sample) - sizes))).argmax()])
