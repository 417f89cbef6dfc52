"""Where a loss leads: planes of the objective around a trained model, and what a loss does that a known trick does as well.

Functions draw into the axes they are given, or into a figure of their own; nothing here touches pyplot's global state.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (To pandas' stubs any selection of a frame may be a column, and any key of a group a single value.)

import copy
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metalearn import random
from metalearn.analysis.compare import format_table
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.losses import gradient_scales, loss_curves
from metalearn.analysis.rates import learning_rates, tuned_models
from metalearn.analysis.transfer import (
    compared_losses,
    open_source,
    open_task,
    output_folder,
    require_device,
    stem_of,
)
from metalearn.base import InnerState, Params, Rule, require_choice, require_range
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.search.population import rows

# -- the command -------------------------------------------------------------------------------------------------------


def landscape(
    loss: list[str],
    data: str = "digits",
    model: str = "mlp",
    task: Literal["images", "table", "regression"] = "images",
    seed: int = 0,
    steps: int = 500,
    rates: list[float] | None = None,
    rule: Rule | None = None,
    batch_size: int = 128,
    split: str = "train",
    validation: float = 0.2,
    part: Literal["train", "validation"] = "validation",
    extent: float = 1.0,
    points: int = 41,
    device: str = "cpu",
    out: str | None = None,
) -> pd.DataFrame:
    """Draw the task's objective around the model that each loss leads to, beside that of the task's own loss.

    All losses train one model from the same start on the same minibatches, each at the rate with the least validation error,
    as ``metalearn loss transfer`` does. The planes lie along the same two drawn directions, each filter as long as the
    model's own, and share one scale. Beside them: the best rates, and what the losses' scales alone explain of them.

    Args:
        loss: folders of runs of loss search, whose best.json is taken; files of losses; texts like "mul(-1,mul(y,log(p)))".
        data: name of a data set: bundled, a file, a folder or hub id, or "heavy_tailed".
        model: "linear", "mlp", "lenet", "resnet" or a class path.
        task: "images" for classes of images, "table" for classes of rows, "regression" for numbers.
        seed: of the initial model, the minibatches and the directions.
        steps: inner steps of a run, at least 1.
        rates: learning rates, at least 3; null for nine, four a decade, with the rule's own in the middle.
        rule: optimizer of the runs; null for SGD with momentum .9 and learning rate 10^-1.5.
        batch_size: examples of an inner step, at least 1.
        split: split or slice of the data that train and validation parts are cut from, as "train[:20%]".
        validation: fraction of it that chooses learning rates, in (0, 1).
        part: the examples that planes are measured on, "train" or "validation".
        extent: the planes are [-extent, extent]^2 in lengths of the model's filters, above 0.
        points: of each axis, at least 2; an odd number has the model itself in the middle.
        device: where to compute, as "cuda".
        out: folder for landscape_<data>_<model>.csv and .png, and the same with _rates; null for the folder of the first
            run among the losses.

    Returns:
        Columns loss, a, b, objective, error: the planes one after another.

    Raises:
        ValueError: for values out of range, what is no loss, model or data set, and where no loss leads anywhere.
    """
    require_range("steps", steps, 1)
    require_choice("part", part, ("train", "validation"))
    _require_plane(extent, points)
    require_device(device)
    rule = rule or SGD(lr=10**-1.5, momentum=0.9)
    grid = learning_rates(rule, rates)
    problem = open_task(open_source(data, task, split, None, validation), model, rule, batch_size, test=False)
    losses = compared_losses(loss, problem, standard=(problem.own_loss,))
    require_range("number of losses", len(losses), 1, len(COLOURS))
    folder = output_folder(out, loss)
    if folder is None:
        raise ValueError("out is None with no run among the losses; accepted: a folder for planes and pictures")
    key = random.key(seed, "landscape", device=device)
    found, models = tuned_models(problem, losses, grid, steps, key)
    best = {row["loss"]: row["rate"] for row in found if np.isfinite(row["validation"])}
    if not best:
        raise ValueError("every loss diverged at every rate; accepted: smaller rates, or other losses")
    print("".join(f"{name}: diverged at every rate, and is not shown\n" for name in losses if name not in best), end="")
    trained = {name: rows(models, place) for place, name in enumerate(losses) if name in best}
    around = {"key": random.fold(key, "plane"), "part": part, "extent": extent, "points": points}
    parts = [loss_plane(problem, own.params, own.buffers, **around).assign(loss=name) for name, own in trained.items()]
    planes = pd.concat(parts, ignore_index=True)[["loss", "a", "b", "objective", "error"]]
    stem = f"{folder}/landscape_{stem_of(data)}_{stem_of(model)}"
    planes.to_csv(f"{stem}.csv", index=False)
    plot_planes(planes).savefig(f"{stem}.png", dpi=150)
    if problem.own_loss in best:
        edges = {row["loss"]: row["edge"] for row in found}
        _save_rates({name: losses[name] for name in best}, best, edges, problem, stem)
    print(f"{stem}.csv\n{stem}.png")
    return planes


def _save_rates(
    losses: Mapping[str, ElementwiseLoss],
    best: Mapping[str, float],
    edges: Mapping[str, str],
    task: LossTask,
    stem: str,
) -> None:
    frame = equivalent_rates(losses, best, task.own_loss, max(2, task.num_outputs))
    frame["edge"] = [edges[name] for name in losses]  # a rate at the end of the grid is no optimum
    frame.to_csv(f"{stem}_rates.csv", index=False)
    figure = Figure(figsize=(5.4, 3.8), layout="constrained")
    plot_rates(frame, figure.subplots())
    figure.savefig(f"{stem}_rates.png", dpi=150)
    print(f"best learning rates on validation examples\n\n{format_table(frame)}\n")


# -- planes ------------------------------------------------------------------------------------------------------------


def filter_normalised(params: Params, key: Tensor) -> Params:
    """A random direction whose every filter is as long as the model's: ``d_f |theta_f| / |d_f|``, d_f standard normal.

    A filter is what makes one output of a layer: the first axis of a weight. Parameters of fewer than two axes (biases,
    gains of normalisation) stay where they are.

    Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", section 4, and its code for biases.
    """
    direction = {}
    for name, value in params.items():
        if value.ndim < 2:
            direction[name] = torch.zeros_like(value)
            continue
        drawn = random.normal(random.fold(key, name), tuple(value.shape)).to(value)
        axes = tuple(range(1, value.ndim))
        length = torch.linalg.vector_norm(drawn, dim=axes, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny)
        direction[name] = drawn * (torch.linalg.vector_norm(value, dim=axes, keepdim=True) / length)
    return direction


def loss_plane(
    task: LossTask,
    params: Params,
    buffers: Params,
    key: Tensor,
    losses: Mapping[str, ElementwiseLoss] | None = None,
    part: str = "validation",
    extent: float = 1.0,
    points: int = 51,
    chunk: int = 128,
) -> pd.DataFrame:
    """The task's objective and error, and further losses, on a plane through ``params`` along two filter-normalised directions.

    The ``points^2`` models are one stacked population, of which ``chunk`` at a time are called by ``vmap``.

    Args:
        task: an opened task, whose module is called.
        params: of one trained model.
        buffers: of the same model.
        key: of the two directions; equal keys make pictures of different models comparable.
        losses: further losses, by name.
        part: the examples: "train", "validation", …
        extent: the plane is [-extent, extent]^2 in lengths of the model's filters, above 0.
        points: of each axis, at least 2; an odd number has the model itself in the middle.
        chunk: models at a time, at least 1; memory grows with it.

    Returns:
        Columns a, b, objective, error, and one for each loss, in order of a, then b.

    Raises:
        ValueError: for values out of range.
    """
    _require_plane(extent, points)
    require_range("chunk", chunk, 1)
    inputs, targets = task.examples(part, key.device)
    first, second = (filter_normalised(params, random.fold(key, axis)) for axis in ("a", "b"))
    axis = torch.linspace(-extent, extent, points, dtype=torch.float64, device=key.device)
    places = torch.cartesian_prod(axis, axis)

    def measure(place: Tensor) -> dict[str, Tensor]:
        a, b = place.to(inputs.dtype).unbind()
        moved = {name: value + a * first[name] + b * second[name] for name, value in params.items()}
        state = InnerState(moved, buffers, {}, torch.zeros((), dtype=torch.int64, device=key.device), {})
        prediction = task.predict(state, inputs)
        found = {"objective": task.objective(prediction, targets), "error": task.error(prediction, targets)}
        target_NK = task.target_matrix(targets)
        return found | {name: loss.per_example(prediction, target_NK).mean() for name, loss in (losses or {}).items()}

    with torch.no_grad():
        pieces = [torch.func.vmap(measure)(piece) for piece in places.split(chunk)]
    columns = {"a": places[:, 0], "b": places[:, 1]}
    columns |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})


def _require_plane(extent: float, points: int) -> None:
    require_range("extent", extent, np.nextafter(0, 1), np.finfo(float).max)
    require_range("points", points, 2)


def plot_plane(
    frame: pd.DataFrame,
    ax: Axes | None = None,
    value: str = "objective",
    levels: int = 24,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw one column of ``loss_plane`` as filled contours, on a logarithmic scale where all values are positive.

    Args:
        frame: from ``loss_plane``.
        ax: where to draw; without it, a new figure.
        value: name of the column.
        levels: of the contours, at least 2.
        limits: least and largest value of the scale; null for those of the column.

    Raises:
        ValueError: for a column that is not there, or values out of range.
    """
    require_choice("value", value, tuple(name for name in frame if name not in ("a", "b")))
    require_range("levels", levels, 2)
    ax = ax if ax is not None else Figure(figsize=(5.2, 4.4), layout="constrained").subplots()
    grid = frame.pivot(index="b", columns="a", values=value)
    heights = np.ma.masked_invalid(grid.to_numpy(float))
    low, high = limits or (heights.min(), heights.max())
    logarithmic = low > 0 and high > 10 * low
    shown = np.ma.log10(heights) if logarithmic else heights
    ends = np.log10([low, high]) if logarithmic else (low, high)
    edges = levels if limits is None or low >= high else np.linspace(ends[0], ends[1], levels + 1)
    drawn = ax.contourf(grid.columns, grid.index, shown, levels=edges, cmap="viridis")
    ax.contour(grid.columns, grid.index, shown, levels=edges, colors="white", linewidths=0.3, linestyles="solid")
    ax.plot(0, 0, marker="+", color="white", markersize=9, markeredgewidth=1.6)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(drawn, ax=ax, label=f"log10 of {value}" if logarithmic else value)
    ax.set(xlabel="direction a, in lengths of the filters", ylabel="direction b", aspect="equal")
    return ax


