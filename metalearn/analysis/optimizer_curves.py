"""Figures of what optimizers do: modes of memory, update curves, schedules, adaptation and stability, one line per rule.

Functions draw into the axes they are given, or into a figure of their own; nothing here touches pyplot's global state.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# (To pandas' stubs any selection of a frame may be a column, and any key of a group a single value.)

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.analysis.coordinates import Coordinate
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.optimizers import adaptation, autonomous, drive, fixed_point, linearise, modes, update_curve


def of_rules(rules: Mapping[str, Coordinate], measure: Callable[[Coordinate], pd.DataFrame]) -> pd.DataFrame:
    """What ``measure`` finds of each rule, below one another, with its name in the column "rule"."""
    frame = pd.concat([measure(each).assign(rule=name) for name, each in rules.items()], ignore_index=True)
    return frame.astype({"rule": pd.CategoricalDtype(list(rules))})  # so that a rule with no rows keeps its colour


def plot_modes(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the eigenvalues of ``modes`` in the complex plane; those that the update shows more of are larger.

    Args:
        frame: from ``modes`` by way of ``of_rules``. Modes with less than a thousandth of their rule's greatest finite
            strength are drawn as dots.
        ax: where to draw; without it, a new figure.
    """
    ax = _axes(ax)
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color="0.75", linewidth=0.9, zorder=1)
    for (name, part), colour in _lines(frame):
        values = part["eigenvalue"].to_numpy(dtype=complex)
        strength = part["strength"].to_numpy(dtype=float)
        finite = strength[np.isfinite(strength)]
        share = np.nan_to_num(strength / max(finite.max(initial=0.0), 1e-300), nan=0.0, posinf=1.0)
        size = np.where(share > 1e-3, 20 + 60 * share, 4)
        ax.scatter(values.real, values.imag, s=size, color=colour, alpha=0.7, linewidths=0, label=name, zorder=2)
    ax.set(xlabel="real part of the eigenvalue", ylabel="imaginary part", aspect="equal")
    return _finished(ax)


def plot_update_curves(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw minus the update of ``update_curve`` against the gradient, each rule's in units of its largest."""
    ax = _axes(ax)
    for (name, part), colour in _lines(frame):
        step = -part["update"] / max(part["update"].abs().max(), 1e-300)
        ax.plot(part["grad"], step, color=colour, linewidth=1.6, label=name)
    ax.set(xlabel="gradient", ylabel="step, relative to the largest")
    return _finished(ax)


def plot_schedule(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the effective step of ``autonomous`` against the number of updates, each rule's in units of its largest."""
    ax = _axes(ax)
    for (name, part), colour in _lines(frame):
        share = part["effective_step"] / max(part["effective_step"].abs().max(), 1e-300)
        ax.plot(part["step"], share, color=colour, linewidth=1.6, label=name)
    ax.set(xlabel="updates without a gradient", ylabel="effective step, relative to the largest")
    ax.set_ylim(bottom=0)
    return _finished(ax)


def plot_adaptation(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the effective step of ``adaptation`` against the size of recent gradients, both axes logarithmic.

    Effective steps that are not positive leave gaps.
    """
    ax = _axes(ax)
    for (name, part), colour in _lines(frame):
        positive = part["effective_step"].where(part["effective_step"] > 0)
        ax.plot(part["magnitude"], positive, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name)
    ax.set(xscale="log", yscale="log", xlabel="size of recent gradients", ylabel="effective step")
    return _finished(ax)


def plot_stability(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the spectral radius of ``stability`` against the curvature; above the dotted line runs diverge."""
    ax = _axes(ax)
    for (name, part), colour in _lines(frame):
        ax.plot(part["curvature"], part["radius"], color=colour, linewidth=1.6, label=name)
    ax.axhline(1.0, color="0.4", linestyle=":", linewidth=1.4)
    ax.set(xscale="log", xlabel="curvature", ylabel="spectral radius")
    return _finished(ax)


def plot_optimizers(rules: Mapping[str, Coordinate], scale: float = 1.0, steps: int = 100) -> Figure:
    """Modes, update curves, schedule and adaptation of several rules, measured as ``findings`` does, in four panels.

    Args:
        rules: by name, at most seven.
        scale: size of gradients that the rules meet, above 0.
        steps: updates of a run, at least 1.
    """
    figure = Figure(figsize=(10.5, 8.0), layout="constrained")
    (upper, curve), (schedule, adapted) = figure.subplots(2, 2)
    grads, sizes = np.linspace(-4 * scale, 4 * scale, 161), scale * np.geomspace(0.01, 100, 9)
    middle = steps // 2
    plot_modes(of_rules(rules, lambda rule: modes(linearise(rule, fixed_point(rule, 0.0, middle)))), upper)
    plot_update_curves(of_rules(rules, lambda rule: update_curve(rule, drive(rule, scale, middle), grads)), curve)
    plot_schedule(of_rules(rules, lambda rule: autonomous(rule, steps, scale)), schedule)
    plot_adaptation(of_rules(rules, lambda rule: adaptation(rule, sizes, steps)), adapted)
    return figure


def _lines(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, pd.DataFrame], str]]:
    """Name, rows and colour of each rule that has rows."""
    categorical = isinstance(frame["rule"].dtype, pd.CategoricalDtype)
    names = frame["rule"].cat.categories if categorical else frame["rule"].unique()
    colours = dict(zip(names, cycle(COLOURS), strict=False))
    for name, part in frame.groupby("rule", sort=False, observed=True):
        yield (str(name), part), colours[name]


def _axes(ax: Axes | None) -> Axes:
    return ax if ax is not None else Figure(figsize=(5.4, 3.8), layout="constrained").subplots()


def _finished(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax
