"""What losses are like: the table of a search's best, their values and what they push outputs to, and pictures of both.

Functions draw into the axes they are given, or into a figure of their own; nothing here touches pyplot's global state.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (To pandas' stubs any selection of a frame may be a column, and any key of a group a single value.)

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.analysis.compare import format_table
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.formulas import formula
from metalearn.base import require_choice, require_range
from metalearn.losses.elementwise import OUTPUTS, ElementwiseLoss
from metalearn.losses.learned import load_loss
from metalearn.losses.program import Program
from metalearn.losses.simplify import simplified
from metalearn.losses.standard import standard_name
from metalearn.search.candidates import Candidate

HALL_OF_FAME, BEST, PICTURE = "hall_of_fame.csv", "best.json", "losses.png"
_TEXTS = ("program", "verdict", "weights", "weights_tuned")
_FORMULA_WIDTH = 96


def show(run_dir: str, best: int = 10, curves: int = 4, output: str | None = None) -> pd.DataFrame:
    """Print the best losses of a search and draw the curves of the first few into <run_dir>/losses.png.

    The table has rank, validation error, complexity, error on untouched examples before and after tuning where the run
    has come that far, and the formula, weights multiplied out, or where they are all 1, simplified. A star marks the
    Pareto front: no other loss of the hall of fame is better in error or complexity and no worse in the other. The picture
    has L(y, p) for y = 0 and 1 and -dL/dz beside the task's standard loss; in regression, against the residual.

    Args:
        run_dir: folder of a run of loss search, finished or not.
        best: losses in the table, at least 1.
        curves: losses in the picture, 1 to 6.
        output: what the losses see of a model's output, "softmax", "sigmoid" or "identity"; null for what the run says.

    Returns:
        The table, formulas in full, ``pareto`` as booleans.

    Raises:
        ValueError: for values out of range, or a folder that has no hall of fame.
    """
    require_range("best", best, 1)
    require_range("curves", curves, 1, len(COLOURS) - 1)
    frame = read_hall_of_fame(run_dir)
    if "complexity" in frame:
        frame = frame.assign(pareto=pareto(frame))
    frame = frame.head(max(best, curves))
    output = output or _output(Path(run_dir))
    require_choice("output", output, OUTPUTS)
    table = _table(frame).head(best)
    print(f"{len(table)} best losses of {run_dir}\n\n{format_table(_fitted(table))}\n")
    picture = Path(run_dir) / PICTURE
    save_losses(hall_losses(frame.head(curves), output), picture)
    print(picture)
    return table


def read_hall_of_fame(run_dir: str | Path) -> pd.DataFrame:
    """The best losses of a run, best first: at least rank, error and program, and lists of weights ([] for ones).

    Args:
        run_dir: the run folder, which holds ``hall_of_fame.csv``.

    Raises:
        ValueError: where there is no hall of fame, it is empty, or it lacks a column.
    """
    path = Path(run_dir) / HALL_OF_FAME
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; accepted: the folder of a run of loss search")
    frame = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str))
    if missing := [name for name in ("rank", "error", "program") if name not in frame]:
        raise ValueError(f"{str(path)!r} has no {', '.join(missing)}; accepted: what loss search wrote")
    if frame.empty:
        raise ValueError(f"{str(path)!r} has no losses yet; accepted: a run whose first generation has ended")
    for name in ("weights", "weights_tuned"):
        texts = frame[name] if name in frame else pd.Series([None] * len(frame))
        frame[name] = [json.loads(text) if isinstance(text, str) and text else [] for text in texts]
    return frame.sort_values("rank", ignore_index=True)


def pareto(frame: pd.DataFrame) -> pd.Series:
    """Which rows of ``read_hall_of_fame`` are of the front of error and complexity: as the run says, else by this table."""
    if "pareto" in frame:
        return frame["pareto"] == 1
    ordered = frame.sort_values(["error", "complexity"], kind="stable")["complexity"].astype(float)
    simplest_before = ordered.cummin().shift(fill_value=float("inf"))
    return (ordered < simplest_before).reindex(frame.index)


def hall_losses(frame: pd.DataFrame, output: str) -> dict[str, ElementwiseLoss]:
    """The losses of rows of ``read_hall_of_fame`` by name, as "1: y - p": with tuned weights where those are no worse."""
    return {f"{row.rank}: {_short(_formula(row), 40)}": _candidate(row).loss(output) for row in frame.itertuples()}


def _candidate(row) -> Candidate:
    before, after = (getattr(row, name, None) for name in ("rescored", "rescored_tuned"))
    worse = before is not None and after is not None and after > before  # NaN, where there is no number, is not
    tuned = row.weights_tuned and not worse
    weights = tuple(row.weights_tuned if tuned else row.weights)
    return Candidate(None if row.program == "taylor" else Program.parse(row.program), weights)


def _formula(row) -> str:
    candidate = _candidate(row)
    if candidate.program is None:
        return f"taylor({', '.join(f'{weight:.3g}' for weight in candidate.weights)})"
    written = formula(candidate.program, candidate.weights)
    if any(weight != 1 for weight in candidate.weights):
        return written
    return min(written, formula(simplified(candidate.program)), key=len)


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that are there and not empty, and the formulas."""
    wanted = ("rank", "error", "rescored", "rescored_tuned", "complexity", "pareto", "generation")
    columns = [name for name in wanted if name in frame and frame[name].notna().any()]
    return frame[columns].assign(formula=[_formula(row) for row in frame.itertuples()])


