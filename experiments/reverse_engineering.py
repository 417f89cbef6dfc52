"""What a trained LSTM does to a gradient, found by functions that find what was planted in optimizers made by hand.

    python -m experiments.l2l_quadratics --entries uniform
    python -m experiments.reverse_engineering --rule runs/l2l_quadratics/uniform_*.safetensors [--out runs/reverse_engineering]

1. Planted rules: momentum .5, .9 and .99, clipping at 1, a step that is halved after 20 updates, division by the root mean
   square of gradients. Each has to be found within 10 %.
2. Each ``--rule``, at the median size of the gradients that it meets on random quadratics (or ``--scale``): the same
   numbers; what it remembers around the states where it rests under gradients of several sizes, beside the running mean of
   gradients that explains its updates best; and the curvature from which it would diverge, by its spectral radius at rest
   (``edge``), beside the largest that it meets.

Prints tables, and writes them as CSV with a figure for the planted rules and one for the others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metalearn.analysis.compare import format_table
from metalearn.analysis.coordinates import Coordinate
from metalearn.analysis.optimizer_curves import plot_optimizers
from metalearn.analysis.optimizers import drive, findings, fixed_point, linearise, modes, running_mean
from metalearn.analysis.stability import stability
from metalearn.analysis.trials import trial_frame
from metalearn.base import Rule, require_range
from metalearn.optim.first_order import SGD, Adam, Clipped, RMSProp, Scheduled
from metalearn.optim.learned import LearnedRule
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.saving import load_rule
from metalearn.optim.schedules import InverseTime
from metalearn.problems.quadratics import ENTRIES, Quadratics
from metalearn.random import key
from metalearn.unroll import inner_gradient, unroll

TOLERANCE = 0.1
PLANTED: dict[str, tuple[Rule, str, float]] = {
    "momentum .5": (SGD(0.1, momentum=0.5), "momentum", 0.5),
    "momentum .9": (SGD(0.1, momentum=0.9), "momentum", 0.9),
    "momentum .99": (SGD(0.1, momentum=0.99), "momentum", 0.99),
    "clipping at 1": (Clipped(SGD(0.1), 1.0), "clipping", 1.0),
    "decaying step": (Scheduled(SGD(0.1), InverseTime(20)), "half_life", 20.0),
    "RMSProp": (RMSProp(0.1), "adaptation_exponent", 1.0),
}
CURVATURES = np.geomspace(1e-3, 1e4, 300)


def planted_rows(steps: int, seed: int) -> list[dict[str, Any]]:
    """For each planted rule: rule, quantity, planted, found, error (relative), held, then all of ``findings``."""
    rows = []
    for name, (rule, quantity, planted) in PLANTED.items():
        found = findings(Coordinate(rule), 1.0, steps, seed)
        error = abs(found[quantity] / planted - 1)
        own = {"rule": name, "quantity": quantity, "planted": planted, "found": found[quantity], "error": error}
        rows.append(own | {"held": "yes" if error <= TOLERANCE else "NO"} | found)
    return rows


class Met(NamedTuple):
    """What a rule meets on random quadratics: the median size of a coordinate's gradient, and of the largest curvature."""

    gradient: float
    curvature: float


def met(rule: Rule, entries: str, steps: int, seed: int, runs: int = 8) -> Met:
    """Gradients are those of all steps of runs of this learned rule."""
    assert isinstance(rule, LearnedRule)
    problem, meta, gradients, curvatures = Quadratics(rule, steps, entries=entries), rule.weights, [], []
    for run in range(runs):
        own = key(seed, "met", run)
        with torch.no_grad():
            states = unroll(problem, meta, problem.init(meta, own), problem.batches(own, steps), own, keep_all).states
        gradients += [inner_gradient(problem, meta, state, None, own)[0]["x"].abs() for state in states.values()]
        curvatures.append(2 * torch.linalg.matrix_norm(states[0].extra["W"], 2) ** 2)
    return Met(float(torch.cat(gradients).median()), float(torch.stack(curvatures).median()))


def keep_all(k: int) -> bool:
    return True


