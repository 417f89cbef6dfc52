"""A guarded learned optimizer beside the rule alone, the guard alone and GL2O: torch modules trained by torch optimizers.

    python -m experiments.lgl2o [--rule digits_mlp] [--seeds 5] [--period 10] [--out runs/lgl2o]

The rule is a ``SmallMLP``, meta-trained for each seed as ``configs/learned_optimizer/digits_mlp.yaml`` says, or ``--rule``, a
file or a rule that comes with the package, which is then that of all seeds. The ten tasks are

- in distribution: what it was meta-trained on, on examples that it has not seen, those of "test" and those of "validation";
- out of distribution: three times the steps; two sigmoid layers; 128 tanh units; LeNet; other data (breast_cancer); inputs 100
  times as large;
- sabotaged: the rule's last layer negated, so that it goes uphill; its steps 30 times as long.

Each is trained by the rule alone, by the guard, which is SGD at the best of 13 learning rates, or of more where it is at their
end (by the end of 16 runs on training examples of that very task), by both under ``LossGuard`` with periods of ``--period``
steps, and under ``GL2O``: all from one start, on the same batches. A run is judged by the loss on all examples that it was
trained on, after its last step, for ``LossGuard`` at the end of its last period. Guards take two gradients a step. A loss that
is no number counts as infinite.

Printed are the means over seeds and four runs each, and whether the claims hold: that under ``LossGuard`` no run ends above
1.02 times the guard alone, that in distribution it ends within 1.05 times the rule alone, and keeps the learned branch in at
least half of the periods. Ratios are of means over the runs of a task and seed; how many single runs break the first claim is
said, too.

A seed takes about 4 CPU minutes, most of them for the rule. Each trial is kept when it is done, and the same command goes
on with what is missing.

Source: Prémont-Schwarz et al. 2022, "A Simple Guard for Learned Optimizers"; GL2O: Heaton et al. 2020, "Safeguarded Learned
Convex Optimization". Differs from the papers: tasks and rule are our own.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer

from experiments.l2l_mlp import mean_curve
from experiments.meta_trained import (
    Budget,
    command,
    digits,
    digits_task,
    evolution,
    kept,
    meta_train,
    parsed,
    perceptron,
    runs,
)
from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.training_curves import save_training_runs
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.base import Examples, Params, Source, require_range
from metalearn.models.vision import MLP, LeNet
from metalearn.optim.first_order import SGD
from metalearn.optim.guard import GL2O, LossGuard
from metalearn.optim.learned import LearnedRule
from metalearn.optim.mlp import CoordinateMLP
from metalearn.optim.saving import load_rule, with_weights
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.torch_face import LearnedOptimizer
from metalearn.problems.baselines import tuned
from metalearn.problems.optimizees import Optimizee
from metalearn.random import fold, integers
from metalearn.tasks.sources import TableSource

IN, OUT, SABOTAGED = "in", "out", "sabotaged"
RULE, GUARD, LGL2O, OTHER = "rule", "guard", "LossGuard", "GL2O"
ABOVE_GUARD, ABOVE_RULE, LEAST_USE = 1.02, 1.05, 0.5
NUMBERS = (RULE, GUARD, LGL2O, OTHER, "LossGuard_used", "GL2O_used", "by_rule", "by_guard", "other_by_guard")
DRAWN = ("test", "3 x the steps", "inputs x 100", "steps x 30")


class Task(NamedTuple):
    """What is trained, and with what of the rule."""

    kind: str
    problem: Optimizee
    part: str = "test"
    multiple: int = 1  # of the horizon
    uphill: bool = False
    lr: float = 1.0  # of the learned optimizer


class Scale(NamedTuple):
    """Sizes of a trial."""

    meta_steps: int = 1500
    horizon: int = 100
    period: int = 10
    runs: int = 4
    tuning_runs: int = 16


SMOKE = Scale(meta_steps=1, horizon=4, period=2, runs=1, tuning_runs=1)


class Magnified(MLP):
    """An MLP that sees its inputs 100 times as large."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(100.0 * input)


