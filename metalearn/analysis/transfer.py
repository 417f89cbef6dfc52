"""Whether a loss is worth taking home: trained anew beside standard losses, every one at its own best learning rate."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportReturnType=false
# (To pandas' stubs any selection of a frame may be a column, and any key of a group a single value.)

import functools
import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
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
from metalearn.tasks.synthetic import HeavyTailedRegression

MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": functools.partial(MLP, hidden=()),
    "mlp": MLP,
    "lenet": LeNet,
    "resnet": SmallResNet,
}
_CONVOLUTIONAL = ("lenet", "resnet")
_CLASSIFICATION = ("cross_entropy", "focal", "label_smoothing")
_REGRESSION = ("mse", "mae", "huber")
_HEAVY_TAILED = "heavy_tailed"
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
    Printed: mean error and deviation over seeds, the difference from cross-entropy (or mse) paired by seed with its t
    interval, p of Welch's test and p corrected for all tests of the command (Holm). Tables are written whenever a data
    set and model are done, and corrected when there are more.

    Seeds vary the initial model and the minibatches; the division of the data into parts stays. The test part of bundled data
    is the same fifth that a search with the source's own settings does not see.

    Args:
        loss: folders of runs of loss search, whose best.json is taken; files of losses; texts like "mul(-1,mul(y,log(p)))".
        data: names of data sets, separated by commas: bundled, files, folders or hub ids; or "heavy_tailed", the regression
            of ``HeavyTailedRegression``, which has parts of its own and is not scaled: task, split, test and validation
            are for the others.
        model: "linear", "mlp", "lenet", "resnet" or class paths, separated by commas; with several data sets or models every
            pair is tried.
        task: "images" for classes of images, "table" for classes of rows, "regression" for numbers, which are scaled to
            deviation 1.
        seeds: training runs of every loss, at least 2.
        steps: inner steps of a run, at least 1.
        rates: learning rates, at least 3; null for nine, four a decade, with the rule's own in the middle.
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
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}; accepted: 0 < confidence < 1")
    require_device(device)
    rule = rule or SGD(lr=10**-1.5, momentum=0.9)
    grid = learning_rates(rule, rates)
    names, kinds = _distinct("data", data), _distinct("model", model)
    sources = {stem: open_source(name, task, split, test, validation) for stem, name in names.items()}
    pairs = list(itertools.product(names, kinds))
    tasks = [open_task(sources[name], kinds[kind], rule, batch_size, test=True) for name, kind in pairs]
    losses = [compared_losses(loss, problem) for problem in tasks]
    folder = output_folder(out, loss)
    frames = []
    for (name, kind), problem, compared in zip(pairs, tasks, losses, strict=True):
        found = []
        for seed in range(seeds):
            started = time.monotonic()
            key = random.key(seed, "transfer", device=device)
            found += [{"seed": seed} | row for row in tuned_errors(problem, compared, grid, steps, key)]
            spent = time.monotonic() - started
            print(f"{name}, {kind}: seed {seed + 1} of {seeds}, {spent:.0f} s", file=sys.stderr)
        frames.append(pd.DataFrame(found).assign(data=name, model=kind, baseline=problem.own_loss))
        trials = pd.concat(frames, ignore_index=True)
        table = transfer_table(trials, confidence)
        written = [] if folder is None else _write(table, trials, folder)
    _report(table, trials, f"{steps} steps, {seeds} seeds", grid, confidence)
    print("\n".join(written))
    return table


def transfer_table(trials: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """The table of ``transfer``, of a row per data, model, loss and seed.

    ``low`` and ``high`` are the t interval of the mean difference from the baseline, paired by seed: resampling so few seeds
    would make it too narrow. What a single seed cannot tell is missing.

    Args:
        trials: columns data, model, baseline (name of the loss that others are compared with), loss, seed, rate, error.
        confidence: probability of the intervals (0 < confidence < 1).
    """
    tables = []
    for (data, model), part in trials.groupby(["data", "model"], sort=False):
        baseline = str(part["baseline"].iloc[0])
        paired = paired_comparison(part, group="loss", value="error", baseline=baseline, confidence=confidence)
        paired = paired.rename(columns={"group": "loss", "mean": "error"}).set_index("loss")
        by_loss = part.groupby("loss", sort=False)
        values = {name: own["error"].to_numpy(float) for name, own in by_loss}
        paired["rates"] = by_loss["rate"].agg(lambda rates: " ".join(f"{rate:.2g}" for rate in rates))
        paired["sd"] = pd.Series({name: _deviation(own) for name, own in values.items()})
        others = {name: own for name, own in values.items() if name != baseline}
        paired["p_welch"] = pd.Series({name: welch(own, values[baseline]) for name, own in others.items()}, dtype=float)
        by_seed = part.pivot(index="seed", columns="loss", values="error")
        intervals = {name: t_interval(by_seed[name] - by_seed[baseline], confidence) for name in others}
        for end, column in enumerate(("low", "high")):
            paired[column] = pd.Series({name: interval[end] for name, interval in intervals.items()}, dtype=float)
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


def t_interval(differences: pd.Series | NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean, ``mean ± t_(N-1) sd / sqrt(N)``; without missing values (NaN).

    Returns:
        The two ends; NaN for fewer than two values, or where one is infinite.
    """
    sample = np.asarray(differences, float)
    sample = sample[~np.isnan(sample)]
    half = (
        student.ppf((1 + confidence) / 2, max(1, len(sample) - 1)) * _deviation(sample) / np.sqrt(max(1, len(sample)))
    )
    return (float(sample.mean() - half), float(sample.mean() + half)) if np.isfinite(half) else (np.nan, np.nan)


