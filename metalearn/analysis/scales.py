"""Axes of a sweep in figures: powers of two at equal distances, a place for infinitely many, names one after the other."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

_GAP = 0.35  # between the last number and infinity, in columns


class Scale(NamedTuple):
    """Where the values of an axis of a sweep stand: value i at ``places[i]``, from ``lows[i]`` to ``highs[i]``."""

    values: list[Any]
    places: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]
    labels: list[str]

    def place(self, values: Iterable[Any]) -> NDArray[np.float64]:
        """Places of values of the axis, in their order."""
        known = dict(zip(self.values, self.places, strict=True))
        return np.array([known[value] for value in values])


def scale_of(values: Iterable[Any]) -> Scale:
    """The scale of an axis: log2 of positive numbers, with infinity in a column of its own behind them; else one by one.

    Args:
        values: of the axis, repeated as they like; numbers are sorted, names stay in their order.

    Raises:
        ValueError: if there are no values.
    """
    different: list[Any] = list(dict.fromkeys(values))
    if not different:
        raise ValueError("an axis has no values; accepted: at least one")
    if not all(isinstance(v, int | float | np.number) and not isinstance(v, bool) and v > 0 for v in different):
        places = np.arange(len(different), dtype=float)
        return Scale(different, places, places - 0.5, places + 0.5, [str(value) for value in different])
    ordered = sorted(different)
    places, lows, highs = _log_places(np.array([v for v in ordered if np.isfinite(v)], dtype=float))
    if not np.isfinite(ordered[-1]):
        width = float(np.median(highs - lows)) if len(places) else 1.0
        start = (highs[-1] if len(places) else 0.0) + _GAP * width
        places, lows, highs = (
            np.append(old, start + share * width) for old, share in ((places, 0.5), (lows, 0.0), (highs, 1.0))
        )
    return Scale(ordered, places, lows, highs, _number_labels(ordered))


def show_scale(ax: Axes, scale: Scale, name: str, vertical: bool = False) -> None:
    """Label an axis with the values of the scale, and name it."""
    axis = ax.yaxis if vertical else ax.xaxis
    axis.set_ticks(list(scale.places), scale.labels)
    axis.set_label_text(name.replace("num_", "number of ").replace("_", " "))


def _log_places(numbers: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Log2 of the numbers, and the edges halfway between them."""
    places = np.log2(numbers)
    if len(places) < 2:
        return places, places - 0.5, places + 0.5
    middles = (places[1:] + places[:-1]) / 2
    edges = np.concatenate([[2 * places[0] - middles[0]], middles, [2 * places[-1] - middles[-1]]])
    return places, edges[:-1], edges[1:]


def _number_labels(ordered: list[float]) -> list[str]:
    finite = [value for value in ordered if np.isfinite(value)]
    powers = all(float(np.log2(value)).is_integer() for value in finite) and max(finite, default=0) >= 1000
    labels = [f"$2^{{{round(np.log2(value))}}}$" if powers else f"{value:g}" for value in finite]
    return labels + ["∞"] * (len(ordered) - len(finite))
