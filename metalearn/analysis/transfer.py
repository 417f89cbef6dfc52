"""Whether a loss is worth taking home: trained anew beside standard losses, every one at its own best learning rate."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (To pandas' stubs any selection of a frame may be a column, and any key of a group a single value.)

import functools
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ttest_ind_from_stats
from torch import nn

from metalearn import random
from metalearn.analysis.compare import format_table, holm, paired_comparison
from metalearn.analysis.losses import BEST
from metalearn.analysis.rates import learning_rates, tuned_errors
from metalearn.base import Rule, Source, require_choice, require_range
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.losses.learned import load_loss
from metalearn.models.vision import MLP, LeNet, SmallResNet
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.tasks.sources import ImageSource, TableSource, open_dataset

MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": functools.partial(MLP, hidden=()),
    "mlp": MLP,
    "lenet": LeNet,
    "resnet": SmallResNet,
}
_CONVOLUTIONAL = ("lenet", "resnet")
_CLASSIFICATION = ("cross_entropy", "focal", "label_smoothing")
_REGRESSION = ("mse", "mae", "huber")
_RENAMED = {"group": "loss", "mean": "error", "difference_low": "low", "difference_high": "high"}
_EDGES = {"low": "the low edge", "high": "the high edge", "both": "both edges"}
COLUMNS = ["loss", "rates", "error", "sd", "difference", "low", "high", "p_welch", "p_holm"]


def transfer(
    loss: list[str],
    data: str = "digits",
    model: str = "mlp",
    task: Literal["images", "table", "regression"] = "images",
    seeds: int = 5,
    steps: int = 500,
    rates: list[float] | None = None,
    rule: Rule | None = None,
    batch_size: int = 128,
    split: str = "train",
    test: float | str | None = None,
    validation: float = 0.2,
    confidence: float = 0.95,
    device: str = "cpu",
    out: str | None = None,
) -> pd.DataFrame:
    """Compare losses with standard ones on other data and models, every loss at the learning rate that suits it best.

    For each seed all losses are trained with all learning rates of one grid, from the same initial model on the same
    minibatches of the train part. Each loss takes the rate with the least validation error, and that one model's error
    on the test part counts. Where an end of the grid wins, the grid grows once by three rates at that end, for all losses.
    Printed: mean error and deviation over seeds, the difference from cross-entropy (or mse) paired by seed with a
    bootstrap interval, p of Welch's test and p corrected for all tests of the command (Holm).

    Seeds vary the initial model and the minibatches; the division of the data into parts stays. The test part of bundled data
    is the same fifth that a search with the source's own settings does not see.

    Args:
        loss: folders of runs of loss search, whose best.json is taken; files of losses; texts like "mul(-1,mul(y,log(p)))".
        data: names of data sets, separated by commas: bundled, files, folders or hub ids.
        model: "linear", "mlp", "lenet", "resnet" or class paths, separated by commas; with several data sets or models every
            pair is tried.
        task: "images" for classes of images, "table" for classes of rows, "regression" for numbers, which are scaled to
            deviation 1.
        seeds: training runs of every loss, at least 2.
        steps: inner steps of a run, at least 1.
        rates: learning rates, at least 3; null for 7 that are factors of sqrt(10) apart, with the rule's own in the middle.
        rule: optimizer of the runs; null for SGD with momentum .9 and learning rate 10^-1.5.
        batch_size: examples of an inner step, at least 1.
        split: split or slice of the data that train and validation parts are cut from, as "train[:20%]".
        test: fraction of that split, or the name of another; null for the split "test" where there is one, else .2.
        validation: fraction of the rest that chooses learning rates, in (0, 1).
        confidence: probability of the intervals (0 < confidence < 1).
        device: where to compute, as "cuda".
        out: folder for transfer_<data>_<model>.csv, and the same with _seeds for every single error; null for the folder
            of the first run among the losses, if there is one.

    Returns:
        A row per data set, model and loss: data, model, loss, rates (chosen, by seed), error (mean), sd, difference, low,
        high, p_welch, p_holm.

    Raises:
        ValueError: for values out of range, and what is no loss, model or data set.
    """
    require_range("seeds", seeds, 2)
    require_range("steps", steps, 1)
    rule = rule or SGD(lr=10**-1.5, momentum=0.9)
    grid = learning_rates(rule, rates)
    frames = []
    for name in data.split(","):
        source = open_source(name, task, split, test, validation)
        for kind in model.split(","):
            module = build_model(kind, source)
            problem = LossTask(source, module, rule, batch_size=batch_size, outer_batch_size=None, untouched=0.0)
            problem.open(test=True)
            losses = compared_losses(loss, problem)
            found = []
            for seed in range(seeds):
                started = time.monotonic()
                key = random.key(seed, "transfer", device=device)
                found += [{"seed": seed} | row for row in tuned_errors(problem, losses, grid, steps, key)]
                spent = time.monotonic() - started
                print(f"{name}, {kind}: seed {seed + 1} of {seeds}, {spent:.0f} s", file=sys.stderr)
            frames.append(pd.DataFrame(found).assign(data=_stem(name), model=_stem(kind), baseline=problem.own_loss))
    trials = pd.concat(frames, ignore_index=True)
    table = transfer_table(trials, confidence)
    _report(table, trials, f"{steps} steps, {seeds} seeds", grid, confidence)
    folder = out or next((one for one in loss if Path(one).is_dir()), None)
    if folder is not None:
        _write(table, trials, Path(folder))
    return table


def transfer_table(trials: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """The table of ``transfer``, of a row per data, model, loss and seed.

    Args:
        trials: columns data, model, baseline (name of the loss that others are compared with), loss, seed, rate, error.
        confidence: probability of the intervals (0 < confidence < 1).
    """
    tables = []
    for (data, model), part in trials.groupby(["data", "model"], sort=False):
        baseline = str(part["baseline"].iloc[0])
        paired = paired_comparison(part, group="loss", value="error", baseline=baseline, confidence=confidence)
        paired = paired.drop(columns=["low", "high"]).rename(columns=_RENAMED).set_index("loss")
        by_loss = part.groupby("loss", sort=False)
        values = {name: own["error"].to_numpy(float) for name, own in by_loss}
        paired["rates"] = by_loss["rate"].agg(lambda rates: " ".join(f"{rate:.2g}" for rate in rates))
        paired["sd"] = pd.Series({name: _deviation(own) for name, own in values.items()})
        tests = {name: welch(own, values[baseline]) for name, own in values.items() if name != baseline}
        paired["p_welch"] = pd.Series(tests, dtype=float)
        tables.append(paired.reset_index().assign(data=data, model=model))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(p_holm=holm(table["p_welch"]))[["data", "model", *COLUMNS]]


def welch(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Two-sided p of Welch's t-test; NaN where it is undefined: fewer than two values, infinite ones, no variance."""
    samples = [np.asarray(left, float), np.asarray(right, float)]
    if any(len(sample) < 2 or not np.isfinite(sample).all() for sample in samples):
        return float("nan")
    if all(np.ptp(sample) == 0 for sample in samples):
        return float("nan")
    (mean_a, sd_a, n_a), (mean_b, sd_b, n_b) = ((one.mean(), one.std(ddof=1), len(one)) for one in samples)
    return float(ttest_ind_from_stats(mean_a, sd_a, n_a, mean_b, sd_b, n_b, equal_var=False).pvalue)


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if np.isfinite(values).all() else float("nan")


