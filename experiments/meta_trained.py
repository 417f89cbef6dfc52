"""What the experiments on learned optimizers share: rules meta-trained at a counted budget, and kept.

Seconds are of CPU time of this process, which hardly depend on what else the machine does.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalearn.analysis.trials import keep_trial, read_trials
from metalearn.base import Estimator, InnerProblem, Params, Source, require_range
from metalearn.estimators.evolution import NoiseReuseES
from metalearn.models.vision import MLP
from metalearn.optim.learned import LearnedRule
from metalearn.optim.saving import load_rule, save_rule
from metalearn.problems.baselines import HAND_MADE, Baseline, curves, decayed, tuned
from metalearn.problems.optimizees import Optimizee
from metalearn.random import fold, key
from metalearn.tasks.sources import ImageSource


class Budget(NamedTuple):
    """Of one meta-training: whichever is spent first."""

    steps: int = 1500  # outer steps
    seconds: float = math.inf  # of CPU time


@cache
def digits(**options: int | str) -> ImageSource:
    """scikit-learn's digits in three parts of like size, pixels in [0, 1], decoded once."""
    return ImageSource("digits", validation=0.3, test=0.3, normalise="largest", **options)  # pyright: ignore[reportArgumentType]


def perceptron(hidden: Sequence[int] = (32,), activation: str = "relu") -> Callable[[int, int], nn.Module]:
    """What builds the network that most rules here are meta-trained on."""
    return partial(MLP, hidden=tuple(hidden), activation=activation)


def digits_task(
    rule: LearnedRule, source: Source | None = None, horizon: int = 100, **options: float | str
) -> Optimizee:
    """The task of ``configs/learned_optimizer/digits_mlp.yaml`` under another rule, its data open."""
    problem = Optimizee(source or digits(), perceptron(), rule, horizon=horizon, **options)  # pyright: ignore[reportArgumentType]
    problem.open(test=True)
    return problem


def evolution(pairs: int = 16) -> NoiseReuseES:
    """The estimator of ``configs/learned_optimizer/digits_mlp.yaml``."""
    return NoiseReuseES(pairs=pairs, std=0.01, stagger=True, loss_cap=20.0)


def meta_train(
    problem: InnerProblem,
    estimator: Estimator,
    seed: int,
    budget: Budget,
    *,
    window: int = 10,
    lr: float = 1e-2,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    watch: Callable[[int, float, Params], None] | None = None,
) -> Params:
    """Adam on the meta-gradients of ``budget.steps`` windows, each clipped to the norm ``clip``.

    Args:
        problem: what is learned.
        estimator: how training runs are differentiated.
        seed: of everything.
        budget: when to stop.
        window: inner steps of an outer step.
        lr: of Adam, on the meta-parameters.
        clip: largest norm of a meta-gradient.
        weight_decay: decoupled, on the meta-parameters, in units of ``lr``.
        watch: called after every outer step with the steps and the CPU seconds so far and the meta-parameters.
    """
    own, began = key(seed, "meta-training"), time.process_time()
    meta = {name: nn.Parameter(value) for name, value in problem.init_meta(fold(own, "meta")).items()}
    state = estimator.init(problem, _detached(meta), fold(own, "state"))
    optimizer = torch.optim.AdamW(meta.values(), lr=lr, weight_decay=weight_decay)
    for step in range(budget.steps):
        batches = problem.batches(fold(own, "data", step), window)
        found = estimator.estimate(problem, _detached(meta), state, batches, fold(own, "step", step))
        state = found.state
        for name, value in meta.items():
            value.grad = found.grad[name]
        nn.utils.clip_grad_norm_(meta.values(), clip)
        optimizer.step()
        spent = time.process_time() - began
        if watch is not None:
            watch(step + 1, spent, _detached(meta))
        if spent > budget.seconds:
            break
    return _detached(meta)


def kept(path: Path, problem: Optimizee, make: Callable[[], Params]) -> Params:
    """The weights in ``path``, which ``make`` finds where there is no such file yet."""
    assert isinstance(problem.rule, LearnedRule)
    if not path.exists():
        began = time.process_time()
        meta = make()
        save_rule(path, problem.rule, meta, cpu_seconds=time.process_time() - began)
    return load_rule(path).weights


