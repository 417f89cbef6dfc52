"""How long training sits on the plateau of guessing, and what an intervention does to it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from metalearn.analysis.compare import paired_comparison
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.scales import scale_of
from metalearn.base import require_range

Array = NDArray[np.float64]

MARGIN = 0.05
SMOOTHING = 0.95
_INSIDE = 12  # more lines than this are named beside the axes, where they hide no line
_RATIO = {"ratio": "difference", "ratio_low": "difference_low", "ratio_high": "difference_high"}


def smoothed(steps: ArrayLike, losses: ArrayLike, smoothing: float = SMOOTHING) -> Array:
    """Exponential moving average s_i = a s_{i-1} + (1 - a) loss_i with a = smoothing^(step_i - step_{i-1}), s_0 = loss_0.

    The decay is per training step, so that a loss that is logged every 25th step is hardly smoothed by .95.

    Args:
        steps: of the losses, increasing, (N,).
        losses: (N,).
        smoothing: weight that is left of the past after one step, in [0, 1).

    Raises:
        ValueError: if smoothing is out of range, or steps do not increase.
    """
    require_range("smoothing", smoothing, 0, math.nextafter(1, 0))
    steps, losses = np.asarray(steps, dtype=float), np.array(losses, dtype=float)
    if (np.diff(steps) <= 0).any():
        raise ValueError("steps do not increase; accepted: one loss for each of increasing steps")
    for place, weight in enumerate(smoothing ** np.diff(steps), start=1):
        losses[place] += weight * (losses[place - 1] - losses[place])
    return losses


def plateau_length(
    steps: ArrayLike, losses: ArrayLike, chance_loss: float, margin: float = MARGIN, smoothing: float = SMOOTHING
) -> float:
    """The first step at which the smoothed loss is below that of guessing by a margin; infinite if there is none.

    Args:
        steps: of the losses, increasing, (N,).
        losses: in nats, or in regression squared errors, (N,).
        chance_loss: ln K for K classes; in regression the targets' mean square.
        margin: in units of the loss (>= 0).
        smoothing: as in ``smoothed``.

    Raises:
        ValueError: for values out of range.
    """
    require_range("margin", margin, 0)
    left = np.flatnonzero(smoothed(steps, losses, smoothing) < chance_loss - margin)
    return float(np.asarray(steps, dtype=float)[left[0]]) if len(left) else float("inf")


def plateau_lengths(
    logs: pd.DataFrame, chance_loss: float, margin: float = MARGIN, smoothing: float = SMOOTHING
) -> pd.DataFrame:
    """``plateau_length`` of every cell.

    Args:
        logs: of ``analysis.sweeps.read_sweep_logs``, of a loss: cell, axes, seed, step, value.
        chance_loss: as in ``plateau_length``.
        margin: as in ``plateau_length``.
        smoothing: as in ``smoothed``.

    Returns:
        One row per cell: cell, its axes and seed, plateau (infinite where it was not left), steps (the last one logged).
    """
    rows = []
    for cell, own in logs.groupby("cell", sort=False):
        run = own.sort_values("step")
        place = {axis: run[axis].iloc[0] for axis in run.columns if axis not in ("cell", "step", "value")}
        length = plateau_length(run["step"], run["value"], chance_loss, margin, smoothing)
        rows.append({"cell": cell} | place | {"plateau": length, "steps": run["step"].iloc[-1]})
    return pd.DataFrame(rows)


def intervention_table(
    lengths: pd.DataFrame, by: str = "variant", baseline: str | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """Plateau lengths by variant: medians with exact intervals, and ratios to the baseline, paired by seed.

    A plateau that was not left counts as longer than all others in a median, and leaves the ratio unknown. The interval of the
    median is between two order statistics, the closest to the median that cover it with the wanted probability whatever
    the distribution. Few seeds have no such two: then it is from the least to the greatest, and ``coverage``, 1 - 2^(1-n), tells.

    Args:
        lengths: of ``plateau_lengths``, with a column that names the variant.
        by: that column.
        baseline: the variant that the others are compared with; the first one if not given.
        confidence: probability of the intervals, in (0, 1).

    Returns:
        One row per variant: variant, seeds, left (how many of them left the plateau), median, low, high, coverage, pairs (seeds
        shared with the baseline), ratio (geometric mean of length over the baseline's), ratio_low, ratio_high (bootstrap
        interval), p (two-sided paired t-test of log lengths), p_holm (corrected for the number of variants).

    Raises:
        ValueError: if the baseline is not a variant, or a variant has two plateaus of one seed.
    """
    logs = lengths.assign(value=np.log2(lengths["plateau"].where(np.isfinite(lengths["plateau"]))))
    compared = paired_comparison(logs, group=by, baseline=baseline, confidence=confidence).set_index("group")
    rows = []
    for variant, own in lengths.groupby(by, sort=False):
        values = np.sort(own["plateau"].to_numpy(float))
        counts = {by: variant, "seeds": len(values), "left": int(np.isfinite(values).sum())}
        against = {name: 2.0 ** compared.loc[variant, column] for name, column in _RATIO.items()}
        tests = {name: compared.loc[variant, name] for name in ("pairs", "p", "p_holm")}
        rows.append(counts | _median(values, confidence) | against | tests)
    columns = [by, "seeds", "left", "median", "low", "high", "coverage", "pairs", *_RATIO, "p", "p_holm"]
    return pd.DataFrame(rows).loc[:, columns]


def plot_plateaus(
    logs: pd.DataFrame,
    by: str,
    chance_loss: float,
    ax: Axes | None = None,
    smoothing: float = SMOOTHING,
    margin: float = MARGIN,
    zoom: float | None = None,
) -> Axes:
    """Draw the smoothed loss of every cell against the step, with a dot where it left the plateau.

    Args:
        logs: of ``read_sweep_logs``, of a loss.
        by: axis that colours the lines, from dark to light where it is of numbers.
        chance_loss: drawn as a dotted line.
        ax: where to draw; without it, a new figure.
        smoothing: as in ``smoothed``.
        margin: as in ``plateau_length``.
        zoom: show only this much of the loss above and below chance, where small biases are memorised; None shows all.
    """
    ax = Figure(figsize=(6.4, 4.0), layout="constrained").subplots() if ax is None else ax
    scale = scale_of(logs[by])
    colours = _colours(scale.values)
    for _, run in logs.sort_values("step").groupby("cell", sort=False):
        label = run[by].iloc[0]
        # The first step is 0, which a logarithmic axis lacks.
        steps, losses = run["step"].clip(lower=1).to_numpy(), smoothed(run["step"], run["value"], smoothing)
        ax.plot(steps, losses, color=colours[label], linewidth=1.0, alpha=0.8)
        left = np.flatnonzero(losses < chance_loss - margin)[:1]
        ax.plot(steps[left], losses[left], "o", color=colours[label], markersize=5, markeredgecolor="black")
    ax.axhline(chance_loss, color="0.4", linestyle=":", linewidth=1.4)
    for value, name in zip(scale.values, scale.labels, strict=True):
        ax.plot([], [], color=colours[value], label=name)
    ax.set(xscale="log", xlabel="training step", ylabel="loss")
    if zoom is not None:
        ax.set_ylim(chance_loss - zoom, chance_loss + zoom)
    title = by.replace("num_", "number of ").replace("_", " ")
    many = len(scale.values) > _INSIDE
    aside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {"ncols": 1 + len(scale.values) // 6}
    ax.legend(title=title, frameon=False, fontsize="small", **aside)
    _clean(ax, "y")
    return ax


def plot_interventions(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the median plateau of every variant with its interval; an arrow where these seeds do not bound it.

    Args:
        table: of ``intervention_table``; its first column names the variants.
        ax: where to draw; without it, a new figure.
    """
    variants = [str(name) for name in table.iloc[:, 0]]
    ax = Figure(figsize=(6.4, 1.2 + 0.45 * len(table)), layout="constrained").subplots() if ax is None else ax
    finite = table[["median", "low", "high"]].to_numpy(float)
    end = 1.5 * finite[np.isfinite(finite)].max() if np.isfinite(finite).any() else 1.0
    for row, (median, low, high) in enumerate(finite):
        colour = COLOURS[0] if np.isfinite(median) else "0.5"
        ax.plot([min(low, end), min(high, end)], [row, row], color=colour, linewidth=1.8)
        ax.plot(min(median, end), row, "o" if np.isfinite(median) else "", color=colour, markersize=7)
        if not np.isfinite(high):
            ax.plot(end, row, ">", color=colour, markersize=7)
    names = [
        f"{name} ({left} of {seeds})" for name, left, seeds in zip(variants, table["left"], table["seeds"], strict=True)
    ]
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    coverages = sorted({f"{100 * coverage:.3g}" for coverage in table["coverage"].dropna()})
    title = f"plateau: median and {'-'.join(dict.fromkeys((*coverages[:1], *coverages[-1:])))} % interval"
    ax.set(xscale="log", xlabel="steps on the plateau", title=f"{title}\n(seeds that left it)")
    _clean(ax, "x")
    return ax