def _deviation(values: NDArray[np.float64]) -> float:
    known = len(values) > 1 and np.isfinite(values).all()
    return float(values.std(ddof=1)) if known else float("nan")


# -- what is compared on what ------------------------------------------------------------------------------------------


def compared_losses(
    texts: Sequence[str], task: LossTask, standard: Sequence[str] | None = None
) -> dict[str, ElementwiseLoss]:
    """Standard losses, and the given ones by the names they are shown by.

    Args:
        texts: folders of runs, files or texts of losses.
        task: opened.
        standard: names of the losses that come first; null for those of this kind of task, its own before the others.

    Raises:
        ValueError: for a folder without a best loss, and what is no loss.
    """
    if standard is None:
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


def require_device(device: str) -> None:
    """Raise ``ValueError`` unless torch can compute on ``device`` here."""
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError):  # torch built without CUDA asserts
        raise ValueError(f"device is {device!r}; accepted: one that torch finds here, as 'cpu'") from None


def output_folder(out: str | None, losses: Sequence[str]) -> Path | None:
    """The folder for results, made: ``out``, or that of the first run among the losses; None where there is neither.

    Raises:
        ValueError: where nothing can be written there.
    """
    chosen = out or next((one for one in losses if Path(one).is_dir()), None)
    if chosen is None:
        return None
    folder = Path(chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise ValueError(f"out is {chosen!r}; accepted: a folder, or a path where one can be made") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out is {chosen!r}; accepted: a folder that can be written to")
    return folder


def _distinct(option: str, text: str) -> dict[str, str]:
    """The names of a list, by what stands for them in tables and file names."""
    names = text.split(",")
    stems = {stem_of(name): name for name in names}
    if len(stems) < len(names):
        raise ValueError(f"{option} is {text!r}; accepted: names that differ, in their last part where they are paths")
    return stems


def open_task(source: Source, model: str, rule: Rule, batch_size: int, *, test: bool) -> LossTask:
    """What losses are compared on; targets are scaled but where outliers would make their deviation anything."""
    scale = not isinstance(source, HeavyTailedRegression)
    settings = {"batch_size": batch_size, "outer_batch_size": None, "untouched": 0.0, "scale_targets": scale}
    task = LossTask(source, build_model(model, source), rule, **settings)
    task.open(test=test)
    return task


def open_source(name: str, task: str, split: str, test: float | str | None, validation: float) -> Source:
    """The examples of a data set by its name, file, folder or hub id; see ``transfer`` for the arguments."""
    require_choice("task", task, ("images", "table", "regression"))
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation!r}; accepted: 0 < validation < 1")
    if name == _HEAVY_TAILED:
        return HeavyTailedRegression()
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
    """What makes a module of numbers of features and outputs, by short name or class path.

    Raises:
        ValueError: for what cannot be imported; when it is called, for what makes no such module.
    """
    if name in MODELS:
        if isinstance(source, ImageSource) and name in _CONVOLUTIONAL:
            return functools.partial(MODELS[name], image_channels=source.image_shape[0])
        return MODELS[name]
    module, _, attribute = name.rpartition(".")
    try:
        return functools.partial(_checked, name, getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError, ValueError):
        accepted = ", ".join(map(repr, MODELS))
        raise ValueError(
            f"model is {name!r}; accepted: {accepted}, or the path of a class that can be imported"
        ) from None


def _checked(name: str, constructor: Callable[..., Any], num_features: int, num_outputs: int) -> nn.Module:
    """The module that was made, if it has parameters and maps features to outputs."""
    accepted = (
        f"accepted: what makes a module of {num_features} features and {num_outputs} outputs of these two numbers"
    )
    try:
        module = constructor(num_features, num_outputs)
        fits = isinstance(module, nn.Module) and next(module.parameters(), None) is not None
        with torch.no_grad():
            fits = fits and module(torch.zeros(2, num_features)).shape == (2, num_outputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"model is {name!r}, which fails ({str(error).splitlines()[0]}); {accepted}") from None
    if not fits:
        raise ValueError(f"model is {name!r}; {accepted}")
    return module


# -- what is shown -----------------------------------------------------------------------------------------------------


def _report(table: pd.DataFrame, trials: pd.DataFrame, setting: str, grid: Sequence[float], confidence: float) -> None:
    for (data, model), part in table.groupby(["data", "model"], sort=False):
        baseline = part["loss"].iloc[0]
        interval = f"difference from {baseline} with {100 * confidence:g}% paired t interval"
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


def _write(table: pd.DataFrame, trials: pd.DataFrame, folder: Path) -> list[str]:
    """Paths of the tables that were written, one for each data set and model."""
    paths = []
    for (data, model), part in table.groupby(["data", "model"], sort=False):
        stem = folder / f"transfer_{data}_{model}"
        part.to_csv(f"{stem}.csv", index=False)
        own = trials[(trials["data"] == data) & (trials["model"] == model)]
        own.to_csv(f"{stem}_seeds.csv", index=False)
        paths.append(f"{stem}.csv")
    return paths


def stem_of(name: str) -> str:
    """A name that can be part of a file's."""
    return Path(name).stem if "/" in name else name
