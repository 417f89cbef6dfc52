"""What a step of a learned optimizer costs: ``python -m experiments.bench.learned_optimizers``.

The 39-feature rule on a 784-512-512-10 network, 669 706 parameters: the folded form against the unfolded one, which writes all
features out for each tensor as the published rule does, and beside torch's Adam. Times are of a whole step, from gradients to
new parameters and new state, in nanoseconds of one thread's own CPU time per parameter; the two sides are timed in turns, once
they are found to take the same steps. Rows are ratios ours / theirs, below 1 where ours is better.

Half of the unfolded form's time is the kernel's, which maps and clears memory for arrays of 39 floats per parameter anew at
every step: glibc's malloc gives blocks as large as these back when they are freed. The group "reused" measures the steps
again in a process whose malloc keeps them.

The group "meta" times an outer step of ``configs/learned_optimizer/digits_mlp.yaml``, ten inner steps of all pairs of runs, in
milliseconds of the thread's CPU time, with memory kept as ``metalearn fit`` keeps it. The group "guard" times ten steps of training
under ``LossGuard`` against ten under the learned optimizer alone, gradients included. The group "gpu", which is left out
where there is none, times the compiled step of ``LearnedOptimizer`` on 84 million parameters.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional

from experiments.bench.held import peak
from experiments.bench.report import Bounded, Effort, header, report
from experiments.bench.timing import require_equal
from experiments.bench.unfolded import Unfolded
from experiments.meta_trained import digits_task, evolution
from metalearn import random, tree
from metalearn.base import Params, require_choice, require_range
from metalearn.memory import keep_freed_memory
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.guard import LossGuard
from metalearn.optim.learned import LearnedRule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.star import STAR
from metalearn.optim.torch_face import LearnedOptimizer

SIZES = (784, 512, 512, 10)
BARS = {32: 1 / 2, 4: 1 / 4, "compiled": 1 / 10, "state": 1.0, "peak": 1.0, "outer": 1.0, "guard": 2.3, "gpu": 1.0}
PUBLISHED = {32: 599.5, 4: 329.4}  # ns per parameter of a public torch writing of the unfolded rule, on another machine
PEAK_BYTES = 64.0  # per parameter, of all that a step holds beside its arguments
OUTER_MILLISECONDS, PAIRS = 70.0, (4, 16, 64)
PERIOD = 10  # of a guard, and steps that are timed at once
GPU_NANOSECONDS, GPU_SHAPE, GPU_TENSORS = 2.0, (2048, 4096), 10  # 84 million parameters
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # what tells glibc to give no memory back
STEPS = 3  # that both sides take before they are compared
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class Bench:
    """How much of everything."""

    effort: Effort
    sizes: Sequence[int] = SIZES

    @property
    def params(self) -> Params:
        """The parameters of the network as torch begins them."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            pairs = zip(self.sizes, self.sizes[1:], strict=False)
            net = nn.Sequential(*(nn.Linear(inputs, outputs) for inputs, outputs in pairs))
        return {name: p.detach() for name, p in net.named_parameters()}

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.params.values())

    def bar(self, name: int | str) -> float | None:
        """Bars are on the whole network."""
        return BARS[name] if self.sizes == SIZES else None


Step = Callable[[Params, Params, Any, Params], tuple[Params, Any]]  # meta, grads, state, params -> new params and state


@dataclass
class Stepped:
    """A rule, as it stands after a few steps, whose next step is taken again and again."""

    rule: LearnedRule
    bench: Bench
    step: Step
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.meta = {name: value.to(self.dtype) for name, value in self.rule.weights.items()}
            self.params = {name: p.to(self.dtype) for name, p in self.bench.params.items()}
            self.state = self.rule.init(self.meta, self.params)
            for k in range(STEPS):
                self.grads = gradients(self.params, k)
                self.params, self.state = self.step(self.meta, self.grads, self.state, self.params)

    def __call__(self) -> float:
        """CPU seconds of one step."""
        with torch.no_grad():
            began = time.thread_time()
            self.step(self.meta, self.grads, self.state, self.params)
            return time.thread_time() - began

    @property
    def flat(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.params.values()])


