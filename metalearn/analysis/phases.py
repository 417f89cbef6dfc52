"""When does a learner generalise? Phase diagrams, transitions, and the report of a sweep."""

from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from metalearn.analysis.compare import write_table
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.regimes import SEEN, UNSEEN, regime_table, regimes
from metalearn.analysis.scales import Scale, scale_of, show_scale
from metalearn.analysis.sweeps import read_sweep
from metalearn.analysis.transitions import critical_number, measured
from metalearn.models.saving import CARD

MARKERS = {
    "memorisation": "s",
    "identification": "D",
    "zero-shot": "^",
    "learning-to-learn": "o",
    "plateau": "_",
    "undecided": "x",
}


def plot_phase_diagram(
    frame: pd.DataFrame,
    x: str,
    y: str | None,
    value: str,
    ax: Axes | None = None,
    threshold: float | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Axes:
    """Draw the mean of a metric over the cells at every place of two axes, which are logarithmic where they are numbers.

    Infinitely many tasks have a column of their own. Places without a complete cell are grey. If the frame has a column
    ``regime``, a marker shows the most common one. The title says how many cells a mean rests on.

    Args:
        frame: of ``read_sweep`` or ``regimes``.
        x: column of the horizontal axis.
        y: column of the vertical axis, or None for a diagram of one row.
        value: column of a metric.
        ax: where to draw; without it, a new figure.
        threshold: where means cross it, a line is drawn between the cells; nothing is interpolated.
        limits: of the colours.
    """
    ax = Figure(figsize=(6.4, 4.4 if y else 2.4), layout="constrained").subplots() if ax is None else ax
    row = "" if y is None else y
    places = frame if y else frame.assign(**{row: ""})
    cells = measured(places, [x, row, value])
    scale_x, scale_y = scale_of(places[x].dropna()), scale_of(places[row].dropna())
    table = cells.pivot_table(index=row, columns=x, values=value, aggfunc=["mean", "count"], observed=True)
    mean_YX, count_YX = (
        table.loc[:, part].reindex(index=scale_y.values, columns=scale_x.values).to_numpy(float)
        for part in ("mean", "count")
    )
    ax.set_facecolor("0.85")
    mesh = _draw_blocks(ax, scale_x, scale_y, mean_YX, Normalize(*limits))
    if threshold is not None:
        _draw_threshold(ax, scale_x, scale_y, mean_YX >= threshold, np.isfinite(mean_YX))
    if "regime" in cells:
        _mark_regimes(ax, regime_table(cells, [x, row]), scale_x, scale_y, x, row)
    show_scale(ax, scale_x, x)
    show_scale(ax, scale_y, row, vertical=True)
    ax.tick_params(axis="y", length=3.5 if y else 0)
    counts = count_YX[count_YX > 0].astype(int)
    number = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}-{counts.max()}"
    ax.set_title(f"{_readable(value)}\n({number} runs per cell)", fontsize="medium")
    ax.figure.colorbar(mesh, ax=ax)
    return ax


def plot_transitions(
    frame: pd.DataFrame,
    x: str = "num_tasks",
    streams: Sequence[str] = (SEEN, UNSEEN),
    ax: Axes | None = None,
    quantity: str = "improvement",
) -> Axes:
    """Draw what is gained within a sequence against the number of tasks: thin lines per seed, a thick one for the median.

    Args:
        frame: of ``read_sweep``, of one place on all other axes.
        x: column of the horizontal axis.
        streams: of evaluation, each in its colour; those that a cell lacks are left out.
        ax: where to draw; without it, a new figure.
        quantity: of a stream's, "improvement" or "accuracy_last".

    Raises:
        ValueError: if the frame has no such stream.
    """
    ax = Figure(figsize=(6.0, 4.0), layout="constrained").subplots() if ax is None else ax
    columns = [f"validation/{stream}/{quantity}" for stream in streams]
    measured(frame, columns)
    scale = scale_of(measured(frame, [x])[x])
    for stream, column, colour in zip(streams, columns, cycle(COLOURS), strict=False):
        cells = measured(frame, [x, column])
        for _, own in cells.groupby("seed"):
            _line(ax, own.set_index(x).loc[:, column].sort_index(), scale, color=colour, linewidth=0.7, alpha=0.5)
        median = cells.pivot_table(index=x, values=column, aggfunc="median").loc[:, column]
        label = f"{_readable(stream)} ({cells['seed'].nunique()} seeds)"
        _line(ax, median, scale, color=colour, linewidth=2.2, marker="o", markersize=5, label=label)
    show_scale(ax, scale, x)
    ax.set_ylabel("improvement within the sequence" if quantity == "improvement" else _readable(quantity))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.legend(frameon=False, fontsize="small")
    return ax


