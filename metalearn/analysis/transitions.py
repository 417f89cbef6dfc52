"""Where a quantity turns from one level to another along an axis of a sweep: a fitted transition, or none.

Shape letters: X values of the axis, C cells, B resamples, G forms of the transition (centre x width).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from metalearn.base import require_range

Array = NDArray[np.float64]

_CENTRES = 161  # along the axis
_WIDTHS = 14
_SEEN_AT = 2  # values of the axis that show a level: one alone may lie on the way
_TIE = 1e-4  # of the variance: forms that explain as much but for this are not told apart
_TENTH_TO_NINE_TENTHS = 2 * np.log(9)  # of a logistic function of scale one


class CriticalNumber(NamedTuple):
    """Where a transition lies; ``str`` of it is one line for a report.

    ``estimate``, ``low`` and ``high`` are values of the axis, ``octaves`` are from a tenth to nine tenths of the
    change, ``before`` and ``after`` are the levels, ``p`` is that of no dependence at all. Without a transition
    (``found`` is false) these are NaN, but for p, and ``reason`` says why.
    """

    found: bool
    estimate: float
    low: float
    high: float
    octaves: float
    before: float
    after: float
    p: float
    seeds: int
    cells: int
    reason: str

    def __str__(self) -> str:
        basis = f"{self.seeds} seeds, {self.cells} cells"
        if not self.found:
            return f"none: {self.reason}; {basis}"
        interval = f"[{self.low:.4g}, {self.high:.4g}]" if np.isfinite(self.low) else "(one seed: no interval)"
        levels = f"from {self.before:.3g} to {self.after:.3g} within {self.octaves:.2g} octaves"
        return f"{self.estimate:.4g} {interval}, {levels}, p = {self.p:.2g}; {basis}"


class _Forms(NamedTuple):
    """Logistic functions that are tried: centre (log2), width (octaves), values at each x; mean and norm over the cells."""

    centre_G: Array
    width_G: Array
    form_GX: Array
    mean_G: Array
    spread_G: Array


class _Fit(NamedTuple):
    """Per resample: the centres (log2) between which fits are equal, the greatest width of these, and the levels."""

    low_B: Array
    high_B: Array
    width_B: Array
    before_B: Array
    after_B: Array
    seen_B: Array  # whether the values of x show both levels


def measured(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The complete cells of ``read_sweep``'s frame that have every one of ``columns``.

    Raises:
        ValueError: if the frame lacks a column; the message lists those that it has.
    """
    for column in columns:
        if column not in frame:
            raise ValueError(f"column is {column!r}; accepted: {', '.join(map(str, frame.columns))}")
    complete = frame if "state" not in frame else frame.loc[frame["state"] == "complete"]
    return complete.loc[complete.loc[:, list(columns)].notna().all(axis=1)]


