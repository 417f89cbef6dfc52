"""Betty's headline program, Meta-Weight-Net on long-tailed data, with every estimator that can differentiate it.

    python -m experiments.betty_reweighting --source digits --imbalance 200 100 50 --seeds 10 11 12 13 14

trains classifiers on the long tail alone (plain), on the long tail and the balanced meta examples together (plain + clean:
the same data, used without a second level), and under learned weights, one row for each estimator of the response of the
classifier. All methods of an imbalance and a seed have the same long tail, start and number of steps. Settings were chosen
on other seeds, 0 to 2, of digits at imbalance 100 (with the same test images);
those of MNIST and Fashion-MNIST are guesses. A table has

- accuracy on the test part as the mean over classes, in per cent: mean ± standard deviation over seeds;
- gain: over plain with the same seed, and in how many seeds it is positive;
- time: CPU seconds of training over those of plain, the median over seeds;
- MiB: rise of the peak resident size in a fresh process over ten steps of a classifier of 4096 hidden units, after a step
  of a small one as warm-up; no number where the system does not tell.

The numbers of the papers are of CIFAR images and residual networks, and cannot stand beside these.
"""

import argparse
import functools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metalearn import random
from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.trials import trial_frame
from metalearn.base import Estimator
from metalearn.estimators.implicit import SAMA, ConjugateGradient, FiniteDifference, Identity, Neumann
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.multilevel.graph import Graph
from metalearn.multilevel.reweighting import BOTH, LONG_TAIL, Reweighting
from metalearn.optim.first_order import SGD, Adam
from metalearn.tasks.sources import ImageSource

RATE = 0.5
MEMORY_STEPS, MEMORY_HIDDEN = 10, 4096
RESET = Path("/proc/self/clear_refs")
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "unrolled (store)": lambda: Unrolled("store"),
    "SAMA": SAMA,
    "finite difference (DARTS)": FiniteDifference,
    "Neumann, 5 terms": lambda: Neumann(terms=5, step_size=RATE),
    "conjugate gradients, 5": lambda: ConjugateGradient(iterations=5, damping=0.1),
    "identity (T1-T2)": lambda: Identity(scale=RATE),
}
PLAIN = {"plain": LONG_TAIL, "plain + clean": BOTH}
METHODS = (*PLAIN, *ESTIMATORS)


class Setting(NamedTuple):
    """What all methods share. Of digits all examples are a batch, as in configs/multilevel/reweighting.yaml."""

    source: str
    steps: int
    batch_size: int | None
    hidden: int = 64


class Run(NamedTuple):
    """One training run."""

    imbalance: float
    seed: int
    method: str
    accuracy: float
    seconds: float  # of CPU time


SETTINGS = {
    "digits": Setting("digits", 250, None),
    "mnist": Setting("mnist", 2000, 100, 128),
    "fashion_mnist": Setting("fashion_mnist", 2000, 100, 128),
}
SMOKE = Setting("digits", 4, None, 8)


def program(setting: Setting, imbalance: float, seed: int, method: str) -> Reweighting:
    """The program of a method, its data read."""
    made = Reweighting(
        ImageSource(path=setting.source),
        functools.partial(MLP, hidden=[setting.hidden]),
        SGD(lr=RATE, weight_decay=0.003),
        Adam(lr=0.03),
        imbalance,
        meta_per_class=10,
        batch_size=setting.batch_size,
        estimator=ESTIMATORS[method]() if method in ESTIMATORS else None,
        data_seed=seed,
    )
    made.open(test=True)
    return made


def graph(made: Reweighting, method: str) -> Graph:
    """The two levels, or the classifier alone."""
    if method in ESTIMATORS:
        return made.graph()
    return Graph([made.classifier("validation", weighted=False, part=PLAIN[method])], {}, {})


def train(setting: Setting, imbalance: float, seed: int, method: str) -> Run:
    """Train by a method, and test it."""
    made = program(setting, imbalance, seed, method)
    levels, key = graph(made, method), random.key(seed, "run")
    state, started = levels.init(key), time.process_time()
    for _ in range(setting.steps):
        state, _ = levels.step(state, key)
    seconds = time.process_time() - started
    return Run(imbalance, seed, method, 100 * made.accuracy(state, "test"), seconds)