def gradients(params: Params, k: int) -> Params:
    """Random ones of the size of a trained network's."""
    keys = {name: random.key(0, "gradients", name, k) for name in params}
    return {name: 0.01 * random.normal(keys[name], tuple(p.shape)).to(p.dtype) for name, p in params.items()}


def stepped(rule: LearnedRule, bench: Bench, dtype: torch.dtype = torch.float32) -> Stepped:
    """A rule step by step as it is."""
    return Stepped(rule, bench, rule.update, dtype)


def adam(bench: Bench) -> Callable[[], float]:
    """CPU seconds of one step of torch's Adam over all tensors at once."""
    params = [nn.Parameter(p) for p in bench.params.values()]
    for p, g in zip(params, gradients(bench.params, 0).values(), strict=True):
        p.grad = g
    optimizer = torch.optim.Adam(params, foreach=True)

    def step() -> float:
        began = time.thread_time()
        optimizer.step()
        return time.thread_time() - began

    return step


def compared(
    name: str, bench: Bench, ours: Callable[[], float], theirs: Callable[[], float], bar: float | None
) -> Bounded:
    """Times in turns, in ns per parameter."""
    measured = bench.effort.compare(ours, theirs)
    mine, other = ([1e9 * seconds / bench.num_params for seconds in side] for side in (measured.ours, measured.theirs))
    return Bounded(name, mine, other, "ns/param", bar)


def require_same_steps(ours: Stepped, theirs: Stepped) -> None:
    """Both sides, which began alike, are where the other is.

    Raises:
        UnequalError: they are not.
    """
    require_equal(f"parameters after {STEPS} steps", ours.flat, theirs.flat, TOLERANCE[ours.dtype])


# -- groups of measurements --------------------------------------------------------------------------------------------


def step(bench: Bench) -> Iterator[Bounded]:
    """The folded form against the unfolded one, and both beside Adam and beside what was published."""
    for hidden in (32, 4):
        rule, other = FactoredMLP([hidden, hidden]), Unfolded([hidden, hidden])
        require_same_steps(*(stepped(each, bench, torch.float64) for each in (rule, other)))
        ours, theirs = (stepped(each, bench) for each in (rule, other))
        require_same_steps(ours, theirs)
        row = compared(f"step, hidden {hidden}, folded / unfolded", bench, ours, theirs, bench.bar(hidden))
        yield row
        published = [PUBLISHED[hidden]] * len(row.theirs)
        yield Bounded(f"step, hidden {hidden}, unfolded / published elsewhere", row.theirs, published, "ns/param")
        yield compared(f"step, hidden {hidden}, folded / Adam foreach", bench, ours, adam(bench), None)


def compiled(bench: Bench) -> Iterator[Bounded]:
    """The folded form as one compiled step, against the unfolded one as it is."""
    rule, began = FactoredMLP([4, 4]), time.perf_counter()
    ours = Stepped(rule, bench, torch.compile(rule.update, fullgraph=True))
    seconds, theirs = time.perf_counter() - began, stepped(Unfolded([4, 4]), bench)
    require_same_steps(ours, theirs)
    name = f"step, hidden 4, compiled ({seconds:.0f} s)"
    yield compared(f"{name} / unfolded", bench, ours, theirs, bench.bar("compiled"))
    yield compared("step, hidden 4, compiled / Adam foreach", bench, ours, adam(bench), None)


def star(bench: Bench) -> Iterator[Bounded]:
    """What STAR's nominal term and magnitudes cost."""
    ours, theirs = stepped(STAR([4, 4]), bench), stepped(FactoredMLP([4, 4]), bench)
    yield compared("step, hidden 4, STAR / factored MLP", bench, ours, theirs, None)