def critical_number(
    frame: pd.DataFrame,
    x: str = "num_tasks",
    value: str = "validation/unseen_held_out/accuracy_last",
    min_change: float = 0.1,
    level: float = 0.01,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> CriticalNumber:
    """The transition of ``value`` along ``x``, by least squares: before + (after - before) / (1 + 81^((c - log2 x) / width)).

    Levels are free, so the transition may rise or fall. Infinite x is at the level after. There is none unless all three
    hold: a permutation test finds that value depends on x (p <= level); the levels differ by min_change; and both are seen,
    each at two values of x at least that have three quarters of the change before them or behind them.

    The interval is the percentile bootstrap over seeds, resampled within each x and spread by sqrt(n / (n - 1)), so that few
    seeds do not look certain. Where cells are too far apart to tell centres from one another, the estimate is the
    middle of these and the interval includes them all; the width is then the greatest that fits.

    Args:
        frame: of ``analysis.sweeps.read_sweep``; cells that are not complete, or lack the value, do not count.
        x: column of positive numbers, at least three different ones.
        value: column of a metric.
        min_change: between the levels, in units of the value (> 0).
        level: of the permutation test, in (0, 1).
        confidence: probability of the interval, in (0, 1).
        resamples: of the bootstrap and of the test (>= 99).
        seed: of the resampling; the same frame gives the same interval.

    Raises:
        ValueError: for values out of range, a frame without the columns, or x that is not positive.
    """
    require_range("level", level, 0, 1)
    require_range("confidence", confidence, 0, 1)
    require_range("resamples", resamples, 99)
    cells = measured(frame, [x, value, "seed"])
    x_C, value_C = cells[x].to_numpy(float), cells[value].to_numpy(float)
    if not (x_C > 0).all():
        raise ValueError(f"{x} has {x_C.min()}; accepted: positive numbers")
    seeds = len(set(cells["seed"]))
    x_X, place_C = np.unique(x_C, return_inverse=True)
    if np.isfinite(x_X).sum() < 3:
        return _none(f"{np.isfinite(x_X).sum()} finite values of {x}, at least 3 are needed", np.nan, seeds, len(cells))
    rng = np.random.default_rng(seed)
    in_x_XC = (place_C == np.arange(len(x_X))[:, None]).astype(float)
    forms = _forms(np.log2(x_X), in_x_XC.sum(1))
    fit = _fit(forms, in_x_XC, value_C[None])
    explained = _explained(forms, in_x_XC, value_C[None])
    shuffled_B = _explained(forms, in_x_XC, rng.permuted(np.tile(value_C, (resamples, 1)), axis=1))
    # Rounding must not let a permutation that leaves everything in its place count as less.
    p = float(1 + np.count_nonzero(shuffled_B >= explained - 1e-12)) / (resamples + 1)
    change = float(fit.after_B[0] - fit.before_B[0])
    if p > level:
        return _none(f"{value} is not seen to depend on {x} (p = {p:.2g})", p, seeds, len(cells))
    if abs(change) < min_change:
        return _none(f"the levels differ by {abs(change):.2g} < {min_change:g}", p, seeds, len(cells))
    if not fit.seen_B[0]:
        return _none(f"the values of {x} do not show both levels", p, seeds, len(cells))
    low, high = _interval(forms, fit, in_x_XC, value_C, confidence, resamples, rng)
    middle = float(2 ** ((fit.low_B[0] + fit.high_B[0]) / 2))
    ends = float(fit.width_B[0]), float(fit.before_B[0]), float(fit.after_B[0])
    return CriticalNumber(True, middle, low, high, *ends, p, seeds, len(cells), "")


def critical_table(
    frame: pd.DataFrame, x: str, values: Sequence[str], by: str | None = None, **options: Any
) -> pd.DataFrame:
    """``critical_number`` of several metrics, for each value of the column ``by``: one row each, for ``compare.write_table``.

    Args:
        frame: of ``read_sweep``.
        x: column of the axis.
        values: columns of metrics.
        by: column of another axis, or None for all cells together.
        options: of ``critical_number``.
    """
    parts = [(None, frame)] if by is None else list(frame.groupby(by, sort=True, dropna=False))
    rows = []
    for (label, part), value in itertools.product(parts, values):
        place = {} if by is None else {by: label}
        rows.append(place | {"metric": value} | critical_number(part, x, value, **options)._asdict())
    return pd.DataFrame(rows)


def _none(reason: str, p: float, seeds: int, cells: int) -> CriticalNumber:
    nan = float("nan")
    return CriticalNumber(False, nan, nan, nan, nan, nan, nan, p, seeds, cells, reason)


def _interval(
    forms: _Forms,
    fit: _Fit,
    in_x_XC: Array,
    value_C: Array,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Ends of the bootstrap interval; NaN where no x has two cells."""
    places = [np.flatnonzero(own_C) for own_C in in_x_XC]
    if max(map(len, places)) < 2:
        return float("nan"), float("nan")
    value_BC = np.tile(value_C, (resamples, 1))
    for own in places:
        if (count := len(own)) > 1:
            drawn = value_C[own][rng.integers(count, size=(resamples, count))]
            value_BC[:, own] = value_C[own].mean() + np.sqrt(count / (count - 1)) * (drawn - value_C[own].mean())
    drawn = _fit(forms, in_x_XC, value_BC)
    low = min(float(np.quantile(drawn.low_B, (1 - confidence) / 2)), float(fit.low_B[0]))
    high = max(float(np.quantile(drawn.high_B, (1 + confidence) / 2)), float(fit.high_B[0]))
    return 2**low, 2**high


def _forms(log_X: Array, counts_X: Array) -> _Forms:
    """The grid of forms, for so many cells at each x; widths vary fastest."""
    finite_X = log_X[np.isfinite(log_X)]
    gap, span = np.diff(finite_X).min(), finite_X[-1] - finite_X[0]
    centres, widths = np.linspace(finite_X[0], finite_X[-1], _CENTRES), np.geomspace(gap / 20, 4 * span, _WIDTHS)
    centre_G, width_G = np.repeat(centres, _WIDTHS), np.tile(widths, _CENTRES)
    form_GX = expit(_TENTH_TO_NINE_TENTHS * (log_X - centre_G[:, None]) / width_G[:, None])
    mean_G = form_GX @ counts_X / counts_X.sum()
    spread_G = np.sqrt((form_GX - mean_G[:, None]) ** 2 @ counts_X)
    return _Forms(centre_G, width_G, form_GX, mean_G, np.maximum(spread_G, 1e-12))


def _correlations(forms: _Forms, in_x_XC: Array, value_BC: Array) -> Array:
    """Correlation (B, G) of the values with every form; 0 where all values are equal."""
    centred_BC = value_BC - value_BC.mean(1, keepdims=True)
    norm_B1 = np.maximum(np.sqrt(np.square(centred_BC).sum(1, keepdims=True)), 1e-12)
    unit_GX = (forms.form_GX - forms.mean_G[:, None]) / forms.spread_G[:, None]
    return (centred_BC / norm_B1) @ in_x_XC.T @ unit_GX.T


def _explained(forms: _Forms, in_x_XC: Array, value_BC: Array) -> Array:
    """Share of the variance that the best form explains: (B,)."""
    return np.square(np.abs(_correlations(forms, in_x_XC, value_BC)).max(1))


def _fit(forms: _Forms, in_x_XC: Array, value_BC: Array) -> _Fit:
    """The best form of each resample; its levels are in closed form."""
    correlation_BG = np.abs(_correlations(forms, in_x_XC, value_BC))
    best_B = correlation_BG.argmax(1)
    least_B = np.sqrt(np.maximum(np.square(correlation_BG[np.arange(len(best_B)), best_B]) - _TIE, 0))
    equal_BCW = (correlation_BG >= least_B[:, None]).reshape(len(best_B), _CENTRES, _WIDTHS)
    centres_BC, widths_BW = (np.any(equal_BCW, axis=axis) for axis in (2, 1))
    form_BX = forms.form_GX[best_B]
    mean_B, spread_B = forms.mean_G[best_B], forms.spread_G[best_B]
    change_B = ((value_BC @ in_x_XC.T) * (form_BX - mean_B[:, None])).sum(1) / np.square(spread_B)
    before_B = value_BC.mean(1) - change_B * mean_B
    return _Fit(
        low_B=forms.centre_G[::_WIDTHS][centres_BC.argmax(1)],
        high_B=forms.centre_G[::_WIDTHS][::-1][centres_BC[:, ::-1].argmax(1)],
        width_B=forms.width_G[:_WIDTHS][::-1][widths_BW[:, ::-1].argmax(1)],
        before_B=before_B,
        after_B=before_B + change_B,
        seen_B=((form_BX <= 0.25).sum(1) >= _SEEN_AT) & ((form_BX >= 0.75).sum(1) >= _SEEN_AT),
    )
