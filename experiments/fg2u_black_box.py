"""A solver that cannot be differentiated: zeroth-order (FG)2U against finite differences, at equal numbers of solver calls.

    python -m experiments.fg2u_black_box [--num_points 64] [--sweeps 8] [--seeds 5] [--out runs/black_box]

Burgers' equation is solved in numpy, and the N values of the field that it began with are sought from the field it ended
with, by gradient descent. A gradient costs b + 1 solver calls by differences along b random directions ("outer chained":
only the solver is differenced, not the squared distance), and N + 1 by differences along every coordinate. "exact" is
backpropagation through the same solver written in torch, for reference only, its gradient counted as four calls: the run,
its repetition, and a backward pass worth two.

Reported: the error of the field that was found, relative to the sought one, at the start and after a quarter, half and all
of the calls; and the misfit, the root-mean-square distance from what was observed. Every method has the learning rate, of
``RATES``, that ends with the least misfit on three further seeds, whose calls are not counted.

Source: the setting of Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization",
black-box optimization. Differs from the paper: see ``Burgers``.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.trials import summarise_trials
from metalearn.base import Estimator, require_range
from metalearn.estimators.directional import basis
from metalearn.estimators.forward import ZerothOrder
from metalearn.estimators.unrolled import Unrolled
from metalearn.problems.opaque import Burgers, TransparentBurgers
from metalearn.random import key

RATES = (0.1, 0.2, 0.4, 0.8)  # in units of N, since the outer loss is a mean over N points
PICKED_ON = 3
SHARES = (0.25, 0.5, 1.0)  # of the calls, after which errors are looked at
NAN = float("nan")
VALUES = {"steps": 0, "rate": 2, "error_start": 3} | {f"error_{share:.0%}": 3 for share in SHARES} | {"misfit": 4}


class CoordinateDifferences(ZerothOrder):
    """The whole gradient by forward differences, one meta-parameter at a time."""

    def indices(self, num_entries: int) -> Tensor:
        return torch.arange(num_entries)

    def draw(self, key: Tensor, indices_C: Tensor, num_entries: int) -> Tensor:
        return basis(indices_C, num_entries)

    def weight(self, num_directions: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Way:
    """One method: its estimator, and the solver calls that a gradient costs."""

    name: str
    estimator: Estimator
    calls: int
    problem: type[Burgers] = Burgers


def ways(num_points: int, smoothing: float) -> list[Way]:
    def random(directions: int, chain: bool = False) -> Way:
        estimator = ZerothOrder(directions, smoothing, chain=chain, chunk=1)
        return Way(f"(FG)2U, b = {directions}{', outer chained' if chain else ''}", estimator, directions + 1)

    coordinates = CoordinateDifferences(smoothing=smoothing, chunk=1)
    return [
        Way("exact (not opaque)", Unrolled(), 4, TransparentBurgers),
        Way("coordinate differences", coordinates, num_points + 1),
        *(random(b, chain) for chain in (False, True) for b in (4, 16)),
    ]


def recover(way: Way, problem: Burgers, rate: float, calls: int, seed: int) -> dict[str, float]:
    """Descend for at most ``calls`` solver calls: the error after each share of them, and the misfit before the last step."""
    meta = problem.init_meta(key(seed))
    optimizer = torch.optim.SGD(meta.values(), lr=rate * problem.num_points)
    state = way.estimator.init(problem, meta, key(seed))
    looks = {f"error_{share:.0%}": int(share * calls) // way.calls for share in SHARES}
    found = {name: NAN for name in looks}
    for number in range(1, calls // way.calls + 1):
        batches = problem.batches(key(seed, "data"), problem.horizon or 0)
        gradient = way.estimator.estimate(problem, meta, state, batches, key(seed, "estimate", number))
        for name, value in meta.items():
            value.grad = gradient.grad[name]
        optimizer.step()
        error = problem.evaluate(meta, key(seed), test=False)["error"]
        found |= {name: error for name, look in looks.items() if look == number}
        found["misfit"] = math.sqrt(2 * float(gradient.loss))
        if not math.isfinite(error):
            break
    return found


def pick_rate(way: Way, problems: Sequence[Burgers], calls: int) -> float:
    """The learning rate that ends with the least misfit, which a user sees, too, summed over problems."""

    def misfit(rate: float) -> float:
        total = sum(recover(way, problem, rate, calls, seed)["misfit"] for seed, problem in enumerate(problems))
        return total if math.isfinite(total) else math.inf

    return min(RATES, key=misfit)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All trials; learning rates are picked on the seeds that come after theirs."""
    calls, trials = args.sweeps * (args.num_points + 1), []
    for way in ways(args.num_points, args.smoothing):

        def problem(seed: int, way: Way = way) -> Burgers:
            return way.problem(args.num_points, args.viscosity, noise=args.noise, seed=seed)

        further = range(args.seeds, args.seeds + PICKED_ON)
        rate = pick_rate(way, [problem(seed) for seed in further], calls)
        steps = {"steps": calls // way.calls, "rate": rate}
        for seed in range(args.seeds):
            one = problem(seed)
            start = {"error_start": one.evaluate(one.init_meta(key(seed)), key(seed), test=False)["error"]}
            trials.append({"method": way.name, "seed": seed} | steps | start | recover(way, one, rate, calls, seed))
    return trials


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_points", type=int, default=64, help="N, values of the field that is sought")
    parser.add_argument("--viscosity", type=float, default=0.01, help="of the fluid")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the observations' error")
    parser.add_argument("--sweeps", type=int, default=8, help="solver calls over N + 1 (>= 1)")
    parser.add_argument("--smoothing", type=float, default=1e-2, help="length of the differences")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (>= 1)")
    parser.add_argument("--out", type=Path, help="folder for the table")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        args.num_points, args.sweeps, args.seeds = 8, 2, 1
    require_range("sweeps", args.sweeps, 1)
    require_range("seeds", args.seeds, 1)
    torch.set_num_threads(1)
    print(f"{args.sweeps * (args.num_points + 1)} solver calls, N = {args.num_points}, seeds {args.seeds}")
    table = summarise_trials(run(args), VALUES)
    print(format_table(table))
    if args.out is not None:
        write_table(table, args.out / "black_box")


if __name__ == "__main__":
    main()
