"""A data set condensed into one image per class: truncated and full backpropagation, Neumann and (FG)2U, at equal wall time.

    python -m experiments.fg2u_condensation [--source mnist] [--seeds 5] [--budget_minutes 40] [--out runs/condensation]

Inner: 100 steps of gradient descent at .01 on ten images, a fresh MLP-64 every time, images of 14 x 14 pixels (digits: 8 x
8). Outer: cross-entropy of 512 real training examples. Every method trains for the same number of seconds on one thread,
in turns of ``SLICE`` seconds with all others, so that whatever else the machine does slows all of them. ``--clock cpu``
counts seconds in which the thread ran: the wall time on a machine that has a core to spare. First estimates, which warm
up, are not counted. Adam's learning rate falls linearly in time to zero. It was picked by the meta-loss on seed 100: of .1
and .3 for each method (``--rate``), and of .01 and .03 for the second phase. The two-phase method has half the time for each
phase, and Adam begins anew with the second, whose gradients are of another size.

Reported, over fresh networks that were not trained with: accuracy on the source's test part, and the meta-loss, on all
training examples. Beside them the outer steps that there was time for, and the cosine of the last gradient with the exact
one. Each trial is kept as soon as it is done, and the same command goes on with those that are missing.

Source: the setting of Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization",
data condensation. Differs from the paper: smaller images and networks, and minutes instead of hours; no weight decay.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metalearn import tree
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.trials import keep_trial, read_trials, summarise_trials, trial_frame
from metalearn.base import Estimator, MetaGradient, Params, Tree, require_range
from metalearn.estimators.forward import ForwardGradient, TwoPhase
from metalearn.estimators.implicit import Neumann
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD
from metalearn.problems.distillation import Distillation
from metalearn.random import fold, key
from metalearn.tasks.sources import ImageSource

SLICE = 2.0  # seconds of a turn
PHASE = 0.5  # share of the time that the first of two phases has
LR = 0.01  # of the inner run
FRESH = 10  # networks that learned images are judged by
ENDLESS = 2**31  # estimates: phases are told apart by the clock
START = "the real images that all begin with"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VALUES = {"accuracy": 4, "meta_loss": 4, "outer_steps": 0, "cosine": 3} | dict.fromkeys(CLOCKS, 1)


@dataclass(frozen=True)
class Method:
    """An estimator, and the outer learning rate of each of its phases."""

    estimator: Callable[[], Estimator]
    rates: tuple[float, ...]


def methods(directions: int) -> dict[str, Method]:
    """All methods by name."""

    def neumann() -> Estimator:
        return Neumann(terms=20, step_size=LR, warm_start=False)

    def forward() -> Estimator:
        return ForwardGradient(directions)

    return {
        "full reverse": Method(Unrolled, (0.1,)),
        "truncated reverse, last 5 steps": Method(lambda: Unrolled(truncate=5), (0.1,)),
        "truncated reverse, last 20 steps": Method(lambda: Unrolled(truncate=20), (0.1,)),
        "Neumann, 20 terms": Method(neumann, (0.1,)),
        f"(FG)2U, {directions} directions": Method(forward, (0.1,)),
        "two-phase: Neumann, (FG)2U": Method(lambda: TwoPhase(neumann(), forward(), ENDLESS), (0.1, 0.01)),
    }


class Trial:
    """One method on one seed, trained in slices of time."""

    def __init__(self, method: Method, problem: Distillation, seed: int, budget: float, clock: str):
        self.method, self.problem, self.seed, self.budget, self.clock = method, problem, seed, budget, clock
        self.estimator = method.estimator()
        self.meta = {name: value.requires_grad_() for name, value in problem.init_meta(key(seed, "meta")).items()}
        self.phase, self.optimizer = 0, self._adam(0)
        self.state = self.estimator.init(problem, self.meta, key(seed, "estimator"))
        self.outer_steps, self.spent = 0, dict.fromkeys(CLOCKS, 0.0)
        for phase in _phases(self.estimator):
            self._estimate(phase, {})

    @property
    def seconds(self) -> float:
        """What the budget is compared with."""
        return self.spent[self.clock]

    def train(self, seconds: float) -> None:
        """Outer steps until ``seconds`` are over, or the budget is."""
        until = min(self.seconds + seconds, self.budget)
        while self.seconds < until:
            began = {name: now() for name, now in CLOCKS.items()}
            self._step()
            self.spent = {name: self.spent[name] + now() - began[name] for name, now in CLOCKS.items()}

    def _step(self) -> None:
        left = 1 - self.seconds / self.budget
        if isinstance(self.estimator, TwoPhase) and self.phase == 0 and left < 1 - PHASE:
            self.estimator.switch, self.phase = self.outer_steps, 1
            self.optimizer = self._adam(1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.method.rates[self.phase] * left
        found = self._estimate(self.estimator, self.state)
        self.state = found.state
        for name, value in self.meta.items():
            value.grad = found.grad[name]
        self.optimizer.step()
        self.outer_steps += 1

    def _estimate(self, estimator: Estimator, state: Tree) -> MetaGradient:
        """The estimate of the next outer step, whose network and examples are the same for all methods."""
        step_key = key(self.seed, "step", self.outer_steps)
        batches = self.problem.batches(fold(step_key, "data"), self.problem.horizon or 0)
        return estimator.estimate(self.problem, self.meta, state, batches, fold(step_key, "estimate"))

    def _adam(self, phase: int) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.meta.values(), lr=self.method.rates[phase])

    def result(self) -> dict[str, float]:
        """What the table says of a trial that is done."""
        own, exact = self._estimate(self.estimator, self.state).grad, self._estimate(Unrolled(), {}).grad
        cosine = tree.dot(own, exact) / (tree.norm(own) * tree.norm(exact))
        judged = judge(self.problem, tree.detach(self.meta), self.seed)
        return judged | self.spent | {"outer_steps": self.outer_steps, "cosine": float(cosine)}


def _phases(estimator: Estimator) -> tuple[Estimator, ...]:
    return (estimator.first, estimator.second) if isinstance(estimator, TwoPhase) else (estimator,)


def judge(problem: Distillation, meta: Params, seed: int) -> dict[str, float]:
    """Test accuracy and meta-loss of images, over fresh networks trained on them."""
    keys = [key(seed, "judge", number) for number in range(FRESH)]
    ends = [problem.trained(meta, one, problem.batches(one, problem.horizon or 0)).end for one in keys]
    accuracy = [problem.score(end, "test")["accuracy"] for end in ends]
    loss = [problem.score(end, "train")["loss"] for end in ends]
    return {"accuracy": sum(accuracy) / FRESH, "meta_loss": sum(loss) / FRESH}


def train_in_turns(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Every trial as soon as it has had its time."""
    left = list(trials)
    while left:
        for trial in list(left):
            trial.train(SLICE)
            if trial.seconds >= trial.budget:
                left.remove(trial)
                yield trial