def plot_planes(frame: pd.DataFrame, value: str = "objective") -> Figure:
    """The planes of a frame of ``landscape`` in one row, on one scale."""
    finite = frame[value][np.isfinite(frame[value])]
    names = list(dict.fromkeys(frame["loss"]))
    figure = Figure(figsize=(4.6 * len(names), 4.2), layout="constrained")
    for name, ax in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        plot_plane(frame[frame["loss"] == name], ax, value, limits=(finite.min(), finite.max())).set_title(name)
    return figure


# -- what a loss is equivalent to --------------------------------------------------------------------------------------


def total_losses(losses: Mapping[str, ElementwiseLoss], num_classes: int = 10, points: int = 8001) -> pd.DataFrame:
    """The whole loss of an example against the probability p of its class, the other classes sharing the rest equally.

    Args:
        losses: by name, with softmax outputs.
        num_classes: K, at least 2.
        points: evenly spaced in ``logit p`` between -14 and 14, at least 2.

    Returns:
        Columns loss, p, total.

    Raises:
        ValueError: for values out of range, or another output.
    """
    require_range("num_classes", num_classes, 2)
    require_range("points", points, 2)
    logit = torch.linspace(-14, 14, points, dtype=torch.float64)
    prediction_NK = torch.zeros(points, num_classes, dtype=torch.float64)
    prediction_NK[:, 0] = logit + np.log(num_classes - 1)
    target_NK = torch.zeros_like(prediction_NK)
    target_NK[:, 0] = 1.0
    frames = []
    for name, loss in losses.items():
        require_choice(f"output of {name}", loss.output, ("softmax",))
        total = copy.deepcopy(loss).double().per_example(prediction_NK, target_NK).detach()
        frames.append(pd.DataFrame({"loss": name, "p": logit.sigmoid().numpy(), "total": total.numpy()}))
    return pd.concat(frames, ignore_index=True)