def runs(seed: int, purpose: str, count: int) -> Tensor:
    """Keys of training runs, different for every purpose: (count,)."""
    return fold(key(seed, purpose), torch.arange(count))


class AtBest(NamedTuple):
    """A hand-made optimizer at the learning rate that suits a problem and a number of steps best."""

    lr: float
    losses: Tensor  # (R, T)
    score: float  # the mean loss by which the rate was chosen


ADAMS = {"Adam": HAND_MADE["Adam"], "Adam, cosine": decayed(HAND_MADE["Adam"])}  # the usual rivals


def at_best_rate(
    problem: Optimizee, baseline: Baseline, tuning: Tensor, judging: Tensor, steps: int, part: str = "test"
) -> AtBest:
    """Runs on a part at the rate with the smallest mean loss over all steps of the runs ``tuning`` on training examples."""
    rule = baseline.rule(steps)
    best = tuned(problem.on("train"), rule, tuning, steps, baseline.rates)
    losses = curves(problem.on(part), rule, {"lr": torch.tensor(best.lr)}, judging, steps)
    return AtBest(best.lr, losses, best.grid[best.lr])


def final(losses_RT: Tensor) -> Tensor:
    """The mean loss of each run over the last tenth of its steps: (R,)."""
    return losses_RT[:, -max(1, losses_RT.shape[1] // 10) :].mean(1)


def measured(losses_RT: Tensor) -> dict[str, float]:
    """The mean loss over all steps, and over the last tenth of them."""
    return {"mean_loss": float(losses_RT.mean()), "final_loss": float(final(losses_RT).mean())}


# -- trials ------------------------------------------------------------------------------------------------------------


def command(
    about: str | None, out: str, seeds: int, budget: str = "after which no trial is begun (> 0)"
) -> argparse.ArgumentParser:
    """The options that these experiments share: seeds, budget_minutes (whose help is ``budget``), out and smoke."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds (>= 1)")
    parser.add_argument("--budget_minutes", type=float, default=math.inf, help=budget)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of all that is written")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of hours; the numbers mean nothing")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a ``command``, checked."""
    options = parser.parse_args(argv)
    require_range("seeds", options.seeds, 1)
    if options.smoke and options.out == parser.get_default("out"):
        options.out /= "smoke"  # beside what takes hours, and not in its place
    if not options.budget_minutes > 0:
        raise ValueError(f"budget_minutes is {options.budget_minutes}; accepted: budget_minutes > 0")
    one_thread()
    return options


def gather(
    cells: Sequence[dict[str, Any]],
    make: Callable[..., dict[str, Any]],
    settings: dict[str, Any],
    out: Path,
    budget_minutes: float,
) -> list[dict[str, Any]]:
    """A trial for each cell, those that an earlier call with the same settings kept in ``out`` among them.

    Args:
        cells: what tells trials apart.
        make: what a cell's trial adds to the cell, given the cell's values by name.
        settings: of all trials; those of other settings are left alone.
        out: folder of ``trials.jsonl``.
        budget_minutes: of wall time; no trial is begun after it, and what is missing is said.
    """
    file, ends = out / "trials.jsonl", time.monotonic() + 60 * budget_minutes
    earlier = [trial for trial in read_trials(file) if trial["settings"] == settings]
    found, missing = [], []
    for cell in cells:
        same = [trial for trial in earlier if cell.items() <= trial.items()]
        if not same and time.monotonic() > ends:
            missing.append(cell)
            continue
        if not same:
            same = [cell | {"settings": settings} | make(**cell)]
            keep_trial(file, same[0])
        found.append(same[0])
    if missing:
        print(f"{len(missing)} of {len(cells)} trials are missing, the first {missing[0]}: call again", flush=True)
    return found


def one_thread() -> None:
    """Sweeps of small runs gain nothing from more."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _detached(meta: dict[str, nn.Parameter]) -> Params:
    return {name: value.detach().clone() for name, value in meta.items()}