def report(
    sweep_dir: str | Path,
    x: str,
    y: str | None = None,
    chance: float | None = None,
    seen: str = SEEN,
    unseen: str = UNSEEN,
) -> str:
    """Draw ``phases.png``, write ``phases.csv`` and ``phases.tex`` into the folder of a sweep, and say what they show.

    The figure has the phase diagrams of accuracy on seen and on unseen tasks, with their regimes and the line halfway between
    chance and one, and what is gained within a sequence at the last y. The table is ``regime_table``.

    Args:
        sweep_dir: of ``metalearn sweep``, over learners of classification.
        x: axis of the number of tasks.
        y: another axis, or None.
        chance: accuracy of guessing, in (0, 1); by default 1 / K of the first complete run's checkpoint.
        seen: stream of seen tasks.
        unseen: stream of unseen tasks.

    Returns:
        Lines: cells that failed or are missing, the critical number at each y, and where the figure is.

    Raises:
        ValueError: if no cell is complete, cells lack a stream or its accuracy, or chance is neither given nor found.
    """
    folder, frame = Path(sweep_dir), read_sweep(sweep_dir)
    complete = frame.loc[frame["state"] == "complete"]
    if complete.empty:
        raise ValueError(f"{folder} has no complete cell among {len(frame)}; accepted: at least one")
    chance = _chance(folder / complete["run_dir"].iloc[0]) if chance is None else chance
    cells = regimes(frame, chance, seen=seen, unseen=unseen)
    columns = {stream: f"validation/{stream}/accuracy_last" for stream in (seen, unseen)}
    found = set(cells.columns[cells.notna().any()])
    streams = [stream for stream, column in columns.items() if column in found]
    figure = Figure(figsize=(5.4 * (1 + len(streams)), 4.6 if y else 3.4), layout="constrained")
    *panels, last = figure.subplots(1, 1 + len(streams))
    for panel, stream in zip(panels, streams, strict=True):
        plot_phase_diagram(cells, x, y, columns[stream], panel, threshold=(1 + chance) / 2)
    _draw_last_transitions(cells, x, y, streams, last)
    handles = {
        name: handle for panel in panels for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(MARKERS), frameon=False)
    figure.savefig(folder / "phases.png", dpi=150)
    write_table(regime_table(cells, [axis for axis in (x, y) if axis], seen, unseen), folder / "phases")
    return "\n".join([*_remarks(frame), *_critical_lines(cells, x, y, columns[unseen]), str(folder / "phases.png")])


def _chance(run_dir: Path) -> float:
    """1 / K of the learner in a run's checkpoint."""
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise ValueError(
            f"chance is None and {str(path)!r} does not exist; accepted: chance in (0, 1), 1 / K for K classes"
        )
    return 1 / torch.load(path, map_location="cpu", weights_only=True, mmap=True)[CARD]["num_classes"]


def _draw_last_transitions(cells: pd.DataFrame, x: str, y: str | None, streams: Sequence[str], ax: Axes) -> None:
    """The transitions at the last value of y alone."""
    if y is None:
        plot_transitions(cells, x, streams, ax)
        return
    scale = scale_of(cells[y])
    plot_transitions(cells.loc[cells[y] == scale.values[-1]], x, streams, ax)
    ax.set_title(f"{_readable(y)} {scale.labels[-1]}", fontsize="medium")