def memory(bench: Bench) -> Iterator[Bounded]:
    """Floats of the state, and bytes that are held during a step beside its arguments, its results among them."""
    for hidden in (32, 4):
        ours, theirs = (stepped(kind([hidden, hidden]), bench) for kind in (FactoredMLP, Unfolded))
        if hidden == 4:  # the state is the same for all
            factors = 3 * sum(p.numel() if p.dim() < 2 else sum(p.shape) for p in bench.params.values())
            floats = sum(leaf.numel() for leaf in tree.leaves(ours.state) if leaf.is_floating_point())
            found, bound = [floats / bench.num_params], [4 + factors / bench.num_params]
            name = "state / (4 per parameter, 3 per row and column)"
            yield Bounded(name, found, bound, "floats", bench.bar("state"))
        folded, unfolded = ([peak(side) / bench.num_params] for side in (ours, theirs))
        name, bar = f"peak of a step, hidden {hidden}, folded", bench.bar("peak")
        yield Bounded(f"{name} / unfolded", folded, unfolded, "B/param")
        yield Bounded(f"{name} / bound", folded, [PEAK_BYTES], "B/param", bar)


def reused(bench: Bench) -> Iterator[Bounded]:
    """The rows of ``step`` in a fresh process that keeps the memory it was once given; the bars are on the usual malloc."""
    command = [sys.executable, "-m", "experiments.bench.learned_optimizers", "--only", "step"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        words = [f"--pairs={bench.effort.pairs}", f"--seconds={bench.effort.seconds}", f"--json={path}"]
        subprocess.run([*command, *words], env=os.environ | KEEPING, check=True, capture_output=True)
        rows = json.loads(path.read_text())
    for row in rows:
        yield Bounded(f"{row['name']}, memory reused", row["ours"], row["theirs"], row["unit"])


def meta(bench: Bench) -> Iterator[Bounded]:
    """An outer step of the digits config against its bound, and how its time per particle falls with their number."""
    keep_freed_memory()
    outer = {pairs: OuterStep(pairs) for pairs in PAIRS}
    times = {pairs: bench.effort.compare(own, outer[PAIRS[0]]).ours for pairs, own in outer.items()}
    milliseconds = [1e3 * seconds for seconds in times[PAIRS[1]]]
    name = f"outer step of {PAIRS[1]} pairs of digits_mlp.yaml / bound"
    yield Bounded(name, milliseconds, [OUTER_MILLISECONDS] * len(milliseconds), "ms", bench.bar("outer"))
    single = [1e3 * seconds / (2 * PAIRS[0]) for seconds in times[PAIRS[0]]]
    for pairs in PAIRS[1:]:
        own = [1e3 * seconds / (2 * pairs) for seconds in times[pairs]]
        length = min(len(own), len(single))
        yield Bounded(f"a particle's time, {pairs} pairs / {PAIRS[0]}", own[:length], single[:length], "ms", None)


def guard(bench: Bench) -> Iterator[Bounded]:
    """Ten steps of training under ``LossGuard`` against ten under the learned optimizer alone."""

    def training(guarded: bool) -> Callable[[], float]:
        params = [nn.Parameter(p) for p in bench.params.values()]
        x, y = random.normal(random.key(0, "x"), (64, bench.sizes[0])), torch.arange(64) % bench.sizes[-1]
        optimizer: torch.optim.Optimizer = LearnedOptimizer(params, SmallMLP())
        if guarded:
            optimizer = LossGuard(optimizer, torch.optim.SGD(params, lr=0.01), PERIOD)

        def closure() -> Tensor:
            optimizer.zero_grad()
            values = x
            for weight, bias in zip(params[::2], params[1::2], strict=True):
                values = functional.linear(values if weight is params[0] else values.relu(), weight, bias)
            loss = functional.cross_entropy(values, y)
            loss.backward()
            return loss

        def steps() -> float:
            began = time.thread_time()
            for _ in range(PERIOD):
                optimizer.step(closure)
            return (time.thread_time() - began) / PERIOD

        return steps

    name = f"a step of training, period {PERIOD}, guarded / alone"
    yield compared(name, bench, training(True), training(False), bench.bar("guard"))


def gpu(bench: Bench) -> Iterator[Bounded]:
    """The compiled step of the 39-feature rule on a GPU, against its bound and torch's fused Adam; first, as without."""
    params, others = (
        [nn.Parameter(torch.ones(GPU_SHAPE, device="cuda")) for _ in range(GPU_TENSORS)] for _ in range(2)
    )
    for k, (p, q) in enumerate(zip(params, others, strict=True)):
        p.grad = q.grad = 0.01 * random.normal(random.key(k, "gpu", device="cuda"), GPU_SHAPE)
    ours, eager = (
        LearnedOptimizer(own, FactoredMLP([4, 4]), compile=c) for own, c in ((params, True), (others, False))
    )
    for _ in range(STEPS):
        ours.step()
        eager.step()
    require_equal(f"parameters after {STEPS} steps", params[0].detach(), others[0].detach(), TOLERANCE[torch.float32])
    adam, count = torch.optim.Adam(others, fused=True), sum(p.numel() for p in params)

    def timed(step: Callable[[], object]) -> Callable[[], float]:
        def call() -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(PERIOD):
                step()
            torch.cuda.synchronize()
            return (time.perf_counter() - began) / PERIOD

        return call

    measured = bench.effort.compare(timed(ours.step), timed(adam.step))
    mine, other = ([1e9 * seconds / count for seconds in side] for side in (measured.ours, measured.theirs))
    name = f"step of {count / 1e6:.0f}M parameters, hidden 4, compiled"
    yield Bounded(f"{name} / bound", mine, [GPU_NANOSECONDS] * len(mine), "ns/param", BARS["gpu"])
    yield Bounded(f"{name} / Adam fused", mine, other, "ns/param")


class OuterStep:
    """Outer steps of the digits config, one after the other, with so many pairs."""

    def __init__(self, pairs: int) -> None:
        self.problem, self.estimator = digits_task(SmallMLP()), evolution(pairs)
        self.meta = self.problem.init_meta(random.key(0))
        self.state = self.estimator.init(self.problem, self.meta, random.key(0))
        self.number = 0

    def __call__(self) -> float:
        """CPU seconds of one."""
        began, own = time.thread_time(), random.key(0, self.number)
        batches = self.problem.batches(own, 10)
        self.state = self.estimator.estimate(self.problem, self.meta, self.state, batches, own).state
        self.number += 1
        return time.thread_time() - began


# -- the report --------------------------------------------------------------------------------------------------------

GROUPS: dict[str, Callable[[Bench], Iterator[Bounded]]] = {
    "step": step,
    "compiled": compiled,
    "star": star,
    "reused": reused,
    "memory": memory,
    "guard": guard,
    "gpu": gpu,
    "meta": meta,  # last, because the process keeps its memory from then on
}


def main(pairs: int = 7, seconds: float = 30, only: str | None = None, json: Path | None = None) -> None:
    """Print a row per measurement: medians of both sides, and the median of ours / theirs.

    Args:
        pairs: interleaved pairs per measurement, at least 1.
        seconds: past which a measurement begins no further pair, >= 0.
        only: groups of measurements, as "step,memory"; null for all that this machine has the hardware for.
        json: file that the rows are written to.
    """
    here = tuple(group for group in GROUPS if group != "gpu" or torch.cuda.is_available())
    chosen = here if only is None else only.split(",")
    for group in chosen:
        require_choice("only", group, here)
    require_range("pairs", pairs, 1)
    require_range("seconds", seconds, 0)
    torch.set_num_threads(1)
    print(header("none"), flush=True)
    measure(Bench(Effort(pairs, seconds)), chosen, json)


def measure(bench: Bench, chosen: Sequence[str], path: Path | None) -> None:
    """Print these groups' rows as they come, and write them to a file where there is one."""
    report({group: partial(GROUPS[group], bench) for group in chosen}, path)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
