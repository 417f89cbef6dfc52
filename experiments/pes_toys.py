"""Where truncated estimators go the wrong way and persistent ones do not (Vicol et al. 2021, sections 5.1 to 5.3).

    python -m experiments.pes_toys [--seeds 3] [--out runs/pes_toys] [--budget_minutes 30]

1. Influence balancing: theta goes to -1/6 from 1/2 under PES and RTRL (UORO, the noisiest, is
   shown without a claim); truncated methods, which see one step, go away from it.
2. The schedule of a learning rate on a two-dimensional landscape, sum of losses from 2488: below 650 under PES and NRES,
   where 580 is the best of a grid; above 1000 under truncated ES and truncated backpropagation.
3. The schedule of a learning rate by the validation *accuracy* of an MLP on digits, which has no gradient: the mean error of
   a run falls from .83 to below .12. Here truncated ES is almost as good: what helps now helps later too.

Prints a table and writes a figure for each. ``--smoke`` runs one iteration of all, and its numbers mean nothing.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.analysis.compare import format_table
from metalearn.analysis.meta import Point, save_meta_training, summarise_meta_training
from metalearn.base import Estimator, InnerProblem
from metalearn.estimators.evolution import NoiseReuseES, PersistentES, TruncatedES
from metalearn.estimators.recurrent import RealTimeRecurrent, UnbiasedOnlineRecurrent
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.schedules import LearningRateSchedule
from metalearn.problems.toys import InfluenceBalancing, LearningRateToy
from metalearn.random import key
from metalearn.tasks.sources import ImageSource

MEASUREMENTS = 40  # of a run, evenly over its iterations
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class Method(NamedTuple):
    """A row of the table: an estimator, its window, the outer optimizer, and what the metric must end between."""

    estimator: Callable[[], Estimator]
    window: int
    optimizer: Optimizer
    low: float
    high: float


class Claim(NamedTuple):
    """A problem on which methods are compared by a metric of its ``evaluate``."""

    title: str
    problem: Callable[[], InnerProblem]
    metric: str
    iterations: int
    target: float
    log: bool  # the vertical axis of the figure
    methods: dict[str, Method]


def sgd(lr: float) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr)


def adam(lr: float, beta: float = 0.9) -> Optimizer:
    return lambda params: torch.optim.Adam(params, lr=lr, betas=(beta, 0.999))


def influence(pairs: int) -> Claim:
    finds, leaves = (0.0, 0.01), (0.67, float("inf"))
    return Claim(
        "influence balancing", InfluenceBalancing, "theta_error", 3000, 0.01, True,
        {
            "PES": Method(partial(PersistentES, pairs, 0.1), 1, sgd(1e-4), *finds),
            "RTRL": Method(RealTimeRecurrent, 1, sgd(1e-4), *finds),
            "UORO": Method(UnbiasedOnlineRecurrent, 1, sgd(1e-5), 0.0, float("inf")),
            "truncated ES": Method(partial(TruncatedES, pairs, 0.1), 1, sgd(1e-4), *leaves),
            "truncated backprop, 1 step": Method(partial(Unrolled, warm_start=True), 1, sgd(1e-4), *leaves),
        },
    )  # fmt: skip


def landscape(pairs: int) -> Claim:
    outer, reaches, stalls = adam(1e-2, 0.99), (0.0, 650.0), (1000.0, float("inf"))
    return Claim(
        "learning rate on a landscape", LearningRateToy, "meta_objective", 1200, 650.0, False,
        {
            "PES": Method(partial(PersistentES, pairs, 0.3, stagger=True), 10, outer, *reaches),
            "NRES": Method(partial(NoiseReuseES, pairs, 0.3, stagger=True), 10, outer, *reaches),
            "truncated ES": Method(partial(TruncatedES, pairs, 0.3, stagger=True), 10, outer, *stalls),
            "truncated backprop": Method(partial(Unrolled, warm_start=True), 10, outer, *stalls),
        },
    )  # fmt: skip


def accuracy(pairs: int) -> Claim:
    outer, reaches = adam(0.1), (0.0, 0.12)
    return Claim(
        "learning rate by accuracy on digits", schedule, "objective", 100, 0.12, False,
        {
            "PES": Method(partial(PersistentES, pairs, 0.3, stagger=True), 10, outer, *reaches),
            "NRES": Method(partial(NoiseReuseES, pairs, 0.3, stagger=True), 10, outer, *reaches),
            "truncated ES": Method(partial(TruncatedES, pairs, 0.3, stagger=True), 10, outer, *reaches),
        },
    )  # fmt: skip


def schedule() -> InnerProblem:
    """An MLP on digits whose learning rate begins far too low and is halved soon; errors are means over the run."""
    problem = LearningRateSchedule(
        ImageSource("digits"), partial(MLP, hidden=[32]), SGD(0.1), horizon=50, lr=0.01, decay=1.0, time_scale=10.0,
        objective="accuracy", batch_size=50,
    )  # fmt: skip
    problem.open(test=False)
    return problem


def train(claim: Claim, name: str, iterations: int, seed: int, seconds: float) -> Iterator[Point]:
    """Meta-train by one method and measure on the way, and at the end, which comes early where the time is spent."""
    method, problem, began = claim.methods[name], claim.problem(), time.monotonic()
    estimator, meta = method.estimator(), problem.init_meta(key(seed, "meta"))
    optimizer, state = method.optimizer(list(meta.values())), estimator.init(problem, meta, key(seed, "state"))
    every = max(1, iterations // MEASUREMENTS)
    for iteration in range(iterations + 1):
        last = iteration == iterations or time.monotonic() - began > seconds
        if last or iteration % every == 0:
            value = problem.evaluate(meta, key(seed, "evaluation"), test=False)[claim.metric]
            yield Point(claim.title, claim.metric, name, seed, iteration, value)
        if last:
            return
        batches = problem.batches(key(seed, "data", iteration), method.window)
        found = estimator.estimate(problem, meta, state, batches, key(seed, "steps", iteration))
        state = found.state
        for part, value in meta.items():
            value.grad = found.grad[part]
        optimizer.step()


def run(claims: Iterable[Claim], seeds: int, out: Path, budget_minutes: float, iterations: int | None = None) -> bool:
    """Print the table, write the figures, and say whether every method ended where it should."""
    claims, points = list(claims), []
    trials = [(claim, name, seed) for claim in claims for name in claim.methods for seed in range(seeds)]
    ends = time.monotonic() + 60 * budget_minutes
    for number, (claim, name, seed) in enumerate(trials):
        seconds = (ends - time.monotonic()) / (len(trials) - number)
        points += train(claim, name, iterations or claim.iterations, seed, seconds)
    table = summarise_meta_training(points)
    bounds = {(claim.title, name): (m.low, m.high) for claim in claims for name, m in claim.methods.items()}
    rows = list(zip(table["problem"], table["method"], table["least"], table["greatest"], strict=True))
    held = [bounds[row[:2]][0] <= row[2] and row[3] <= bounds[row[:2]][1] for row in rows]
    table["wanted"] = ["{:g} … {:g}".format(*bounds[row[:2]]) for row in rows]
    table["held"] = ["yes" if ok else "NO" for ok in held]
    print(format_table(table))
    for claim in claims:
        chosen = [point for point in points if point.problem == claim.title]
        save_meta_training(chosen, out / f"{claim.title.replace(' ', '_')}.png", claim.target, claim.log)
    return all(held)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one iteration with few pairs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/pes_toys"))
    parser.add_argument(
        "--budget_minutes", type=float, default=60.0, help="runs that it cuts short say so by their iterations"
    )
    options = parser.parse_args(argv)
    if options.seeds < 1 or options.budget_minutes <= 0:
        parser.error(f"seeds is {options.seeds}, budget_minutes {options.budget_minutes}; accepted: >= 1 and > 0")
    torch.set_num_threads(1)
    pairs = (4, 4, 4) if options.smoke else (1000, 100, 32)
    claims = [make(number) for make, number in zip((influence, landscape, accuracy), pairs, strict=True)]
    run(claims, options.seeds, options.out, options.budget_minutes, 1 if options.smoke else None)


if __name__ == "__main__":
    main()