def equivalent_smoothing(totals: pd.DataFrame, num_classes: int = 10) -> pd.DataFrame:
    """The label smoothing whose minimum is where the loss has its own: ``epsilon = (1 - p*) K / (K - 1)``, p* = argmin_p L.

    Cross-entropy smoothed by epsilon is least at ``p = 1 - epsilon + epsilon / K``. 0: the loss wants certainty.

    Args:
        totals: from ``total_losses``.
        num_classes: K, the same as there.

    Returns:
        Columns loss, minimum (p*), epsilon.
    """
    rows = []
    for name, part in totals.groupby("loss", sort=False):
        place = int(np.argmin(part["total"].to_numpy()))
        certain = place == len(part) - 1
        best = 1.0 if certain else float(part["p"].iloc[place])
        rows.append({"loss": name, "minimum": best, "epsilon": (1 - best) * num_classes / (num_classes - 1)})
    return pd.DataFrame(rows)


def plot_smoothing(
    totals: pd.DataFrame, ax: Axes | None = None, num_classes: int = 10, reference: str | None = None
) -> Axes:
    """Draw ``total_losses``, each between 0 at its minimum and 1 at chance, with the minimum marked and its epsilon named.

    Args:
        totals: from ``total_losses``.
        ax: where to draw; without it, a new figure.
        num_classes: K, the same as there.
        reference: name of a loss that is drawn in grey, as ``plot_losses`` does; null for none.
    """
    names = list(dict.fromkeys(totals["loss"]))
    require_range("number of losses", len(names), 1, len(COLOURS))
    ax = ax if ax is not None else Figure(figsize=(5.8, 3.8), layout="constrained").subplots()
    found = equivalent_smoothing(totals, num_classes).set_index("loss")
    others = iter(COLOURS)
    for name in names:
        colour, width = ("0.55", 4.0) if name == reference else (next(others), 1.6)
        part = totals[totals["loss"] == name]
        low = part["total"].min()
        at_chance = float(np.interp(1 / num_classes, part["p"], part["total"])) - low
        best, epsilon = found.loc[name, "minimum"], found.loc[name, "epsilon"]
        label = f"{name} (ε = {epsilon:.2g})"
        height = (part["total"] - low) / (at_chance if at_chance > 0 else 1.0)
        ax.plot(part["p"], height, color=colour, linewidth=width, label=label)
        ax.plot(best, 0, color=colour, marker="o", markersize=7, clip_on=False, zorder=3)
    ax.set(xlabel="probability p of the right class", ylabel="loss (0 at its minimum, 1 at chance)", ylim=(-0.04, 1.6))
    _clean(ax)
    ax.legend(frameon=False)
    return ax