def memory_rise(setting: Setting, imbalance: float, method: str) -> float:
    """MiB that the peak rises in this process, which must be a fresh one; NaN where the system cannot tell."""
    if not RESET.exists():
        return math.nan
    torch.set_num_threads(1)
    key = random.key(0, "run")
    small, large = (program(setting._replace(hidden=hidden), imbalance, 0, method) for hidden in (1, MEMORY_HIDDEN))
    levels = graph(small, method)
    levels.step(levels.init(key), key)
    levels = graph(large, method)
    state = levels.init(key)
    RESET.write_text("5")  # the peak becomes what is resident now
    before = peak_kib()
    for _ in range(MEMORY_STEPS):
        state, _ = levels.step(state, key)
    return (peak_kib() - before) / 1024


def peak_kib() -> int:
    """Peak resident size since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def fresh_memory_rise(setting: Setting, imbalance: float, method: str) -> float:
    """``memory_rise`` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_rise, setting, imbalance, method).result()


def runs(setting: Setting, imbalances: list[float], seeds: list[int], deadline: float) -> Iterator[Run]:
    """Every method of a seed before the next seed, until time is up."""
    for seed in seeds:
        for imbalance in imbalances:
            for method in METHODS:
                if time.monotonic() > deadline:
                    print(f"stopped by --budget_minutes before imbalance {imbalance:g}, seed {seed}, {method}")
                    return
                run = train(setting, imbalance, seed, method)
                print(f"imbalance {imbalance:g}, seed {seed}, {method}: {run.accuracy:.2f}", file=sys.stderr)
                yield run


def summary(found: list[Run], memory: dict[str, float]) -> list[dict[str, Any]]:
    """A row for every imbalance and method."""
    rows = []
    for imbalance in dict.fromkeys(run.imbalance for run in found):
        here = [run for run in found if run.imbalance == imbalance]
        plain = {run.seed: run for run in here if run.method == "plain"}
        for method in METHODS:
            own = [run for run in here if run.method == method]
            if own:
                rows.append({"imbalance": imbalance, "method": method} | _row(own, plain) | {"MiB": memory[method]})
    return rows


def _row(own: list[Run], plain: dict[int, Run]) -> dict[str, float | int]:
    gains = [run.accuracy - plain[run.seed].accuracy for run in own]
    return {
        "seeds": len(own),
        "accuracy": statistics.mean(run.accuracy for run in own),
        "sd": _deviation([run.accuracy for run in own]),
        "gain": statistics.mean(gains),
        "gain_sd": _deviation(gains),
        "better": sum(gain > 0 for gain in gains),
        "time": statistics.median(run.seconds / plain[run.seed].seconds for run in own),
    }


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SETTINGS, default="digits", help="mnist and fashion_mnist: see the README")
    parser.add_argument("--imbalance", type=float, nargs="+", default=[200.0, 100.0, 50.0])
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(range(10, 15)), help="of long tail, start, batches"
    )
    parser.add_argument("--budget_minutes", type=float, default=math.inf, help="no run is begun after this time")
    parser.add_argument("--smoke", action="store_true", help="four steps of a small classifier: does it run?")
    parser.add_argument("--out", help="write the table to <out>.csv and <out>.tex")
    options = parser.parse_args(arguments)
    setting = SMOKE if options.smoke else SETTINGS[options.source]
    deadline = time.monotonic() + 60 * options.budget_minutes
    torch.set_num_threads(1)
    found = list(runs(setting, options.imbalance, options.seeds, deadline))
    used = dict.fromkeys(run.method for run in found)
    rows = summary(found, {method: fresh_memory_rise(setting, options.imbalance[0], method) for method in used})
    print(format_table(trial_frame(rows)))
    if options.out:
        write_table(trial_frame(rows), options.out)
    return rows


if __name__ == "__main__":
    main()
