"""How much faster two processes are than one at equal work: ``python -m experiments.bench.ranks --estimator pes``."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from jsonargparse import auto_cli

from experiments.bench.peers import estimated
from experiments.bench.rates import learning_rates
from metalearn.base import Estimator
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardGradient

ESTIMATORS = {"fg2u": lambda total: ForwardGradient(total), "pes": lambda total: PersistentES(total)}


def seconds(estimator: str, world: int, total: int = 16, calls: int = 3) -> float:
    """Wall seconds of one estimate by ``world`` processes of one thread each, the slowest of them."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "experiments.bench.ranks", f"--estimator={estimator}", f"--total={total}"]
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000)}
    ranks = []
    for rank in range(world):
        environment = os.environ | port | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        arguments = [*command, f"--calls={calls}"]
        ranks.append(subprocess.Popen(arguments, cwd=root, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"a rank of {estimator} ended with exit code {[process.returncode for process in ranks]}")
    return max(float(answer.split()[-1]) for answer in answers)


def main(estimator: str, total: int = 16, calls: int = 3) -> None:
    """Print this rank's seconds for an estimate, its share of directions or pairs and the averaging included.

    Args:
        estimator: "fg2u" or "pes".
        total: directions or pairs over all ranks.
        calls: estimates that are timed, after one that is not.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    chosen: Estimator = ESTIMATORS[estimator](total)
    chosen.rank, chosen.world = dist.get_rank(), dist.get_world_size()
    call = estimated(chosen, learning_rates(64, batch_size=250), steps=20)

    def averaged() -> None:
        for leaf in call().grad.values():
            dist.all_reduce(leaf)

    averaged()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(calls):
        averaged()
    print((time.perf_counter() - began) / calls)
    dist.destroy_process_group()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
