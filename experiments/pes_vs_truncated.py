"""Which estimator meta-trains an optimizer best, and what the length of its windows does: persistent against truncated ones.

    python -m experiments.pes_vs_truncated [--windows 2 10 50] [--seeds 3] [--out runs/pes_vs_truncated]

A ``SmallMLP`` is meta-trained on the task of configs/learned_optimizer/digits_mlp.yaml (100 steps of a network of 64-32-10 units on
scikit-learn's digits) by PES, GPES that draws anew every 20 steps, NRES, truncated ES and truncated backpropagation. All have
32 runs at a time (16 pairs), the same outer optimizer (Adam, gradients clipped to the norm 1) and, for a given window, the
same number of outer steps: 6000 / window, so that longer windows see as much of the runs in fewer steps. The outer learning
rate is the best for a method and window, by the mean over seeds of the mean loss over 100 steps of 32 runs on the digits of
"validation": of .003 and .01, and of those beyond (.0003, .001, .03, .1) as long as the last one tried is the best.
A step's loss is that before its update, so that truncated estimators see no use of a window's last update: of one in two
where windows have two steps. Truncated ES takes a third run per pair. Backpropagation goes through the gradients of the inner
runs, too.

Judged is the mean loss of 32 new runs on the digits of "test" over the 100 steps of meta-training and over 300, as a share
of that of Adam at the best of 13 learning rates for the same steps, constant or falling along a cosine (by 16 runs on training
digits); and of the last tenth of the steps. Differences from NRES with the same window, above 0 where NRES is better, are paired
by seed, with a bootstrap interval; seeds vary everything. Figures show the share over 100 steps on the way.

Takes about 20 CPU minutes for each seed and rate, of which there are three or four; a third for backpropagation. Each trial is
kept when it is done, weights beside it, and the same command goes on with those that are missing.

Source: Vicol et al. 2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies",
section 5.4; Li et al. 2023, "Noise-Reuse in Online Evolution Strategies", section 5. Differs from the papers: one small task, on
which what helps within a window helps later, too.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from experiments.meta_trained import (
    ADAMS,
    Budget,
    at_best_rate,
    command,
    digits_task,
    gather,
    measured,
    meta_train,
    parsed,
    runs,
)
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.meta import Point, save_meta_training
from metalearn.analysis.trials import trial_frame
from metalearn.base import Estimator, InnerProblem, Params, require_range
from metalearn.estimators.evolution import GeneralizedPersistentES, NoiseReuseES, PersistentES, TruncatedES
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.saving import save_rule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.problems.baselines import curves
from metalearn.problems.optimizees import Optimizee
from metalearn.unroll import Tasks


class Scale(NamedTuple):
    """Sizes of a trial."""

    inner_steps: int = 6000  # of every run, over all episodes
    horizon: int = 100
    pairs: int = 16
    tuning_runs: int = 16
    runs: int = 32
    measurements: int = 6  # on the way, evenly spread


SMOKE = Scale(inner_steps=10, horizon=10, pairs=2, tuning_runs=1, runs=2, measurements=2)
MULTIPLES = (1, 3)  # of the horizon
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of the outer optimizer
FIRST_RATES = (0.003, 0.01)
ADAM, NRES, BACKPROPAGATION = "Adam", "NRES", "truncated backprop"
SETTINGS = {"std": 0.01, "stagger": True, "loss_cap": 20.0}  # of all evolution strategies
EVOLUTION: dict[str, Callable[[int], Estimator]] = {
    NRES: lambda pairs: NoiseReuseES(pairs, **SETTINGS),
    "PES": lambda pairs: PersistentES(pairs, **SETTINGS),
    "GPES": lambda pairs: GeneralizedPersistentES(pairs, resample_every=20, **SETTINGS),
    "truncated ES": lambda pairs: TruncatedES(pairs, **SETTINGS),
}
METHODS = (*EVOLUTION, BACKPROPAGATION)
SHOWN = [
    "window",
    "method",
    "lr",
    "outer_steps",
    "cpu_seconds",
    "n",
    "share_1x",
    "low",
    "high",
    "difference",
    "difference_low",
]
SHOWN += ["difference_high", "p_holm", "final_share_1x", "share_3x", "final_share_3x"]


def optimizee(scale: Scale) -> Optimizee:
    """The task, with all derivatives that backpropagation can have; evolution strategies ask for none."""
    return digits_task(SmallMLP(), horizon=scale.horizon, second_derivatives=True)


def differentiated(method: str, problem: Optimizee, scale: Scale) -> tuple[InnerProblem, Estimator]:
    """What a method differentiates, and how: always twice as many runs as there are pairs."""
    if method == BACKPROPAGATION:
        return Tasks(problem, 2 * scale.pairs), Unrolled("graph", warm_start=True)
    return problem, EVOLUTION[method](scale.pairs)


# -- a trial -----------------------------------------------------------------------------------------------------------


def learned(method: str, window: int, lr: float, seed: int, scale: Scale, out: Path) -> dict[str, Any]:
    """A meta-training: losses on new runs on the way, and at the end over every multiple of the horizon."""
    problem, steps = optimizee(scale), scale.inner_steps // window
    whole, estimator = differentiated(method, problem, scale)
    every, found = max(1, steps // scale.measurements), list[tuple[int, float, Params]]()

    def watch(step: int, seconds: float, meta: Params) -> None:
        if step % every == 0 or step == steps:
            found.append((step, seconds, meta))

    meta = meta_train(whole, estimator, seed, Budget(steps), window=window, lr=lr, watch=watch)
    save_rule(
        out / f"{method.replace(' ', '_')}_{window}_{lr:g}_{seed}.safetensors", SmallMLP(), meta, outer_steps=steps
    )
    # What a learned rule does first does not depend on how long it will run.
    losses_RT = judged(problem, meta, seed, max(MULTIPLES) * scale.horizon, scale)
    validation = float(judged(problem, meta, seed, scale.horizon, scale, "validation").mean())
    ends = {f"{multiple}x": measured(losses_RT[:, : multiple * scale.horizon]) for multiple in MULTIPLES}
    earlier = {step: measured(judged(problem, meta, seed, scale.horizon, scale)) for step, _, meta in found[:-1]}
    way = [{"steps": step, **point} for step, point in {**earlier, steps: ends["1x"]}.items()]
    return {"outer_steps": steps, "cpu_seconds": found[-1][1], "way": way, "validation": validation, **ends}


def judged(problem: Optimizee, meta: Params, seed: int, steps: int, scale: Scale, part: str = "test") -> Tensor:
    """The losses (R, T) of a seed's runs on the examples of a part."""
    assert problem.rule is not None
    return curves(problem.on(part), problem.rule, meta, runs(seed, part, scale.runs), steps)