def _remarks(frame: pd.DataFrame) -> list[str]:
    """A line for each cell that failed, and one for those that are missing."""
    failed, complete = (frame.loc[frame["state"] == state] for state in ("failed", "complete"))
    missing = len(frame) - len(failed) - len(complete)
    lines = [f"failed: {cell}: {reason}" for cell, reason in zip(failed["cell"], failed["reason"], strict=True)]
    return lines + [f"not complete yet: {missing} of {len(frame)} cells"] * bool(missing)


def _critical_lines(cells: pd.DataFrame, x: str, y: str | None, value: str) -> list[str]:
    parts: list[tuple[str, pd.DataFrame]] = [("", cells)]
    if y is not None:
        scale = scale_of(cells[y])
        parts = [(f" at {y} {place}", cells.loc[cells[y] == place]) for place in scale.values]
    return [f"critical {x}{place}, by {value}: {critical_number(own, x, value)}" for place, own in parts]


def _draw_blocks(ax: Axes, scale_x: Scale, scale_y: Scale, mean_YX: NDArray[np.float64], norm: Normalize) -> QuadMesh:
    """The cells in their colours: a mesh for each block of neighbours, since infinity stands apart."""
    mesh = None
    for columns in _blocks(scale_x):
        for rows in _blocks(scale_y):
            edges = [np.append(s.lows[part], s.highs[part][-1]) for s, part in ((scale_x, columns), (scale_y, rows))]
            mesh = ax.pcolormesh(*edges, np.ma.masked_invalid(mean_YX[rows, columns]), norm=norm, cmap="cividis")
    assert mesh is not None
    return mesh


def _blocks(scale: Scale) -> list[slice]:
    """Runs of values whose intervals touch."""
    apart = np.flatnonzero(~np.isclose(scale.lows[1:], scale.highs[:-1])) + 1
    ends = [0, *apart.tolist(), len(scale.values)]
    return [slice(first, last) for first, last in pairwise(ends)]


def _draw_threshold(
    ax: Axes, scale_x: Scale, scale_y: Scale, above_YX: NDArray[np.bool_], known_YX: NDArray[np.bool_]
) -> None:
    """A line between neighbouring cells of which one is above the threshold."""
    lines = []
    for row, column in np.argwhere((above_YX[:, 1:] != above_YX[:, :-1]) & known_YX[:, 1:] & known_YX[:, :-1]):
        place = (scale_x.highs[column] + scale_x.lows[column + 1]) / 2
        lines.append([(place, scale_y.lows[row]), (place, scale_y.highs[row])])
    for row, column in np.argwhere((above_YX[1:] != above_YX[:-1]) & known_YX[1:] & known_YX[:-1]):
        place = (scale_y.highs[row] + scale_y.lows[row + 1]) / 2
        lines.append([(scale_x.lows[column], place), (scale_x.highs[column], place)])
    ax.add_collection(LineCollection(lines, colors="#D55E00", linewidths=2.5, capstyle="round"), autolim=False)


def _mark_regimes(ax: Axes, table: pd.DataFrame, scale_x: Scale, scale_y: Scale, x: str, y: str) -> None:
    for regime, own in table.groupby("regime", sort=False):
        ax.plot(scale_x.place(own[x]), scale_y.place(own[y]), **_marker(str(regime)))


def _marker(regime: str) -> dict[str, Any]:
    edge = {"markeredgecolor": "black", "markerfacecolor": "white", "markersize": 6, "markeredgewidth": 1.0}
    return {"marker": MARKERS[regime], "linestyle": "", "label": regime} | edge


def _line(ax: Axes, values: pd.Series, scale: Scale, **style: Any) -> None:
    """A line over the numbers; infinity is joined to it by dots only."""
    places, heights = scale.place(values.index), values.to_numpy(float)
    finite = np.array([not isinstance(v, float) or np.isfinite(v) for v in values.index])
    ax.plot(places[finite], heights[finite], **style)
    if not finite.all():
        ax.plot(places[~finite], heights[~finite], **(style | {"marker": "o", "label": None}))


def _readable(column: str) -> str:
    return column.removeprefix("validation/").replace("/", ": ").replace("_", " ")
