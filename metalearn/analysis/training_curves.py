"""Training runs under several optimizers: the table of what they reached, the figure of how they got there.

Frames are ``<stage>_curves.csv`` of a run that meta-trained an optimizer: columns problem, horizon (in multiples of that of
meta-training), optimizer, lr, step, loss (mean over runs), standard_error.
"""

import math
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metalearn.analysis.curves import COLOURS
from metalearn.analysis.runs import read_table_of
from metalearn.problems.comparison import TAIL

COLUMNS = {"problem", "horizon", "optimizer", "lr", "step", "loss", "standard_error"}


def read_training_curves(run_dir: str | Path, stage: str = "validation") -> pd.DataFrame:
    """The loss at every step of the runs of ``metalearn validate`` or ``metalearn test``, mean and standard error over runs.

    Raises:
        ValueError: if the stage is unknown, or was not run yet.
    """
    return read_table_of(run_dir, stage, f"{stage}_curves.csv")


def summarise_training(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per problem, horizon and optimizer: lr, mean_loss over all steps, final_loss over the last tenth."""
    _require_columns(frame)
    rows = []
    for _, group in frame.groupby(["problem", "horizon", "optimizer"], sort=False):
        losses, first = group.sort_values("step")["loss"], group.iloc[0]
        final = losses.tail(max(1, len(losses) // TAIL)).mean()
        place = {name: first[name] for name in ("problem", "horizon", "optimizer", "lr")}
        rows.append(place | {"mean_loss": losses.mean(), "final_loss": final})
    return pd.DataFrame(rows)


def format_training(frame: pd.DataFrame) -> str:
    """The summary as text: a line per optimizer, and for each horizon the mean loss over all steps and over the last tenth."""
    summary, lines = summarise_training(frame), []
    problems, horizons = summary["problem"].unique(), summary["horizon"].unique()
    columns = "".join(f"{f'{horizon}x: mean':>14}{'end':>10}{'lr':>9}" for horizon in horizons)
    for problem in problems:
        of_problem = summary[summary["problem"] == problem]
        lines.append(f"{'optimizer' if len(problems) == 1 else f'problem {problem}':<22}{columns}")
        for name in dict.fromkeys(of_problem["optimizer"]):
            own = of_problem.loc[of_problem["optimizer"] == name, ["mean_loss", "final_loss", "lr"]]
            lines.append(f"{name:<22}{''.join(_cells(*row) for row in own.to_numpy().tolist())}")
    return "\n".join(lines)


def _cells(mean: float, final: float, lr: float) -> str:
    return f"{mean:>14.4f}{final:>10.4f}{'' if math.isnan(lr) else f'{lr:g}':>9}"


def plot_training_runs(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw loss against step, on a logarithmic axis: a line per optimizer, with a band of ± 1 standard error.

    Args:
        frame: the table of ``read_training_curves``; with ``ax``, of one problem and horizon.
        ax: where to draw; without it, a new figure with a row of panels for each problem, a panel for each horizon.

    Returns:
        The axes; of a new figure the first panel, and ``axes.figure.axes`` are all of them.

    Raises:
        ValueError: if the frame lacks columns or rows, or holds several panels for one ``ax``.
    """
    _require_columns(frame)
    panels = list(frame.groupby(["problem", "horizon"], sort=False))
    if not panels or (ax is not None and len(panels) > 1):
        raise ValueError(
            f"the frame has {len(panels)} pairs of problem and horizon; accepted: one for given axes, one or more without"
        )
    if ax is not None:
        _draw(frame, ax)
        ax.legend(frameon=False)
        return ax
    problems, horizons = list(frame["problem"].unique()), list(frame["horizon"].unique())
    figure = Figure(figsize=(4.6 * len(horizons), 3.4 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), len(horizons), squeeze=False).flat
    for own, (_, group) in zip(axes, panels, strict=True):
        _draw(group, own)
        problem, horizon = group["problem"].iloc[0], f"{group['horizon'].iloc[0]} x the horizon"
        named = problem if isinstance(problem, str) else f"problem {problem}"
        shown = [named] if len(problems) > 1 else []
        own.set_title(", ".join([*shown, horizon] if len(horizons) > 1 or not shown else shown))
    lines, names = figure.axes[0].get_legend_handles_labels()
    columns = int(figure.get_figwidth() // (0.8 + 0.08 * max(map(len, names))))  # inches of a line and of a letter
    figure.legend(lines, names, loc="outside upper center", ncols=max(1, columns), frameon=False)  # runs fill a panel
    return figure.axes[0]


def save_training_runs(frame: pd.DataFrame, path: str | Path) -> None:
    """Write the figure of ``plot_training_runs`` to ``path``; its suffix is the format, ``.png`` or ``.pdf``."""
    figure = plot_training_runs(frame).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150)


def _draw(frame: pd.DataFrame, ax: Axes) -> None:
    for (name, line), colour in zip(frame.groupby("optimizer", sort=False), cycle(COLOURS), strict=False):
        steps, losses, errors = line["step"] + 1, line["loss"], line["standard_error"]
        ax.plot(steps, losses, color=colour, label=name, linewidth=1.4)
        ax.fill_between(
            steps, (losses - errors).clip(lower=losses / 10), losses + errors, color=colour, alpha=0.2, lw=0
        )
    ax.set(yscale="log", xlabel="step", ylabel="loss")


def _require_columns(frame: pd.DataFrame) -> None:
    if missing := sorted(COLUMNS - set(frame.columns)):
        raise ValueError(f"the frame lacks {', '.join(missing)}; accepted: the table of read_training_curves")