def run_seed(problem: Distillation, chosen: dict[str, Method], seed: int, file: Path, settings: dict[str, Any]) -> None:
    """All trials of a seed that are not in the file yet."""
    kept = {trial["method"] for trial in read_trials(file) if trial["seed"] == seed}
    if START not in kept:
        start = judge(problem, problem.init_meta(key(seed, "meta")), seed)
        keep_trial(file, {"method": START, "seed": seed, "settings": settings} | start)
    missing = {name: method for name, method in chosen.items() if name not in kept}
    budget, clock = settings["budget"], settings["clock"]
    names = {Trial(method, problem, seed, budget, clock): name for name, method in missing.items()}
    for trial in train_in_turns(list(names)):
        keep_trial(file, {"method": names[trial], "seed": seed, "settings": settings} | trial.result())
        print(f"seed {seed}, {names[trial]}: {read_trials(file)[-1]['accuracy']:.4f}", flush=True)


def build_problem(source: str, smoke: bool) -> Distillation:
    """Ten images of the source, and the run that they are judged by."""
    images = ImageSource("digits") if source == "digits" else ImageSource(source, image_size=14, test="test")
    horizon, hidden, outer = (5, 8, 64) if smoke else (100, 64, 512)
    rule = SGD(LR)
    problem = Distillation(images, partial(MLP, hidden=(hidden,)), rule, horizon, outer_batch_size=outer)
    problem.open(test=True)
    return problem


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="digits", help="digits, or a data set with a test split such as mnist")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (>= 1)")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--budget_minutes", type=float, default=40.0, help="training time of all trials together (> 0)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what the budget is counted by")
    parser.add_argument("--directions", type=int, default=64, help="of (FG)2U (>= 1)")
    parser.add_argument("--rate", type=float, help="one outer learning rate for all methods, to pick them by")
    parser.add_argument("--only", default="", help="methods whose names contain this text")
    parser.add_argument("--out", type=Path, default=Path("runs/condensation"), help="folder of trials and table")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args(argv)
    require_range("seeds", args.seeds, 1)
    if not args.budget_minutes > 0:
        raise ValueError(f"budget_minutes is {args.budget_minutes}; accepted: budget_minutes > 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    chosen = {name: method for name, method in methods(args.directions).items() if args.only in name}
    if args.rate is not None:
        chosen = {name: Method(one.estimator, (args.rate,) * len(one.rates)) for name, one in chosen.items()}
    budget = 0.1 if args.smoke else 60 * args.budget_minutes / (args.seeds * len(chosen))
    settings = {
        "source": args.source,
        "budget": budget,
        "clock": args.clock,
        "directions": args.directions,
        "smoke": args.smoke,
    }
    settings |= {"rates": {name: list(method.rates) for name, method in chosen.items()}}
    file = args.out / "trials.jsonl"
    require_same_settings(file, settings)
    problem = build_problem(args.source, args.smoke)
    print(
        f"{len(chosen)} methods, {args.seeds} seeds, {budget:.1f} s of {args.clock} time each, {args.source}",
        flush=True,
    )
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        run_seed(problem, chosen, seed, file, settings)
    order = [START, *chosen]
    show(sorted(read_trials(file), key=lambda trial: (order.index(trial["method"]), trial["seed"])), order[1], args.out)


def require_same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raise ``ValueError`` where the file has trials of other settings."""
    for trial in read_trials(file):
        if differing := sorted(name for name, value in settings.items() if trial["settings"][name] != value):
            raise ValueError(f"{file} has trials of other {', '.join(differing)}; accepted: the same, or another --out")


def show(trials: Sequence[dict[str, Any]], baseline: str, out: Path) -> None:
    """Print the table and the paired differences of accuracy from one method, and write both."""
    table = summarise_trials(trials, VALUES)
    paired = paired_comparison(trial_frame(trials), group="method", value="accuracy", baseline=baseline)
    write_table(table, out / "table")
    write_table(paired, out / "paired")
    print(f"\n{format_table(table)}\n\ntest accuracy, paired by seed\n\n{format_table(paired)}")


if __name__ == "__main__":
    main()
