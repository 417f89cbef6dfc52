"""How much memory a call takes at its peak, in a process of its own: ``python -m experiments.bench.memory --method store``.

What is measured is how far the peak of the resident set rises above where it stood before the call, in MiB, after one
small call that has loaded all code. Linux only, whose kernel lets a process begin its peak anew. glibc's malloc leaves gaps
that make the figure of one and the same call vary threefold; unless ``plain`` is given it is told to return every large
block, so that the rise is what was really held at once.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchopt
from jsonargparse import auto_cli

from experiments.bench.peers import KEY, data_weights, estimated, higher_gradient, torchopt_gradient
from experiments.bench.rates import learning_rates
from metalearn.estimators.forward import ForwardGradient, ForwardMode
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.optim.first_order import SGD
from metalearn.random import fold


def rise(call: Callable[[], object]) -> float:
    """MiB that the peak of the resident set rises above its present size while ``call`` runs."""
    ctypes.CDLL(None).malloc_trim(0)  # or it would take what was freed before, and rise by nothing
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    call()
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def method_call(method: str, width: int, steps: int) -> Callable[[], object]:
    """One hypergradient by a method, ready to be run."""
    if method == "forward_mode":
        return estimated(ForwardMode(), learning_rates(width, batch_size=200), steps)
    if method == "forward_gradient":
        return estimated(ForwardGradient(directions=8), data_weights(SGD(0.1), width, batch_size=200), steps)
    problem = data_weights(SGD(0.1), width)
    if method in MODES:
        return estimated(Unrolled(method), problem, steps)
    start = problem.init(problem.init_meta(KEY), fold(KEY, "episode"))
    batches = problem.batches(KEY, steps)
    if method == "higher":
        return partial(higher_gradient, problem, start, batches, partial(torch.optim.SGD, lr=0.1))
    return partial(torchopt_gradient, problem, start, batches, partial(torchopt.MetaSGD, lr=0.1))


def in_fresh_process(method: str, width: int, steps: int, plain: bool = False) -> float:
    """The rise in a process that does nothing else."""
    command = [sys.executable, "-m", "experiments.bench.memory", f"--method={method}", f"--width={width}"]
    environment = os.environ | ({} if plain else {"MALLOC_MMAP_THRESHOLD_": str(2**16)})
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [*command, f"--steps={steps}"], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    return float(found.stdout.split()[-1])


def main(method: str, width: int = 128, steps: int = 20) -> None:
    """Print the rise of one method in MiB.

    Args:
        method: one of "graph", "store", "checkpoint", "mixed", "higher", "torchopt", "forward_mode", "forward_gradient".
        width: of the two hidden layers.
        steps: of the inner run.
    """
    torch.set_num_threads(1)
    method_call(method, 8, 2)()
    call = method_call(method, width, steps)
    print(rise(call))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
