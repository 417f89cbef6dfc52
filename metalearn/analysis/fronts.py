"""Pareto fronts: what nothing else is at least as good as in every respect.

Frames have a row for each thing that is compared: a column with its name and columns of costs, all of which are to be small.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from metalearn.analysis.curves import COLOURS, MARKERS

SHAPES = (*MARKERS, "<", ">")  # more than colours, so that the two together do not come again


def dominators(frame: pd.DataFrame, costs: Sequence[str], name: str = "name") -> list[list[str]]:
    """For each row the names of those that are no worse in any cost and better in one; empty on the front.

    A cost that is not a number is worse than all numbers.

    Raises:
        ValueError: without rows or costs.
    """
    if not len(frame) or not costs:
        raise ValueError(f"the frame has {len(frame)} rows, costs is {list(costs)!r}; accepted: at least one of each")
    values = _costs(frame, costs)
    names, above = list(frame[name]), []
    for own in values:
        better = (values <= own).all(1) & (values < own).any(1)
        above.append([names[i] for i in np.flatnonzero(better)])
    return above


def plot_front(
    frame: pd.DataFrame, x: str, y: str, costs: Sequence[str], name: str = "name", ax: Axes | None = None
) -> Axes:
    """Draw two costs against each other: what is on the front of all ``costs`` filled, what is not hollow.

    A dotted line is the front of the two costs drawn. Where the frame has ``<y>_low`` and ``<y>_high``, a bar goes from one
    to the other.

    Args:
        frame: a row for each thing.
        x: column of a cost above 0, on a logarithmic axis.
        y: column of another one.
        costs: columns by which things are on the front, x and y among them.
        name: column of the legend's names.
        ax: where to draw; without it, a new figure.
    """
    ax = Figure(figsize=(5.4, 4.0), layout="constrained").subplots() if ax is None else ax
    edge = frame.loc[[not others for others in dominators(frame, [x, y], name)]].sort_values(x)
    ax.step(edge[x], edge[y], where="post", color="0.5", linestyle=":", linewidth=1.2)
    above = dominators(frame, costs, name)
    for (_, row), others, colour, marker in zip(frame.iterrows(), above, cycle(COLOURS), cycle(SHAPES), strict=False):
        if f"{y}_low" in frame and np.isfinite([row[f"{y}_low"], row[f"{y}_high"]]).all():
            ax.vlines(row[x], row[f"{y}_low"], row[f"{y}_high"], color=colour, alpha=0.5, linewidth=1.4)
        style = {"markeredgecolor": colour, "markerfacecolor": "white" if others else colour, "markersize": 8}
        ax.plot(row[x], row[y], marker, linestyle="none", label=row[name], **style)
    ax.set(xscale="log", yscale="log", xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    return ax


def save_front(frame: pd.DataFrame, costs: Sequence[str], path: str | Path, name: str = "name") -> None:
    """Write a figure with the last cost against each of the others; the suffix of ``path`` is the format, ``.png`` or ``.pdf``."""
    *others, y = costs
    figure = Figure(figsize=(4.6 * len(others), 4.2), layout="constrained")
    panels = figure.subplots(1, len(others), sharey=True, squeeze=False)[0]
    for panel, x in zip(panels, others, strict=True):
        plot_front(frame, x, y, costs, name, panel)
        panel.label_outer()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _costs(frame: pd.DataFrame, costs: Sequence[str]) -> NDArray[np.float64]:
    values = frame[list(costs)].to_numpy(float)
    return np.where(np.isnan(values), np.inf, values)