def tasks(rule: LearnedRule, horizon: int) -> dict[str, Task]:
    """The ten tasks, their data open."""

    def on(source: Source, model: Callable[[int, int], nn.Module]) -> Optimizee:
        problem = Optimizee(source, model, rule, horizon)
        problem.open(test=True)
        return problem

    images = digits()
    own = digits_task(rule, images, horizon)
    table = TableSource("breast_cancer", validation=0.3, test=0.3)
    return {
        "test": Task(IN, own),
        "validation": Task(IN, own, "validation"),
        "3 x the steps": Task(OUT, own, multiple=3),
        "32, 32 sigmoid": Task(OUT, on(images, perceptron((32, 32), "sigmoid"))),
        "128 tanh": Task(OUT, on(images, perceptron((128,), "tanh"))),
        "LeNet": Task(OUT, on(images, partial(LeNet, channels=(4, 8), widths=(32, 32)))),
        "breast_cancer": Task(OUT, on(table, perceptron())),
        "inputs x 100": Task(OUT, on(images, partial(Magnified, hidden=(32,), activation="relu"))),
        "uphill": Task(SABOTAGED, own, uphill=True),
        "steps x 30": Task(SABOTAGED, own, lr=30.0),
    }


def negated(rule: LearnedRule) -> LearnedRule:
    """The rule with its last layer negated, and so nearly all of its directions."""
    if not isinstance(rule, CoordinateMLP):
        raise ValueError(f"rule is a {type(rule).__name__}; accepted: a SmallMLP or MLPRule, whose last layer is known")
    last = len(rule.hidden_sizes)
    names = f"weight_{last}", f"bias_{last}"
    return with_weights(rule, {name: -value if name in names else value for name, value in rule.weights.items()})


def optimizers(task: Task, rule: LearnedRule, lr: float, period: int) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """What trains a module, by name: the rule, SGD with the learning rate ``lr``, and both under either guard."""
    given = negated(rule) if task.uphill else rule

    def learned(module: nn.Module) -> Optimizer:
        return LearnedOptimizer(module.parameters(), given, lr=task.lr)

    def guard(module: nn.Module) -> Optimizer:
        return torch.optim.SGD(module.parameters(), lr=lr)

    return {
        RULE: learned,
        GUARD: guard,
        LGL2O: lambda module: LossGuard(learned(module), guard(module), period),
        OTHER: lambda module: GL2O(learned(module), guard(module)),
    }


class Run(NamedTuple):
    """A training run."""

    losses: list[float]  # of every step's batch, before the step
    final: float  # on all examples, after the last
    used: float  # share of periods or steps that were the rule's; NaN without a guard


def train(task: Task, make: Callable[[nn.Module], Optimizer], steps: int, own: Tensor) -> Run:
    """Train a new module; start and batches are a function of the key ``own`` alone."""
    module = copy.deepcopy(task.problem.module)
    start, buffers = task.problem.initial(fold(own, "init"))
    module.load_state_dict(start | buffers)
    optimizer, examples = make(module), task.problem.examples(task.part, "cpu")
    losses = []
    for step in range(steps):
        losses.append(optimizer.step(partial(_closure, module, optimizer, _batch(task, own, step))))
    if isinstance(optimizer, LossGuard):
        optimizer.finish(partial(_closure, module, optimizer, _batch(task, own, steps)))
    with torch.no_grad():
        final = float(functional.cross_entropy(module(examples.inputs), examples.targets))
    used = optimizer.fraction_learned if isinstance(optimizer, LossGuard | GL2O) else math.nan
    return Run(losses, final if math.isfinite(final) else math.inf, used)


def _batch(task: Task, own: Tensor, step: int) -> Examples:
    examples = task.problem.examples(task.part, "cpu")
    rows = integers(fold(own, "batch", step), (task.problem.num_drawn,), len(examples.targets))
    return Examples(*(leaf[rows] for leaf in examples))