def memories(rule: Coordinate, scale: float, steps: int, seed: int) -> list[dict[str, Any]]:
    """The strongest mode where the rule rests under several gradients, beside the best running mean of gradients.

    Returns:
        Rows of grad, residual, modulus, timescale, mean_timescale (of the running mean), ratio (of the two), explains.
    """
    mean, rows = running_mean(drive(rule, scale, steps // 2, seed=seed)), []
    lasting = -1 / np.log(mean.decay) if mean.decay > 0 else 0.0
    for grad in (-scale, -scale / 10, 0.0, scale / 10, scale):
        point = fixed_point(rule, grad, steps // 2)
        frame = modes(linearise(rule, point))
        modulus, timescale = (float(frame[name].iloc[0]) for name in ("modulus", "timescale"))
        own = {"grad": grad, "residual": point.residual, "modulus": modulus, "timescale": timescale}
        ratio = timescale / lasting if lasting else np.inf
        rows.append(own | {"mean_timescale": lasting, "ratio": ratio, "explains": mean.explained})
    return rows


def edge(rule: Coordinate, steps: int) -> float:
    """The least curvature at which the rule's spectral radius at rest is above 1; NaN where there is none up to 10^4.

    A rule whose state grows by itself, or that rests nowhere, is above 1 from the first.
    """
    frame = stability(linearise(rule, fixed_point(rule, 0.0, steps // 2)), CURVATURES.tolist())
    beyond = frame.loc[frame["radius"] > 1 + 1e-9, "curvature"]
    return float(beyond.min())


def analyse(rules: dict[str, Rule], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What is found of learned rules, and their memories; draws the figure of them beside momentum and Adam."""
    steps, seed, rows, remembered, drawn = options.steps, options.seed, [], [], {}
    scale = 1.0
    for name, rule in rules.items():
        here = met(rule, options.entries, steps, seed) if options.scale is None else Met(options.scale, np.nan)
        scale = here.gradient
        own = Coordinate(rule, others=options.others, spread=scale)
        limits = {"edge": edge(own, steps), "met": here.curvature}
        rows.append({"rule": name, "scale": scale} | findings(own, scale, steps, seed) | limits)
        remembered += [{"rule": name} | row for row in memories(own, scale, steps, seed)]
        drawn[name] = own
    shown = dict(list(drawn.items())[:5]) | {"momentum .9": Coordinate(SGD(momentum=0.9)), "Adam": Coordinate(Adam())}
    plot_optimizers(shown, scale, steps).savefig(options.out / "learned.png", dpi=150)
    return {"findings": rows, "memories": remembered}


def main(argv: Sequence[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", nargs="+", default=[], help="files of learned rules; without, the planted ones alone")
    parser.add_argument("--entries", choices=ENTRIES, default="uniform", help="numbers of the quadratics")
    parser.add_argument("--scale", type=float, default=None, help="size of gradients (> 0); default: on the quadratics")
    parser.add_argument("--others", type=int, default=0, help="further parameters for rules that look at whole tensors")
    parser.add_argument("--steps", type=int, default=100, help="updates of a run (>= 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/reverse_engineering"))
    parser.add_argument(
        "--smoke", action="store_true", help="an untrained LSTM and ten steps; the numbers mean nothing"
    )
    options = parser.parse_args(argv)
    require_range("steps", options.steps, 1)
    if options.scale is not None and not options.scale > 0:
        raise ValueError(f"scale is {options.scale}; accepted: scale > 0")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    planted = trial_frame(planted_rows(100, options.seed))
    planted.to_csv(options.out / "planted.csv", index=False)
    print(format_table(planted.iloc[:, :6]))
    by_hand = {name: Coordinate(rule) for name, (rule, *_) in PLANTED.items()}
    plot_optimizers(by_hand, 1.0, 100).savefig(options.out / "planted.png", dpi=150)
    rules: dict[str, Rule] = {Path(path).stem: load_rule(path) for path in options.rule}
    if options.smoke:
        rules["untrained"], options.steps = CoordinateLSTM([3], "none", 1.0), 10
    if rules:
        for name, rows in analyse(rules, options).items():
            frame = trial_frame(rows)
            frame.to_csv(options.out / f"{name}.csv", index=False)
            print(f"\n{name}\n{format_table(frame)}")
    return bool((planted["held"] == "yes").all())


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