# -- what is compared on what ------------------------------------------------------------------------------------------


def compared_losses(texts: Sequence[str], task: LossTask) -> dict[str, ElementwiseLoss]:
    """The standard losses of the task, its own first, and the given ones by the names they are shown by.

    Raises:
        ValueError: for a folder without a best loss, and what is no loss.
    """
    standard = _REGRESSION if task.regression else _CLASSIFICATION
    losses = {name: load_loss(name, output=task.output) for name in standard}
    for text in texts:
        path = Path(text)
        if path.is_dir() and not (path / BEST).is_file():
            raise ValueError(f"{text!r} has no {BEST}; accepted: the folder of a run of loss search")
        given = path / BEST if path.is_dir() else text
        name = path.name if path.is_dir() else path.stem if text.endswith(".json") else text
        if name not in standard:
            losses[_unique(name[:40], losses)] = load_loss(given, output=task.output)
    return losses


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    return next(numbered for k in range(2, 10_000) if (numbered := f"{name} ({k})") not in taken)


def open_source(name: str, task: str, split: str, test: float | str | None, validation: float) -> Source:
    """The examples of a data set by its name, file, folder or hub id; see ``transfer`` for the arguments."""
    require_choice("task", task, ("images", "table", "regression"))
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation!r}; accepted: 0 < validation < 1")
    test = _own_test(name, split) if test is None else test
    if task == "images":
        return ImageSource(name, split=split, test=test, validation=validation)
    kind = "regression" if task == "regression" else "classification"
    return TableSource(name, split=split, test=test, validation=validation, task=kind)