def _fitted(table: pd.DataFrame) -> pd.DataFrame:
    """Formulas cut to the width of a terminal, and flush left."""
    shown = [_short(text, _FORMULA_WIDTH) for text in table["formula"]]
    width = max(map(len, shown))
    left = [text.ljust(width) for text in shown]
    marked = {"pareto": table["pareto"].map({True: "*", False: ""})} if "pareto" in table else {}
    return table.assign(**marked).drop(columns="formula").assign(**{"formula".ljust(width): left})


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _output(run_dir: Path) -> str:
    """What losses of the run see of a model's output; as ``best.json`` says."""
    return load_loss(run_dir / BEST).output


# -- curves ------------------------------------------------------------------------------------------------------------


def loss_curves(losses: Mapping[str, ElementwiseLoss], num_classes: int = 10, points: int = 199) -> pd.DataFrame:
    """Value and slope of losses against what they see of one output.

    With softmax outputs the output has probability p, and the other classes share the rest equally. At y = 1 it is the
    target's; at y = 0 another class is the target. ``value`` is l(y, p), the output's own term of the loss; ``descent`` is
    -dL/dz, of the whole loss by the raw output: where gradient descent pushes it.

    Args:
        losses: by name, all of one kind of output.
        num_classes: K of a softmax, at least 2.
        points: of each curve, at least 2.

    Returns:
        Columns loss, y (0 or 1), x (the probability p in (0, 1), or in regression the residual p - y in [-3, 3]), value,
        descent.

    Raises:
        ValueError: for values out of range, or losses of different outputs.
    """
    require_range("num_classes", num_classes, 2)
    require_range("points", points, 2)
    outputs = {loss.output for loss in losses.values()}
    if len(outputs) != 1:
        raise ValueError(f"the losses have {sorted(outputs)} outputs; accepted: losses of one kind")
    frames = []
    for y in (0, 1):
        x, prediction_NK, target_NK = probes(next(iter(outputs)), y, num_classes, points)
        for name, loss in losses.items():
            value, descent = _probe(loss, prediction_NK, target_NK)
            columns = {"loss": name, "y": y, "x": x.numpy(), "value": value.numpy(), "descent": descent.numpy()}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def probes(output: str, y: int, num_classes: int, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where losses are looked at, in float64: x (N,), raw outputs (N, K) and targets (N, K), of which column 0 is varied."""
    if output == "identity":
        x = torch.linspace(-3, 3, points, dtype=torch.float64)
        return x, (x + y).unsqueeze(-1), torch.full((points, 1), float(y), dtype=torch.float64)
    x = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    if output == "sigmoid":
        return x, x.logit().unsqueeze(-1), torch.full((points, 1), float(y), dtype=torch.float64)
    prediction_NK = torch.zeros(points, num_classes, dtype=torch.float64)
    prediction_NK[:, 0] = x.logit() + torch.tensor(num_classes - 1.0).log()
    target_NK = torch.zeros_like(prediction_NK)
    target_NK[:, 1 - y] = 1.0
    return x, prediction_NK, target_NK


def _probe(loss: ElementwiseLoss, prediction_NK: Tensor, target_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Column 0's term, and minus the derivative of the whole loss by column 0."""
    loss, prediction_NK = copy.deepcopy(loss).double(), prediction_NK.clone().requires_grad_()
    with torch.enable_grad():
        terms_NK = loss.terms(prediction_NK, target_NK)
        (slope_NK,) = torch.autograd.grad(terms_NK.sum(), prediction_NK)
    return terms_NK[:, 0].detach(), -slope_NK[:, 0]


def gradient_scales(curves: pd.DataFrame) -> pd.Series:
    """Mean of |dL/dz| over the curves, by loss: what a learning rate makes up for."""
    return curves["descent"].abs().groupby(curves["loss"], sort=False).mean()


def plot_losses(
    curves: pd.DataFrame, axes: Sequence[Axes] | None = None, reference: str | None = None
) -> Sequence[Axes]:
    """Draw ``loss_curves``: values at y = 1 and y = 0, and -dL/dz, solid at y = 1 and dashed at y = 0.

    Every loss is multiplied by the number that gives it the reference's mean |dL/dz|, which a learning rate would do as
    well, and shifted to 0 at its least value; the signs of gradients stay as they are.

    Args:
        curves: from ``loss_curves``.
        axes: three places to draw; without them, a new figure with a legend.
        reference: name of the loss that the others are scaled to, drawn in grey; by default the first.

    Raises:
        ValueError: where the reference is none of the losses, or there are more losses than colours.
    """
    names = list(dict.fromkeys(curves["loss"]))
    reference = names[0] if reference is None else reference
    require_choice("reference", reference, tuple(names))
    require_range("number of losses", len(names), 1, len(COLOURS))
    figure = None
    panels = axes
    if panels is None:
        figure = Figure(figsize=(11.5, 3.6 + 0.22 * len(names)), layout="constrained")
        panels = figure.subplots(1, 3)
    scales = gradient_scales(curves)
    others = iter(COLOURS)
    for name in names:
        factor = scales[reference] / scales[name] if scales[name] > 0 else 1.0
        style = {"color": "0.55", "linewidth": 4.0} if name == reference else {"color": next(others), "linewidth": 1.6}
        _draw_loss(curves[curves["loss"] == name], panels, factor, {**style, "label": name})
    _label(panels, curves)
    if figure is not None:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    return panels


def save_losses(losses: Mapping[str, ElementwiseLoss], path: str | Path) -> None:
    """Write the picture of losses beside the standard loss to ``path``; its suffix is the format, ``.png`` or ``.pdf``."""
    output = next(iter(losses.values())).output
    standard = standard_name(output)
    curves = loss_curves({standard: load_loss(standard, output=output)} | dict(losses))
    figure = plot_losses(curves, reference=standard)[0].get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150)


