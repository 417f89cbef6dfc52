"""Between memory and method: a regression learner beside the Bayes predictors of its pool of tasks and of fresh tasks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.analysis.curves import COLOURS
from metalearn.analysis.scales import scale_of, show_scale
from metalearn.analysis.transitions import CriticalNumber, critical_number

LEARNER, RIDGE, DMMSE = COLOURS[0], COLOURS[1], COLOURS[2]


class Predictors(NamedTuple):
    """Mean squares over the positions of one stream's sequences; those with dMMSE are NaN where there is no pool."""

    num_tasks: float  # of the pool; infinite where there is none
    seed: int
    stream: str
    learner: float  # errors
    ridge: float
    dmmse: float
    from_ridge: float  # differences of the learner's answers
    from_dmmse: float
    apart: float  # difference of ridge and dMMSE

    @property
    def towards_ridge(self) -> float:
        """``a`` of the least squares fit dMMSE + a (ridge - dMMSE) of the learner's answers: 0 at dMMSE, 1 at ridge."""
        return (self.from_dmmse + self.apart - self.from_ridge) / (2 * self.apart)


_NUMBERS = ("learner", "ridge", "dmmse", "from_ridge", "from_dmmse", "apart", "towards_ridge")


def compared(
    num_tasks: int | None,
    seed: int | None,
    stream: str,
    y_BT: Tensor,
    own_BT: Tensor,
    ridge_BT: Tensor,
    dmmse_BT: Tensor | None,
) -> Predictors:
    """The mean squares of targets and answers (B, T); without a pool there is no dMMSE."""
    dmmse_BT = torch.full_like(y_BT, torch.nan) if dmmse_BT is None else dmmse_BT

    def between(one_BT: Tensor, other_BT: Tensor) -> float:
        return float((one_BT - other_BT).double().square().mean())

    errors = {"learner": own_BT, "ridge": ridge_BT, "dmmse": dmmse_BT}
    return Predictors(
        num_tasks=float("inf") if num_tasks is None else num_tasks,
        seed=seed or 0,
        stream=stream,
        **{name: between(answers_BT, y_BT) for name, answers_BT in errors.items()},
        from_ridge=between(own_BT, ridge_BT),
        from_dmmse=between(own_BT, dmmse_BT),
        apart=between(ridge_BT, dmmse_BT),
    )


def tabulate_predictors(points: Iterable[Predictors]) -> pd.DataFrame:
    """One row per point, ``towards_ridge`` in the last column."""
    return pd.DataFrame([point._asdict() | {"towards_ridge": point.towards_ridge} for point in points])


def summarise_task_diversity(points: Iterable[Predictors]) -> pd.DataFrame:
    """Means over seeds of every number, by stream and number of tasks."""
    grouped = tabulate_predictors(points).groupby(["stream", "num_tasks"], sort=True)
    columns: dict[str, Any] = {"seeds": grouped["seed"].nunique()} | {name: grouped[name].mean() for name in _NUMBERS}
    return pd.DataFrame(columns).reset_index()


def task_diversity_threshold(points: Iterable[Predictors]) -> CriticalNumber:
    """Where ``towards_ridge`` on unseen tasks turns along the number of tasks of the pool, by ``critical_number``."""
    frame = tabulate_predictors(points)
    return critical_number(frame.loc[frame["stream"] == "unseen"], "num_tasks", "towards_ridge")


def plot_task_diversity(points: Iterable[Predictors], stream: str, ax: Axes, quantity: str = "error") -> Axes:
    """Draw errors, or the learner's distances from both predictors, against the number of tasks; thin lines are seeds.

    Args:
        points: of one length and noise.
        stream: "seen" or "unseen".
        ax: where to draw.
        quantity: "error" or "distance".

    Raises:
        ValueError: if no point is of the stream.
    """
    frame = tabulate_predictors(points)
    frame = frame.loc[frame["stream"] == stream]
    if not len(frame):
        raise ValueError(f"stream is {stream!r}, of which there is no point; accepted: one that was measured")
    lines = {"error": _ERRORS, "distance": _DISTANCES}[quantity]
    scale = scale_of(frame["num_tasks"])
    for column, (label, colour, style) in lines.items():
        wide = frame.pivot_table(index="num_tasks", columns="seed", values=column)
        for _, own in wide.items() if style == "-" else ():
            ax.plot(scale.place(own.index), own, color=colour, linewidth=0.6, alpha=0.5)
        ax.plot(scale.place(wide.index), wide.mean(axis=1), color=colour, linestyle=style, marker="o", label=label)
    show_scale(ax, scale, "num_tasks")
    ax.set(title=f"{stream} tasks", ylabel=f"squared {quantity}", yscale="log" if quantity == "distance" else "linear")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.legend(frameon=False, fontsize="small")
    return ax


_ERRORS = {
    "learner": ("learner", LEARNER, "-"),
    "ridge": ("ridge", RIDGE, "--"),
    "dmmse": ("dMMSE of the pool", DMMSE, "--"),
}
_DISTANCES = {
    "from_ridge": ("learner from ridge", RIDGE, "-"),
    "from_dmmse": ("learner from dMMSE", DMMSE, "-"),
    "apart": ("ridge from dMMSE", "0.4", "--"),
}


def save_task_diversity(points: Iterable[Predictors], path: str | Path) -> None:
    """Write a figure to ``path``: errors and distances on unseen tasks, the threshold with its interval drawn where found."""
    points = list(points)
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    threshold = task_diversity_threshold(points)
    for ax, quantity in zip(figure.subplots(1, 2), ("error", "distance"), strict=True):
        plot_task_diversity(points, "unseen", ax, quantity)
        if threshold.found:
            ax.axvline(np.log2(threshold.estimate), color="0.4", linestyle=":", linewidth=1.4)
            ax.axvspan(*np.log2([threshold.low, threshold.high]), color="0.85", zorder=0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
