"""How meta-gradients compare with what people use today: ``python -m experiments.bench.meta_gradients``.

Rows are ratios ours / theirs, below 1 where ours is better; gradients are found equal before anything is compared. The
problem is that of ``experiments.bench.peers``. ``--matrix`` prints problems x estimators instead.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
import torchopt
from jsonargparse import auto_cli

from experiments.bench import ranks
from experiments.bench.memory import in_fresh_process
from experiments.bench.meta_gpu import costs
from experiments.bench.meta_matrix import print_matrix, slopes
from experiments.bench.peers import KEY, data_weights, estimated, higher_gradient, torchopt_gradient
from experiments.bench.report import Bounded, Effort, header, report
from experiments.bench.timing import require_equal
from metalearn.base import Params
from metalearn.estimators.forward import ForwardGradient
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import SGD
from metalearn.problems.data_weights import DataWeights
from metalearn.random import fold
from metalearn.unroll import Tasks

TASKS = 16
SETTINGS = ((128, 20), (256, 80))
NUM_ROWS = 16  # of a whole report, over which the time is shared out
by_higher = partial(higher_gradient, optimizer=partial(torch.optim.SGD, lr=0.1))


def memory(effort: Effort) -> Iterator[Bounded]:
    """Rise of the peak of the resident set, each in a fresh process."""
    bars = {(128, 20): {"store": 0.36, "mixed": 0.30}, (256, 80): {"store": 1 / 6, "mixed": 1 / 6}}
    for width, steps in SETTINGS:
        theirs = in_fresh_process("higher", width, steps)
        for method in ("torchopt", "graph", "checkpoint", "store", "mixed"):
            name = f"memory H={width} K={steps}, {method} / higher"
            ours = in_fresh_process(method, width, steps)
            yield Bounded(name, [ours], [theirs], "MiB", bars[width, steps].get(method))
    width, steps = SETTINGS[0]
    theirs = in_fresh_process("higher", width, steps, plain=True)
    for method in ("store", "mixed"):
        ours = [in_fresh_process(method, width, steps, plain=True) for _ in range(3)]
        yield Bounded(f"memory H={width} K={steps}, {method} / higher, plain glibc", ours, [theirs] * 3, "MiB")


def one_task(effort: Effort) -> Iterator[Bounded]:
    """Time of one hypergradient; both sides warm."""
    width, steps = SETTINGS[0]
    problem = data_weights(SGD(0.1), width)
    batches = problem.batches(KEY, steps)
    start = problem.init(problem.init_meta(KEY), fold(KEY, "episode"))
    theirs = partial(by_higher, problem, start, batches)
    bars = {"graph": None, "store": 1.7, "checkpoint": None, "mixed": 2.1}
    for mode, bar in bars.items():
        ours = estimated(Unrolled(mode), problem, steps)
        yield compared(
            f"one task H={width} K={steps}, {mode} / higher", effort, lambda ours=ours: ours().grad, theirs, bar
        )
    compiled = estimated(Unrolled("mixed", compile=True), problem, steps)
    began = time.perf_counter()
    compiled()
    name = f"one task H={width} K={steps}, compiled ({time.perf_counter() - began:.0f} s) / higher"
    yield compared(name, effort, lambda: compiled().grad, theirs, 1.0)


def many_tasks(effort: Effort) -> Iterator[Bounded]:
    """Time of ``TASKS`` runs of their own initial parameters and examples at once, against one after the other."""
    for width, batch_size in ((32, 25), (128, 100)):
        problem, steps = data_weights(SGD(0.1), width, batch_size=batch_size), 20
        tasks = Tasks(problem, TASKS)
        theirs = partial(one_by_one, problem, steps)
        for mode, compile in (("graph", False), ("store", False), ("mixed", False), ("mixed", True)):
            ours = estimated(Unrolled(mode, compile=compile), tasks, steps)
            name = f"{TASKS} tasks H={width}, {batch_size} examples, {'compiled' if compile else mode} / higher"
            yield compared(name, effort, lambda ours=ours: ours().grad, theirs, None if mode == "graph" else 1.0)


def one_by_one(problem: DataWeights, steps: int) -> Params:
    """The mean over tasks by ``higher``."""
    meta, found = problem.init_meta(KEY), []
    for t in range(TASKS):
        batches = problem.batches(fold(KEY, torch.tensor(t)), steps)
        start = problem.init(meta, fold(fold(KEY, "episode"), torch.tensor(t)))
        found.append(by_higher(problem, start, batches)["weights"])
    return {"weights": torch.stack(found).mean(0)}


def compared(
    name: str, effort: Effort, ours: Callable[[], Params], theirs: Callable[[], Params], bar: float | None
) -> Bounded:
    """Times in turns, once the gradients are found equal."""
    found, wanted = (way()["weights"] for way in (ours, theirs))
    require_equal("gradients", found / wanted.norm(), wanted / wanted.norm(), 1e-5)
    measured = effort.compare(ours, theirs)
    return Bounded(name, [1e3 * s for s in measured.ours], [1e3 * s for s in measured.theirs], "ms", bar)


def forward(effort: Effort) -> Iterator[Bounded]:
    """What forward estimators promise: memory free of the number of steps, time linear in the directions."""
    for method, what in (("forward_mode", "12 meta-parameters"), ("forward_gradient", "8 directions")):
        long, short = (in_fresh_process(method, 64, steps) for steps in (320, 20))
        yield Bounded(f"{method} memory, {what}, K=320 / K=20", [long], [short], "MiB", 1.05)
    problem = data_weights(SGD(0.1), 64, batch_size=200)
    many, few = (estimated(ForwardGradient(b, chunk=4), problem, 10) for b in (32, 8))
    measured = effort.compare(many, few)
    per_direction = [1e3 * s / 32 for s in measured.ours], [1e3 * s / 8 for s in measured.theirs]
    yield Bounded("forward_gradient time per direction, b=32 / b=8", *per_direction, "ms", 1.1)


def two_ranks(effort: Effort) -> Iterator[Bounded]:
    """Estimates per second of two processes / one, at equal directions or pairs."""
    for estimator in ranks.ESTIMATORS:
        pairs = [(ranks.seconds(estimator, 2), ranks.seconds(estimator, 1)) for _ in range(min(3, effort.pairs))]
        two, one = ([1 / pair[side] for pair in pairs] for side in (0, 1))
        yield Bounded(f"two ranks / one, {estimator}", two, one, "1/s", 1.7, at_least=True)


def dense(effort: Effort) -> Iterator[Bounded]:
    """Log-log slope of a response's time against the inner dimension, on dense Hessians."""
    for name, slope in slopes():
        yield Bounded(f"log-log slope of time, dense Hessian, {name}", [slope], [1.0], "", 2.1)


