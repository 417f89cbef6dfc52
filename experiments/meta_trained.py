"""What the experiments on learned optimizers share: rules meta-trained at a counted budget, and kept.

Seconds are of CPU time of this process, which hardly depend on what else the machine does.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metalearn.base import Estimator, InnerProblem, Params, Source
from metalearn.estimators.evolution import NoiseReuseES
from metalearn.models.vision import MLP
from metalearn.optim.learned import LearnedRule
from metalearn.optim.saving import load_rule, save_rule
from metalearn.problems.optimizees import Optimizee
from metalearn.random import fold, key
from metalearn.tasks.sources import ImageSource


class Budget(NamedTuple):
    """Of one meta-training: whichever is spent first."""

    steps: int = 1500  # outer steps
    seconds: float = math.inf  # of CPU time


def digits(**options: int | str) -> ImageSource:
    """scikit-learn's digits in three parts of like size, pixels in [0, 1]."""
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
        watch: called after every outer step with the steps and the CPU seconds so far and the meta-parameters.
    """
    own, began = key(seed, "meta-training"), time.process_time()
    meta = {name: nn.Parameter(value) for name, value in problem.init_meta(fold(own, "meta")).items()}
    state = estimator.init(problem, _detached(meta), fold(own, "state"))
    optimizer = torch.optim.Adam(meta.values(), lr=lr)
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


def one_thread() -> None:
    """Sweeps of small runs gain nothing from more."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _detached(meta: dict[str, nn.Parameter]) -> Params:
    return {name: value.detach().clone() for name, value in meta.items()}
