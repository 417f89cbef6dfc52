"""Meta-training by several estimators side by side: a table of where they end, and a figure of how they get there."""

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.analysis.curves import COLOURS, MARKERS


class Point(NamedTuple):
    """A measurement during meta-training."""

    problem: str
    metric: str
    method: str
    seed: int
    iteration: int  # estimates so far
    value: float


def summarise_meta_training(points: Iterable[Point]) -> pd.DataFrame:
    """Where each method began and ended: mean, least and greatest over seeds, a row per problem and method.

    Args:
        points: of one or more problems; each (problem, method, seed) with at least one.
    """
    frame = pd.DataFrame(list(points), columns=list(Point._fields))
    ordered = frame.sort_values("iteration", kind="stable").groupby(["problem", "metric", "method", "seed"], sort=False)
    runs = ordered.agg(start=("value", "first"), end=("value", "last"), iterations=("iteration", "last"))
    methods = runs.groupby(["problem", "metric", "method"], sort=False)
    table = methods.agg(
        seeds=("end", "size"),
        iterations=("iterations", "min"),
        start=("start", "mean"),
        end=("end", "mean"),
        least=("end", "min"),
        greatest=("end", "max"),
    )
    return table.reset_index()


def plot_meta_training(points: Iterable[Point], ax: Axes, target: float | None = None, log: bool = True) -> Axes:
    """Draw a metric against iterations: a line per method, the median over seeds, with a band from least to greatest.

    Args:
        points: of one problem.
        ax: where to draw.
        target: a value to reach, drawn as a dotted line.
        log: whether the vertical axis is logarithmic; values that are not finite are left out.

    Raises:
        ValueError: if the points are of several problems or metrics, or there are none.
    """
    frame = pd.DataFrame(list(points), columns=list(Point._fields))
    named = list(dict.fromkeys(zip(frame["problem"], frame["metric"], strict=True)))
    if len(named) != 1:
        raise ValueError(f"points are of (problem, metric) {named!r}; accepted: one")
    methods = list(dict.fromkeys(frame["method"]))
    for method, colour, marker in zip(methods, cycle(COLOURS), cycle(MARKERS), strict=False):
        values = frame.loc[frame["method"] == method].groupby("iteration")["value"].agg(["median", "min", "max"])
        line = {"color": colour, "marker": marker, "markevery": max(1, len(values) // 8), "markersize": 5}
        ax.plot(values.index, values["median"], label=method, linewidth=1.6, **line)
        ax.fill_between(values.index, values["min"], values["max"], color=colour, alpha=0.2, linewidth=0)
    if target is not None:
        ax.axhline(target, color="0.4", linestyle=":", linewidth=1.4, label="target")
    problem, metric = named[0]
    ax.set(title=problem, xlabel="meta-training iterations", ylabel=metric.replace("_", " "))
    ax.set_yscale("log" if log else "linear")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    return ax


def save_meta_training(
    points: Iterable[Point], path: str | Path, target: float | None = None, log: bool = True
) -> None:
    """Write the figure of ``plot_meta_training`` to ``path``; its suffix is the format, ``.png`` or ``.pdf``.

    Args:
        points: as in ``plot_meta_training``.
        path: of the file; its folder is made.
        target: as in ``plot_meta_training``.
        log: as in ``plot_meta_training``.
    """
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    ax = plot_meta_training(points, figure.subplots(), target, log)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
