"""Figures of mechanisms against the training step, with the transition marked.

Frames are those of ``analysis.mechanisms.through_training``. Functions draw into the axes they are given, or into a
figure of their own, and return the axes.
"""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from metalearn.analysis.curves import COLOURS, MARKERS


def plot_attention(frame: pd.DataFrame, kind: str, ax: Axes | None = None, transition: int | None = None) -> Axes:
    """Draw the attention that each head gives to one kind of token, above its baseline: a colour per layer, a line per head.

    Args:
        frame: of ``attention_scores`` through training.
        kind: "previous token", "own token", "label copy" or "label choice".
        ax: where to draw; without it, a new figure.
        transition: step at which the plateau was left, marked by a vertical line; None marks nothing.

    Raises:
        ValueError: if the frame has no such kind.
    """
    shown = frame.loc[frame["kind"] == kind]
    if shown.empty:
        raise ValueError(f"kind is {kind!r}; the frame has: {', '.join(map(repr, dict.fromkeys(frame['kind'])))}")
    ax = _draw_heads(shown, "excess", "standard_error", ax, transition)
    ax.set(title=kind, ylabel="attention above baseline")
    return ax


def plot_ablation(
    frame: pd.DataFrame, value: str = "accuracy_drop", ax: Axes | None = None, transition: int | None = None
) -> Axes:
    """Draw what the answers lose without each head: a colour per layer, a line per head.

    Args:
        frame: of ``head_ablation`` through training, with one replacement.
        value: "accuracy_drop" or "loss_rise".
        ax: where to draw; without it, a new figure.
        transition: as in ``plot_attention``.

    Raises:
        ValueError: if the frame is empty, has no such column, or several replacements.
    """
    replacements = _require(frame, value)["replacement"].unique()
    if len(replacements) > 1:
        raise ValueError(f"the frame has replacements {sorted(replacements)}; accepted: one")
    ax = _draw_heads(frame, value, f"{value}_error", ax, transition)
    ax.set(title=f"head replaced by {replacements[0]}", ylabel=value.replace("_", " "))
    return ax


def plot_decodability(frame: pd.DataFrame, ax: Axes | None = None, transition: int | None = None) -> Axes:
    """Draw the accuracy of the linear probe: a line per layer, and chance.

    Args:
        frame: of ``decodability`` through training, at one position.
        ax: where to draw; without it, a new figure.
        transition: as in ``plot_attention``.

    Raises:
        ValueError: if the frame is empty or has several positions.
    """
    positions = sorted(set(_require(frame, "accuracy")["position"]))
    if len(positions) > 1:
        raise ValueError(f"the frame has positions {positions}; accepted: one")
    ax = _axes(ax)
    for (layer, of), colour, marker in zip(frame.groupby("layer"), cycle(COLOURS), cycle(MARKERS)):
        _draw_line(ax, of, "accuracy", "standard_error", colour, marker, f"layer {layer}")
    ax.axhline(float(frame["chance"].iloc[0]), color="0.4", linestyle=":", linewidth=1.4, label="chance")
    title = f"what a layer tells after {positions[0]} examples"
    ax.set(title=title, ylabel="accuracy of a linear probe", ylim=(0, 1.02))
    return _finish(ax, transition)


def plot_distances(frame: pd.DataFrame, ax: Axes | None = None, transition: int | None = None) -> Axes:
    """Draw how close the learner's answers are to those of others: a line per other, dashed that on the other's errors.

    Args:
        frame: of ``distances`` through training.
        ax: where to draw; without it, a new figure.
        transition: as in ``plot_attention``.

    Raises:
        ValueError: if the frame is empty or of another kind.
    """
    regression = "squared_difference" in frame
    value = "squared_difference" if regression else "agreement"
    ax, _ = _axes(ax), _require(frame, value)
    for (other, of), colour, marker in zip(frame.groupby("other", sort=False), cycle(COLOURS), cycle(MARKERS)):
        _draw_line(ax, of, value, "standard_error", colour, marker, str(other))
        if not regression and other != "truth":
            ax.plot(of["step"], of["agreement_on_errors"], color=colour, linestyle="--", linewidth=1)
    title = "answers beside others'" if regression else "answers beside others' (dashed: where they err)"
    ax.set(title=title, ylabel="mean squared difference" if regression else "share of equal answers")
    ax.set_ylim(0, None if regression else 1.02)
    return _finish(ax, transition)


