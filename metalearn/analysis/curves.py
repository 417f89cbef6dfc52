"""Figures of runs: accuracy against number of examples seen, and metrics against training steps.

Functions draw into the axes they are given, or into a figure of their own; nothing here touches pyplot's global state.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.analysis.runs import quantity_of, require_metric, require_single_run

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers tell the methods apart in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKED_POINTS = 16  # a line with more points than this is drawn without markers


def plot_learning_curves(frame: pd.DataFrame, ax: Axes | None = None, chance: float | None = None) -> Axes:
    """Draw accuracy or squared error against number of examples seen: a line per method, with a band of ± 1 standard error.

    Args:
        frame: one run's table, from ``analysis.runs.read_evaluation``; with ``ax``, of one stream.
        ax: where to draw; without it, a new figure with a panel per stream, side by side, on one accuracy axis.
        chance: accuracy of guessing, drawn as a dotted line (0 ... 1).

    Returns:
        The axes; of a new figure the first panel, and ``axes.figure.axes`` are all of them.

    Raises:
        ValueError: if the frame is empty, holds several runs, or several streams for one ``ax``.
    """
    require_single_run(frame)
    streams = list(dict.fromkeys(frame["stream"]))
    if not streams or (ax is not None and len(streams) > 1):
        raise ValueError(f"the evaluation has streams {streams!r}; accepted: one for given axes, one or more without")
    if ax is not None:
        _draw_stream(frame, ax, _styles(frame), chance)
        ax.legend(frameon=False)
        return ax
    figure = Figure(figsize=(max(4.4, 3.0 * len(streams) + 0.6), 3.8), layout="constrained")
    panels = figure.subplots(1, len(streams), sharey=True, squeeze=False)[0]
    for panel, stream in zip(panels, streams, strict=True):
        _draw_stream(frame.loc[frame["stream"] == stream], panel, _styles(frame), chance)
        panel.label_outer()
    _legend_below(panels, ncols=1 + len(streams))
    return panels[0]


def save_learning_curves(
    frame: pd.DataFrame, path: str | Path, title: str | None = None, chance: float | None = None
) -> None:
    """Write the figure of ``plot_learning_curves`` to ``path``; its suffix is the format, ``.png`` or ``.pdf``."""
    figure = plot_learning_curves(frame, chance=chance).get_figure(root=True)
    assert figure is not None
    if title is not None:
        figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_training(frame: pd.DataFrame, metrics: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw logged metrics against the training step: a colour per metric, a line per run.

    Args:
        frame: the table of ``analysis.runs.read_run``, or several of them below one another.
        metrics: names of the metrics, which share the vertical axis.
        ax: where to draw; without it, a new figure.

    Raises:
        ValueError: if the frame lacks a metric; the message lists those that it has.
    """
    for metric in metrics:
        require_metric(frame, metric)
    given = ax is not None
    ax = ax if given else Figure(figsize=(5.6, 3.4 + 0.25 * len(metrics)), layout="constrained").subplots()
    for metric, colour in zip(metrics, cycle(COLOURS), strict=False):
        _draw_metric(frame.loc[frame["metric"] == metric], ax, metric, colour)
    endings = dict.fromkeys(metric.rsplit("/", 1)[-1].replace("_", " ") for metric in metrics)
    ax.set(xlabel="training step", ylabel=", ".join(endings))
    _clean(ax)
    if given:
        ax.legend(frameon=False)
    else:
        _legend_below([ax], ncols=1)
    return ax


def _styles(frame: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method, the same in all streams."""
    methods = dict.fromkeys(frame["method"])
    return {method: (colour, marker) for method, colour, marker in zip(methods, cycle(COLOURS), cycle(MARKERS))}


def _draw_stream(frame: pd.DataFrame, ax: Axes, styles: dict[str, tuple[str, str]], chance: float | None) -> None:
    quantity = quantity_of(frame)
    for order, (method, (colour, marker)) in enumerate(styles.items()):
        curve = frame.loc[frame["method"] == method].sort_values("position")
        position, score, error = (curve[name] for name in ("position", quantity, "standard_error"))
        line = {"color": colour, "linewidth": 1.8, "marker": marker if len(curve) <= MARKED_POINTS else None}
        # The first method is the learner, which the others must not cover.
        ax.plot(position, score, markersize=5, label=method, zorder=3 - 0.01 * order, **line)
        ax.fill_between(position, score - error, score + error, color=colour, alpha=0.2, linewidth=0)
    if chance is not None:
        ax.axhline(chance, color="0.4", linestyle=":", linewidth=1.4, label="chance")
    title = str(frame["stream"].iloc[0]).replace("_", " ")
    ax.set(title=title, xlabel="examples seen", ylabel=quantity.replace("_", " "))
    ax.set_ylim(0, 1.02 if quantity == "accuracy" else None)
    _clean(ax)


def _draw_metric(frame: pd.DataFrame, ax: Axes, metric: str, colour: str) -> None:
    for number, (_, run) in enumerate(frame.groupby("run", sort=False)):
        marker = "o" if len(run) <= MARKED_POINTS else None
        label = None if number else metric
        ax.plot(run["step"], run["value"], color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)


def _legend_below(panels: Sequence[Axes], ncols: int) -> None:
    """One legend for all panels of a figure, below them, where it covers no curve."""
    labels = [panel.get_legend_handles_labels() for panel in panels]
    handles = {name: handle for pair in labels for handle, name in zip(*pair, strict=True)}
    panels[0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False)


def _clean(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