def _median(values: Array, confidence: float) -> dict[str, float]:
    """Median of sorted values, and the order statistics that enclose that of their distribution."""
    count = len(values)
    # The r-th smallest and the r-th greatest enclose it unless fewer than r values are on one side.
    coverages = [1 - 2 * float(binom.cdf(r - 1, count, 0.5)) for r in range(1, count // 2 + 1)]
    if not coverages:
        return {"median": float(values[0]), "low": math.nan, "high": math.nan, "coverage": math.nan}
    r = max((place for place, coverage in enumerate(coverages) if coverage >= confidence), default=0)
    low, high = values[(count - 1) // 2], values[count // 2]
    median = float(low if low == high else (low + high) / 2)  # both may be infinite
    return {"median": median, "low": float(values[r]), "high": float(values[-1 - r]), "coverage": coverages[r]}


def _colours(values: Sequence[Any]) -> dict[Any, Any]:
    numbers = all(isinstance(value, int | float | np.number) for value in values)
    if not numbers and len(values) <= len(COLOURS):
        return dict(zip(values, COLOURS, strict=False))
    shades = colormaps["viridis" if numbers else "turbo"](Normalize(-0.5, len(values))(range(len(values))))
    return dict(zip(values, shades, strict=True))


def _clean(ax: Axes, grid: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="0.9")
    ax.set_axisbelow(True)