def save_mechanisms(
    frames: Mapping[str, pd.DataFrame], path: str | Path, transition: int | None = None, title: str | None = None
) -> None:
    """Write one figure with a panel for every table; its suffix is the format, ``.png`` or ``.pdf``.

    Args:
        frames: tables of ``through_training``: ``attention`` (a panel for each kind), ``ablation``, ``distances``, and any
            others of ``decodability``, whose names say what is read.
        path: of the figure.
        transition: as in ``plot_attention``.
        title: of the whole figure.
    """
    kinds = [kind for kind in dict.fromkeys(frames["attention"]["kind"]) if kind != "own token"]
    probes = [name for name in frames if name not in ("attention", "ablation", "distances")]
    count = len(kinds) + 2 + len(probes)
    rows = -(-count // 3)
    figure = Figure(figsize=(15, 4 * rows), layout="constrained")
    panels = iter(figure.subplots(rows, 3, squeeze=False).flat)
    for kind in kinds:
        plot_attention(frames["attention"], kind, next(panels), transition)
    value = "accuracy_drop" if "accuracy_drop" in frames["ablation"] else "loss_rise"
    plot_ablation(frames["ablation"], value, next(panels), transition)
    for name in probes:
        ax = plot_decodability(frames[name], next(panels), transition)
        ax.set_title(f"{name}: {ax.get_title()}")
    plot_distances(frames["distances"], next(panels), transition)
    for ax in panels:
        ax.set_axis_off()
    if title is not None:
        figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _require(frame: pd.DataFrame, value: str) -> pd.DataFrame:
    if frame.empty or value not in frame:
        raise ValueError(
            f"value is {value!r}; the frame has {len(frame)} rows of: {', '.join(map(str, frame.columns))}"
        )
    return frame


def _axes(ax: Axes | None) -> Axes:
    return Figure(figsize=(5.6, 3.8), layout="constrained").subplots() if ax is None else ax


def _draw_heads(frame: pd.DataFrame, value: str, error: str, ax: Axes | None, transition: int | None) -> Axes:
    """A line per head; as there may be many, heads of a layer share a colour and an entry in the legend."""
    ax = _axes(ax)
    for (layer, heads), colour, marker in zip(frame.groupby("layer"), cycle(COLOURS), cycle(MARKERS)):
        for number, (_, of) in enumerate(heads.groupby("head")):
            _draw_line(ax, of, value, error, colour, marker, None if number else f"heads of layer {layer}")
    ax.axhline(0, color="0.4", linestyle=":", linewidth=1.4)
    return _finish(ax, transition)


def _draw_line(
    ax: Axes, frame: pd.DataFrame, value: str, error: str, colour: str, marker: str, label: str | None
) -> None:
    """A line with a band of ± 1 standard error."""
    of = frame.sort_values("step")
    ax.plot(of["step"], of[value], color=colour, marker=marker, markersize=3, linewidth=1.2, label=label)
    ax.fill_between(of["step"], of[value] - of[error], of[value] + of[error], color=colour, alpha=0.2, linewidth=0)


def _finish(ax: Axes, transition: int | None) -> Axes:
    """Octaves of the training step, the transition, and the house's look."""
    if transition is not None:
        ax.axvline(transition, color="0.4", linestyle="-.", linewidth=1.2, label=f"leaves the plateau ({transition})")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    ax.set_xlabel("training step")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize="small")
    return ax