def tuned_adam(seed: int, scale: Scale) -> dict[str, Any]:
    """The trial of Adam, tuned anew for every length of runs."""
    problem, found = optimizee(scale), {}
    tuning, judging = runs(seed, "tuning", scale.tuning_runs), runs(seed, "test", scale.runs)
    for multiple in MULTIPLES:
        each = [at_best_rate(problem, rival, tuning, judging, multiple * scale.horizon) for rival in ADAMS.values()]
        best = min(each, key=lambda one: one.score)
        found[f"{multiple}x"] = {"lr": best.lr, "cosine": best is each[1], **measured(best.losses)}
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def by_rate(trials: Sequence[dict[str, Any]]) -> dict[tuple[int, str], dict[float, list[dict[str, Any]]]]:
    """The meta-trainings of each window and method, by outer rate, the best rate on validation digits first."""
    tried: dict[tuple[int, str], dict[float, list[dict[str, Any]]]] = {}
    for trial in trials:
        if trial["method"] != ADAM:
            tried.setdefault((trial["window"], trial["method"]), {}).setdefault(trial["lr"], []).append(trial)
    return {cell: dict(sorted(rates.items(), key=lambda own: _standing(own[1]))) for cell, rates in tried.items()}


def at_best_rates(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The meta-trainings at the outer rate that is best on validation digits, for each window and method."""
    return [trial for rates in by_rate(trials).values() for trial in next(iter(rates.values()))]


def rates_to_try(trials: Sequence[dict[str, Any]], cell: tuple[int, str]) -> list[float]:
    """Those at which a window and method has been tried, or is to be: one beyond the best, where that is the last."""
    tried = by_rate(trials).get(cell, {})
    if not tried:
        return list(FIRST_RATES)
    best = RATES.index(next(iter(tried)))
    return sorted({*tried, *RATES[max(0, best - 1) : best + 2]})


def _standing(trials: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """By what a rate is chosen: its seeds, the more the better, then its mean loss on validation digits."""
    found = statistics.fmean(trial["validation"] for trial in trials)
    return -len(trials), math.inf if math.isnan(found) else found


def rows_of(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per meta-training at its best rate, its losses as shares of tuned Adam's with the same seed."""
    of_adam, rows = {trial["seed"]: trial for trial in trials if trial["method"] == ADAM}, []
    for trial in at_best_rates(trials):
        if trial["seed"] not in of_adam:
            continue
        row = {name: trial[name] for name in ("method", "window", "lr", "seed", "outer_steps", "cpu_seconds", "way")}
        for multiple in (f"{multiple}x" for multiple in MULTIPLES):
            own, adam = trial[multiple], of_adam[trial["seed"]][multiple]
            row[f"share_{multiple}"] = own["mean_loss"] / adam["mean_loss"]
            row[f"final_share_{multiple}"] = own["final_loss"] / adam["final_loss"]
        rows.append(row | {"adam": of_adam[trial["seed"]]["1x"]["mean_loss"]})
    return rows


def result_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Means over seeds by window and method, and the difference from NRES with the same window."""
    table, means = [], ("outer_steps", "cpu_seconds", "share_1x", "final_share_1x", "share_3x", "final_share_3x")
    for window in dict.fromkeys(row["window"] for row in rows):
        own = [row for row in rows if row["window"] == window]
        frame = trial_frame(own)
        baseline = NRES if NRES in set(frame["method"]) else None
        paired = paired_comparison(frame, group="method", value="share_1x", baseline=baseline)
        for row in paired.to_dict("records"):
            same = [each for each in own if each["method"] == row["group"]]
            row |= {name: statistics.fmean(each[name] for each in same) for name in means}
            table.append(row | {"window": window, "method": row["group"], "lr": same[0]["lr"]})
    return trial_frame(table)[SHOWN]


def points(rows: Sequence[dict[str, Any]], window: int) -> list[Point]:
    """Shares on the way, for the figure of a window."""
    problem, metric = f"windows of {window} steps", f"mean loss / {ADAM}'s"
    return [
        Point(problem, metric, row["method"], row["seed"], point["steps"], point["mean_loss"] / row["adam"])
        for row in rows
        if row["window"] == window
        for point in row["way"]
    ]


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/pes_vs_truncated", 3)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 10, 50], help="inner steps, divisors of 100")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--inner_steps", type=int, default=Scale().inner_steps, help="of every run (>= 100)")
    options = parsed(parser, argv)
    require_range("inner_steps", options.inner_steps, Scale().horizon)
    scale = SMOKE if options.smoke else Scale(inner_steps=options.inner_steps)
    for window in options.windows:
        require_range("windows", window, 1)
        if scale.horizon % window:
            raise ValueError(f"windows has {window}; accepted: divisors of the horizon, {scale.horizon}")

    def make(method: str, seed: int, window: int = 0, lr: float = 0.0) -> dict[str, Any]:
        if method == ADAM:
            return tuned_adam(seed, scale)
        trial = learned(method, window, lr, seed, scale, options.out)
        at = f"window {window}, rate {lr:g}, seed {seed}"
        print(f"{method}, {at}: mean loss {trial['1x']['mean_loss']:.4f}", flush=True)
        return trial

    def cells_to_try(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        cells: list[dict[str, Any]] = [{"method": ADAM, "seed": seed} for seed in range(options.seeds)]
        for window, method in itertools.product(options.windows, options.methods):
            each = itertools.product(rates_to_try(trials, (window, method)), range(options.seeds))
            cells += [{"method": method, "seed": seed, "window": window, "lr": lr} for lr, seed in each]
        return cells

    ends = time.monotonic() + 60 * options.budget_minutes
    trials, cells = [], cells_to_try([])
    while len(trials) < len(cells):
        trials = gather(cells, make, scale._asdict(), options.out, (ends - time.monotonic()) / 60)
        if len(trials) < len(cells):
            break  # for want of time
        cells = cells_to_try(trials)
    rows = rows_of(trials)
    if not rows:
        return
    table = result_table(rows)
    write_table(table, options.out / "table")
    for window in dict.fromkeys(row["window"] for row in rows):
        save_meta_training(points(rows, window), options.out / f"window_{window}.png", target=1.0)
    print(f"\nmean loss as a share of tuned Adam's\n\n{format_table(table)}")


if __name__ == "__main__":
    main()