def torchopt_time(effort: Effort) -> Iterator[Bounded]:
    """The other peer."""
    width, steps = SETTINGS[0]
    problem = data_weights(SGD(0.1), width)
    batches = problem.batches(KEY, steps)
    start = problem.init(problem.init_meta(KEY), fold(KEY, "episode"))
    ours = partial(torchopt_gradient, problem, start, batches, partial(torchopt.MetaSGD, lr=0.1))
    theirs = partial(by_higher, problem, start, batches)
    yield compared(f"one task H={width} K={steps}, torchopt / higher", effort, ours, theirs, None)


def gpu(effort: Effort) -> Iterator[Bounded]:
    """Time and memory against one graph of the whole run, at 113 million inner parameters in bfloat16."""
    if not torch.cuda.is_available():
        print("gpu: not measured: no GPU")
        return
    results = {name: cost for name, cost, _ in costs()}
    whole = results.pop("graph")
    for name, cost in results.items():
        bar = 0.86 if name in ("SAMA", "Neumann 10") else None
        yield Bounded(f"gpu memory, {name} / graph", [cost.gibibytes], [whole.gibibytes], "GiB", bar)
        yield Bounded(f"gpu time, {name} / graph", [1e3 * cost.seconds], [1e3 * whole.seconds], "ms")


Group = Literal["memory", "one_task", "torchopt_time", "many_tasks", "forward", "two_ranks", "dense", "gpu"]


def main(
    pairs: int = 7, only: Group | None = None, seconds: float = 200, quick: bool = False, matrix: bool = False
) -> None:
    """Print a row per measurement: medians of both sides, and the median of ours / theirs.

    Args:
        pairs: interleaved pairs per measurement, at most.
        only: the one group of measurements to run.
        seconds: time for the timed rows beside set-up; a measurement past its share begins no further pair.
        quick: one pair per measurement.
        matrix: print problems x estimators instead.
    """
    torch.set_num_threads(1)
    print(header("digits"), flush=True)
    if matrix:
        print_matrix()
        return
    groups = (memory, one_task, torchopt_time, many_tasks, forward, two_ranks, dense, gpu)
    effort = Effort(1 if quick else pairs, seconds / NUM_ROWS)
    report({group.__name__: partial(group, effort) for group in groups if only in (None, group.__name__)})


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