def _closure(module: nn.Module, optimizer: Optimizer, batch: Examples) -> float:
    optimizer.zero_grad()
    loss = functional.cross_entropy(module(batch.inputs), batch.targets)
    loss.backward()
    return loss.item()


def measure(rule: LearnedRule, seed: int, scale: Scale) -> list[dict[str, Any]]:
    """A row for each task and optimizer: learning rate of the guard, final losses and use of each run, and the mean curve."""
    rows = []
    for name, task in tasks(rule, scale.horizon).items():
        steps, keys_R = task.multiple * scale.horizon, runs(seed, "judging", scale.runs)
        tuning = task.problem.on("train"), SGD(), runs(seed, "tuning", scale.tuning_runs), steps
        lr = tuned(*tuning, tail=max(1, steps // 10)).lr
        for optimizer, make in optimizers(task, rule, lr, scale.period).items():
            found = [train(task, make, steps, own) for own in keys_R]
            row = {"task": name, "kind": task.kind, "optimizer": optimizer, "lr": lr}
            curve = torch.tensor([run.losses for run in found]).mean(0).tolist()
            rows.append(
                row | {"final": [run.final for run in found], "used": [run.used for run in found], "curve": curve}
            )
    return rows


# -- trials ------------------------------------------------------------------------------------------------------------


def rule_of(given: str | None, seed: int, scale: Scale, out: Path) -> LearnedRule:
    """The rule of all seeds, or one that is meta-trained for this seed."""
    if given is not None:
        return load_rule(given)
    problem = digits_task(SmallMLP(), horizon=scale.horizon)
    window, budget = min(10, scale.horizon), Budget(scale.meta_steps)
    path = out / f"rule_{scale.horizon}_{scale.meta_steps}_{seed}.safetensors"  # all that it depends on

    def make() -> Params:
        return meta_train(problem, evolution(), seed, budget, window=window)

    return with_weights(SmallMLP(), kept(path, problem, make))


def run(rule: str | None, seeds: int, scale: Scale, out: Path, budget_minutes: float) -> list[dict[str, Any]]:
    """All trials, those of an earlier call among them; none is begun after ``budget_minutes``."""
    file, settings = out / "trials.jsonl", {"rule": rule, **scale._asdict()}
    done = [trial for trial in read_trials(file) if trial["settings"] == settings]
    ends = time.monotonic() + 60 * budget_minutes
    for seed in sorted(set(range(seeds)) - {trial["seed"] for trial in done}):
        if time.monotonic() > ends:
            break
        trial = {"seed": seed, "settings": settings, "rows": measure(rule_of(rule, seed, scale, out), seed, scale)}
        keep_trial(file, trial)
        done.append(trial)
        print(f"seed {seed} is done", flush=True)
    return [trial for trial in done if trial["seed"] < seeds]


def pairs(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and seed: mean final loss of each optimizer, ratios, use, and single runs above the guard."""
    rows = []
    for trial in trials:
        by_task: dict[str, dict[str, dict[str, Any]]] = {}
        for row in trial["rows"]:
            by_task.setdefault(row["task"], {})[row["optimizer"]] = row
        for name, own in by_task.items():
            place = {"task": name, "kind": own[RULE]["kind"], "seed": trial["seed"], "lr": own[GUARD]["lr"]}
            rows.append(place | _ratios(own))
    return rows


def _ratios(own: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a task and seed say, from the rows of its optimizers."""
    ends, means = ({name: _mean(row[what]) for name, row in own.items()} for what in ("final", "curve"))
    beside = zip(own[LGL2O]["final"], own[GUARD]["final"], strict=True)
    return {
        **ends,
        **{f"{name}_used": _mean(own[name]["used"]) for name in (LGL2O, OTHER)},
        "by_rule": _ratio(ends[LGL2O], ends[RULE]),
        "mean_by_rule": _ratio(means[LGL2O], means[RULE]),
        "by_guard": _ratio(ends[LGL2O], ends[GUARD]),
        "other_by_guard": _ratio(ends[OTHER], ends[GUARD]),
        "above": sum(not guarded <= ABOVE_GUARD * alone for guarded, alone in beside),
        "runs": len(own[LGL2O]["final"]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(loss: float, other: float) -> float:
    """Infinite where the loss is; 0 beside an infinite one."""
    return loss / other if math.isfinite(loss) else math.inf


def table_of(found: Sequence[dict[str, Any]]) -> Any:
    """A row for each task: means over seeds, and the worst ratio to the guard of any seed."""
    rows = []
    for name in dict.fromkeys(row["task"] for row in found):
        own = [row for row in found if row["task"] == name]
        means = {number: _mean([row[number] for row in own]) for number in NUMBERS}
        worst = {f"worst_{number}": max(row[number] for row in own) for number in ("by_guard", "other_by_guard")}
        rows.append({"task": name, "kind": own[0]["kind"], "n": len(own), **means, **worst})
    return trial_frame(rows)


def claims(found: Sequence[dict[str, Any]]) -> list[str]:
    """What became of the claims, in sentences."""
    inside = [row for row in found if row["kind"] == IN]
    by_rule, mean_by_rule, used = (
        [row[name] for row in inside] for name in ("by_rule", "mean_by_rule", f"{LGL2O}_used")
    )
    above, runs = (sum(row[name] for row in found) for name in ("above", "runs"))
    return [
        f"{LGL2O} {_above_guard(found, 'by_guard')}; in {above} of {runs} single runs",
        f"{OTHER} {_above_guard(found, 'other_by_guard')}",
        f"in distribution {LGL2O} ends at {_mean(by_rule):.3f} x the rule alone, at most at {max(by_rule):.3f} (claimed: "
        f"{ABOVE_RULE}); its mean loss over all steps is {_mean(mean_by_rule):.3f} x the rule's",
        f"in distribution it keeps the learned branch in {_mean(used):.2f} of the periods, at least in {min(used):.2f} "
        f"(claimed: {LEAST_USE})",
    ]


def _above_guard(found: Sequence[dict[str, Any]], ratio: str) -> str:
    above, worst = sum(row[ratio] > ABOVE_GUARD for row in found), max(found, key=lambda row: row[ratio])
    return (
        f"ends above {ABOVE_GUARD} x the guard alone in {above} of {len(found)} tasks and seeds, at worst at "
        f"{worst[ratio]:.3f} ({worst['task']}, seed {worst['seed']})"
    )


def curve_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean curve over seeds of each optimizer, on four of the tasks."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for trial in trials for row in trial["rows"] if row["task"] in DRAWN):
        groups.setdefault((row["task"], row["optimizer"]), []).append(row)
    table = []
    for (task, name), rows in groups.items():
        table += mean_curve(rows, {"problem": task, "horizon": 1, "optimizer": name})
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/lgl2o", seeds=5)
    parser.add_argument(
        "--rule", help="a file, or a rule that comes with the package; else one is meta-trained per seed"
    )
    parser.add_argument("--period", type=int, help="of LossGuard, in steps, at least 1")
    options = parsed(parser, argv)
    scale = SMOKE if options.smoke else Scale()
    if options.period is not None:
        require_range("period", options.period, 1)
        scale = scale._replace(period=options.period)
    trials = run(options.rule, options.seeds, scale, options.out, options.budget_minutes)
    found = pairs(trials)
    table = table_of(found)
    write_table(table, options.out / "table")
    save_training_runs(trial_frame(curve_rows(trials)), options.out / "curves.png")
    print(f"\nloss on all examples after the last step\n\n{format_table(table)}\n")
    print("\n".join(claims(found)))


if __name__ == "__main__":
    main()