def _draw_loss(curves: pd.DataFrame, axes: Sequence[Axes], factor: float, style: dict) -> None:
    for y, ax, dashes in ((1, axes[0], "-"), (0, axes[1], "--")):
        part = curves[curves["y"] == y]
        value = factor * part["value"]
        ax.plot(part["x"], value - value.min(), **style)
        axes[2].plot(part["x"], factor * part["descent"], linestyle=dashes, **style)


def _label(axes: Sequence[Axes], curves: pd.DataFrame) -> None:
    regression = curves["x"].min() < 0
    x = "residual p - y" if regression else "probability p"
    for ax, y in zip(axes, (1, 0), strict=False):
        ax.set(xlabel=x, ylabel="loss, rescaled", title=f"L(y = {y}, p)")
    axes[2].set(xlabel=x, ylabel="push on the output, rescaled", title="-dL/dz: y = 1 solid, y = 0 dashed")
    axes[2].axhline(0, color="0.3", linewidth=0.8)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
        bound = _robust_limit(ax)
        if bound is not None:
            ax.set_ylim(bound)


def _robust_limit(ax: Axes) -> tuple[float, float] | None:
    """The range that holds 98 % of what is drawn: poles at p = 0 must not flatten everything else."""
    values = pd.Series([y for line in ax.get_lines() for y in line.get_ydata()]).dropna()
    low, high = float(values.quantile(0.01)), float(values.quantile(0.99))
    margin = 0.08 * (high - low)
    return (low - margin, high + margin) if margin > 0 else None