def equivalent_rates(
    losses: Mapping[str, ElementwiseLoss], rates: Mapping[str, float], reference: str, num_classes: int = 10
) -> pd.DataFrame:
    """Best learning rates beside those that the losses' scales alone explain.

    Plain gradient descent on ``c L`` at rate ``r / c`` is that on L at rate r. Were losses no more than scaled references,
    each one's best rate would be the reference's divided by ``scale``, the ratio of their mean |dL/dz|.

    Args:
        losses: by name, of one kind of output.
        rates: the best learning rate of each, above 0.
        reference: name of one of them.
        num_classes: K of a softmax, at least 2.

    Returns:
        Columns loss, scale, rate, explained (the reference's rate over scale), gain (rate over explained).

    Raises:
        ValueError: where the reference is none of the losses.
    """
    require_choice("reference", reference, tuple(losses))
    scales = gradient_scales(loss_curves(losses, num_classes))
    frame = pd.DataFrame({"loss": list(losses), "scale": [scales[name] / scales[reference] for name in losses]})
    frame["rate"] = [rates[name] for name in losses]
    frame["explained"] = rates[reference] / frame["scale"]
    return frame.assign(gain=frame["rate"] / frame["explained"])


def plot_rates(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw ``equivalent_rates``: best learning rate against scale, and the line of what the scale explains."""
    ax = ax if ax is not None else Figure(figsize=(5.4, 3.8), layout="constrained").subplots()
    line = frame.sort_values("scale")
    ax.plot(line["scale"], line["explained"], color="0.55", linestyle="--", label="explained by scale alone")
    for row, colour in zip(frame.itertuples(), [*COLOURS] * len(frame), strict=False):
        ax.plot(row.scale, row.rate, color=colour, marker="o", linestyle="none", markersize=7, label=row.loss)
    ax.set(xscale="log", yscale="log", xlabel="mean |dL/dz|, times the reference's", ylabel="best learning rate")
    _clean(ax)
    ax.legend(frameon=False)
    return ax


def _clean(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