def _own_test(name: str, split: str) -> float | str:
    try:
        open_dataset(name, split=split, also="test")
    except ValueError:  # no such split, or no such data set, which the source will say better
        return 0.2
    return "test"


def build_model(name: str, source: Source) -> Callable[[int, int], nn.Module]:
    """What makes a module of numbers of features and outputs, by short name or class path."""
    if name in MODELS:
        if isinstance(source, ImageSource) and name in _CONVOLUTIONAL:
            return functools.partial(MODELS[name], image_channels=source.image_shape[0])
        return MODELS[name]
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        accepted = ", ".join(map(repr, MODELS))
        raise ValueError(
            f"model is {name!r}; accepted: {accepted}, or the path of a class that can be imported"
        ) from None


# -- what is shown -----------------------------------------------------------------------------------------------------


def _report(table: pd.DataFrame, trials: pd.DataFrame, setting: str, grid: Sequence[float], confidence: float) -> None:
    for (data, model), part in table.groupby(["data", "model"], sort=False):
        baseline = part["loss"].iloc[0]
        interval = f"difference from {baseline} with {100 * confidence:g}% interval"
        print(f"{data}, {model}: test error ({setting}); {interval}\n\n{format_table(part[COLUMNS])}\n")
    print("\n".join([f"learning rates {grid[0]:.2g} to {grid[-1]:.2g}", *_remarks(trials, grid)]))


def _remarks(trials: pd.DataFrame, grid: Sequence[float]) -> list[str]:
    """What a reader of the table must know: grids that grew, rates at the end of one that has grown, runs that diverged."""
    remarks = []
    grown = trials[(trials["lowest"] < grid[0]) | (trials["highest"] > grid[-1])]
    for (data, model, low, high), part in grown.groupby(["data", "model", "lowest", "highest"], sort=False):
        seeds = ", ".join(map(str, part["seed"].unique()))
        remarks.append(
            f"{data}, {model}: a loss was best at the edge of the grid, rates {low:.2g} to {high:.2g} in seeds {seeds}"
        )
    for (data, model, loss), part in trials.groupby(["data", "model", "loss"], sort=False):
        for edge in ("low", "high", "both"):
            if count := int((part["edge"] == edge).sum()):
                remarks.append(
                    f"{data}, {model}, {loss}: {_EDGES[edge]} of the grown grid as good as any rate in {count} seeds"
                )
        if count := int(np.isinf(part["error"]).sum()):
            remarks.append(f"{data}, {model}, {loss}: diverged in {count} seeds")
    return remarks


def _write(table: pd.DataFrame, trials: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (data, model), part in table.groupby(["data", "model"], sort=False):
        stem = folder / f"transfer_{data}_{model}"
        part.to_csv(f"{stem}.csv", index=False)
        own = trials[(trials["data"] == data) & (trials["model"] == model)]
        own.to_csv(f"{stem}_seeds.csv", index=False)
        print(f"{stem}.csv")


def _stem(name: str) -> str:
    """A name that can be part of a file's."""
    return Path(name).stem if "/" in name else name
