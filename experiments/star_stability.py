"""Whether STAR stays stable where the factored MLP does not: on longer runs than those of meta-training, and on unlike tasks.

    python -m experiments.star_stability [--rules ...] [--seeds 5] [--steps 400] [--out runs/star_stability]

Both are meta-trained for ``--steps`` outer steps by NRES on the task of configs/learned_optimizer/digits_mlp.yaml (100 steps of a
network of 64-32-10 units), each with and without the weight decay of the meta-parameters that STAR asks for (AdamW's, 0.5), so
that it can be said what decay does and what the nominal term does. Steps of the factored MLP are of the size 0.01 (its
``step_mult``), those of STAR and of its nominal term 0.001, which is their default, and 0.01. Every 20 steps the mean loss over
100 steps of 16 runs on "validation" is compared with that of Adam at its best rate: parity is the first time that it is no
larger.

Tested are 8 runs a seed on the digits of "test": the task itself at 1, 10 and 100 times the horizon; at 10 times also two
hidden layers of 64, a small LeNet, an autoencoder, and parameters rescaled by up to 10 either way. Beside stands Adam, with a
constant rate and with one that falls along a cosine, at the best of 8 learning rates for that task and length (by the mean loss
of 16 runs on training digits).

A run has diverged where its loss, mean over the last tenth of its steps, is not finite or above that of its first step. Table:
share of runs that diverged, median of the final loss over runs (least and greatest over seeds), and its ratio to Adam's with
a constant rate, mean over seeds with a bootstrap interval; then outer steps to parity. Figures: the median curves.

Takes about 5 CPU minutes for each rule and seed, and 15 in all for Adam: 140 for everything. Each trial is kept when it is done,
weights beside it, and the same command goes on with those that are missing.

Source: Harrison et al. 2022, "A Closer Look at Learned Optimization: Stability, Robustness, and Inductive Biases", sections 4
and 5. Differs from the paper: one small task to learn from, minutes of meta-training.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.meta_trained import (
    ADAMS,
    Budget,
    at_best_rate,
    command,
    digits,
    digits_task,
    evolution,
    final,
    gather,
    meta_train,
    parsed,
    perceptron,
    runs,
)
from metalearn.analysis.compare import bootstrap_interval, format_table, write_table
from metalearn.analysis.training_curves import save_training_runs
from metalearn.analysis.trials import trial_frame
from metalearn.base import Params, require_choice, require_range
from metalearn.models.vision import LeNet
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.learned import LearnedRule
from metalearn.optim.saving import save_rule
from metalearn.optim.star import STAR
from metalearn.problems.baselines import Baseline, curves
from metalearn.problems.comparison import mean_loss
from metalearn.problems.optimizees import Optimizee


class Recipe(NamedTuple):
    """A rule before meta-training, and the outer AdamW's weight decay."""

    rule: Callable[[], LearnedRule]
    weight_decay: float


RULES = {
    "STAR": Recipe(STAR, 0.5),
    "STAR without meta decay": Recipe(STAR, 0.0),
    "STAR, steps of 0.01": Recipe(lambda: STAR(step_mult=0.01, nominal_lr=0.01), 0.5),
    "factored MLP": Recipe(lambda: FactoredMLP(step_mult=0.01), 0.0),
    "factored MLP with meta decay": Recipe(lambda: FactoredMLP(step_mult=0.01), 0.5),
}
RATES = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2)
ADAM = "Adam"
RIVALS = {name: rival._replace(rates=RATES) for name, rival in ADAMS.items()}
HOME = "its own"
UNLIKE = ("deeper and wider", "LeNet", "autoencoder", "rescaled")
POINTS = 100  # of a curve that is kept
SHOWN = ["task", "multiple", "rule", "seeds", "diverged", "final_loss", "least", "greatest", "ratio", "ratio_low"]
SHOWN += ["ratio_high"]


class Scale(NamedTuple):
    """Sizes of the experiment."""

    steps: int = 400
    watched: int = 20  # outer steps between comparisons with Adam
    horizon: int = 100
    longer: int = 10  # multiple of the horizon, on all tasks; its square on the task itself
    tuning_runs: int = 16
    runs: int = 8


SMOKE = Scale(steps=1, watched=1, horizon=2, longer=2, tuning_runs=1, runs=2)


def task(name: str, rule: LearnedRule, horizon: int) -> Optimizee:
    """A task by its name, as it is at the horizon of meta-training."""
    if name == HOME:
        return digits_task(rule, horizon=horizon)
    if name == "rescaled":
        return digits_task(rule, horizon=horizon, rescale=10.0)
    if name == "autoencoder":
        return digits_task(rule, horizon=horizon, target="input")
    model = perceptron((64, 64)) if name == "deeper and wider" else partial(LeNet, channels=(4, 8), widths=(32, 32))
    problem = Optimizee(digits(), model, rule, horizon=horizon)
    problem.open(test=True)
    return problem


def places(scale: Scale) -> list[tuple[str, int]]:
    """Every task with the multiple of the horizon that it is run for."""
    own = [(HOME, multiple) for multiple in (1, scale.longer, scale.longer**2)]
    return own + [(name, scale.longer) for name in UNLIKE]


# -- a trial -----------------------------------------------------------------------------------------------------------


def measured(losses_RT: Tensor) -> dict[str, Any]:
    """Which runs diverged, the median of the final losses, and the curve of medians at ``POINTS`` steps or fewer."""
    ends_R = final(losses_RT)
    diverged_R = ~(ends_R.isfinite() & (ends_R <= losses_RT[:, 0]))
    whole = losses_RT.nan_to_num(math.inf, math.inf, math.inf)
    shown = torch.linspace(0, losses_RT.shape[1] - 1, min(POINTS, losses_RT.shape[1])).long()
    curve = whole[:, shown].quantile(0.5, 0, interpolation="higher")
    ending = final(whole).quantile(0.5, interpolation="higher")
    return {"diverged": diverged_R.tolist(), "final_loss": float(ending), "at": shown.tolist(), "curve": curve.tolist()}


def learned(name: str, seed: int, scale: Scale, out: Path, level: Callable[[int], float]) -> dict[str, Any]:
    """The trial of a learned rule: the way to parity, and its runs on every task.

    Args:
        name: of the rule.
        seed: of everything.
        scale: sizes.
        out: folder of the weights.
        level: tuned Adam's mean loss on the runs by which parity is judged, of a seed.
    """
    recipe, way = RULES[name], list[tuple[int, float]]()
    rule = recipe.rule()
    problem, keys_R = digits_task(rule, horizon=scale.horizon), runs(seed, "watch", scale.tuning_runs)

    def watch(steps: int, seconds: float, meta: Params) -> None:
        if steps % scale.watched == 0:
            way.append((steps, mean_loss(problem, meta, keys_R, "validation")))

    budget, decay = Budget(scale.steps), recipe.weight_decay
    meta = meta_train(problem, evolution(), seed, budget, weight_decay=decay, watch=watch)
    save_rule(out / f"{name.replace(' ', '_')}_{seed}.safetensors", rule, meta, outer_steps=scale.steps)
    adam = level(seed)
    parity = next((steps for steps, loss in way if loss <= adam), math.inf)
    return {"parity": parity, "way": way, "adam": adam, "rows": tested(rule, meta, scale, seed)}


def tested(rule: LearnedRule, meta: Params, scale: Scale, seed: int) -> list[dict[str, Any]]:
    """Rows of all tasks and lengths. What a learned rule does first does not depend on how long it will run."""
    rows = []
    for name in (HOME, *UNLIKE):
        multiples = [multiple for where, multiple in places(scale) if where == name]
        problem, keys_R = task(name, rule, scale.horizon), runs(seed, "test", scale.runs)
        losses_RT = curves(problem.on("test"), rule, meta, keys_R, max(multiples) * scale.horizon)
        rows += [
            {"task": name, "multiple": multiple, **measured(losses_RT[:, : multiple * scale.horizon])}
            for multiple in multiples
        ]
    return rows


def hand_made(baseline: Baseline, name: str, multiple: int, seeds: int, scale: Scale) -> list[dict[str, Any]]:
    """A row for each seed of an optimizer that is tuned once for a task and a length."""
    problem, steps = task(name, STAR(), scale.horizon), multiple * scale.horizon
    judging = torch.cat([runs(seed, "test", scale.runs) for seed in range(seeds)])
    best = at_best_rate(problem, baseline, runs(0, "tuning", scale.tuning_runs), judging, steps)
    own = best.losses.split(scale.runs)
    return [{"task": name, "multiple": multiple, "lr": best.lr, **measured(losses_RT)} for losses_RT in own]


def adam_level(scale: Scale) -> Callable[[int], float]:
    """Adam's mean loss over the horizon on the runs by which a seed's parity is judged."""
    problem = digits_task(STAR(), horizon=scale.horizon)
    tuning = runs(0, "tuning", scale.tuning_runs)

    @cache
    def level(seed: int) -> float:
        judging = runs(seed, "watch", scale.tuning_runs)
        best = at_best_rate(problem, RIVALS[ADAM], tuning, judging, scale.horizon, "validation")
        return float(best.losses.mean())

    return level


# -- tables ------------------------------------------------------------------------------------------------------------


def rows_of(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all trials, each with its rule and seed."""
    return [{"seed": trial.get("seed", place), "rule": trial["rule"], **row}
            for trial in trials for place, row in enumerate(trial["rows"])]  # fmt: skip


def result_table(trials: Sequence[dict[str, Any]]) -> Any:
    """A row per task, length and rule, in the columns ``SHOWN``."""
    groups: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows_of(trials):
        place = row["task"], row["multiple"]
        groups.setdefault(place, {}).setdefault(row["rule"], {})[row["seed"]] = row
    table = []
    for (name, multiple), by_rule in groups.items():
        adam = by_rule.get(ADAM, {})
        for rule, own in by_rule.items():
            ends = [row["final_loss"] for row in own.values()]
            ratios = [own[seed]["final_loss"] / adam[seed]["final_loss"] for seed in own if seed in adam]
            low, high = bootstrap_interval(ratios) if len(ratios) > 1 else (math.nan, math.nan)
            row = {"task": name, "multiple": multiple, "rule": rule, "seeds": len(own)}
            row |= {"diverged": statistics.fmean(one for row in own.values() for one in row["diverged"])}
            row |= {"final_loss": statistics.median(ends), "least": min(ends), "greatest": max(ends)}
            row |= {"ratio": statistics.fmean(ratios) if ratios else math.nan, "ratio_low": low, "ratio_high": high}
            table.append(row)
    return trial_frame(table)[SHOWN]


def parity_table(trials: Sequence[dict[str, Any]]) -> Any:
    """Outer steps to Adam's mean loss, a row per rule: the median over seeds, infinite where half do not get there."""
    by_rule: dict[str, list[float]] = {}
    for trial in trials:
        if "parity" in trial:
            by_rule.setdefault(trial["rule"], []).append(trial["parity"])
    rows = []
    for rule, steps in by_rule.items():
        row = {"rule": rule, "seeds": len(steps), "reached": sum(map(math.isfinite, steps))}
        rows.append(row | {"median": statistics.median(steps), "least": min(steps), "greatest": max(steps)})
    return trial_frame(rows)


def curve_rows(trials: Sequence[dict[str, Any]], wanted: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """The median over seeds of the median curves, for a figure of some tasks and lengths."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows_of(trials):
        if (row["task"], row["multiple"]) in wanted:
            groups.setdefault((row["task"], row["multiple"], row["rule"]), []).append(row)
    table = []
    for (name, multiple, rule), own in groups.items():
        place = {"problem": name, "horizon": multiple, "optimizer": rule, "lr": own[0].get("lr", math.nan)}
        for place_in_curve, step in enumerate(own[0]["at"]):
            losses = [row["curve"][place_in_curve] for row in own]
            middle = statistics.median(losses)
            shown = middle if math.isfinite(middle) else math.nan
            table.append(place | {"step": step, "loss": shown, "standard_error": 0.0})
    return table


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/star_stability", 5)
    parser.add_argument("--rules", nargs="+", default=list(RULES), help=f"of {', '.join(map(repr, RULES))}")
    parser.add_argument("--steps", type=int, default=Scale().steps, help="outer steps of meta-training (>= 1)")
    options = parsed(parser, argv)
    for name in options.rules:
        require_choice("rules", name, RULES)
    require_range("steps", options.steps, 1)
    scale = SMOKE if options.smoke else Scale(steps=options.steps)
    out, level = options.out, adam_level(scale)

    def make(rule: str, seed: int = 0, task: str = HOME, multiple: int = 1, seeds: int = 1) -> dict[str, Any]:
        if rule in RIVALS:
            return {"rows": hand_made(RIVALS[rule], task, multiple, seeds, scale)}
        trial = learned(rule, seed, scale, out, level)
        print(f"{rule}, seed {seed}: parity with Adam after {trial['parity']} outer steps", flush=True)
        return trial

    ours = [{"rule": name, "seed": seed} for seed in range(options.seeds) for name in options.rules]
    theirs = [
        {"rule": name, "task": where, "multiple": multiple, "seeds": options.seeds}
        for where, multiple in places(scale)
        for name in RIVALS
    ]
    trials = gather([*theirs, *ours], make, scale._asdict(), out, options.budget_minutes)
    if not trials:
        return
    longer, unlike = ([place for place in places(scale) if (place[0] == HOME) == own] for own in (True, False))
    table, parity = result_table(trials), parity_table(trials)
    write_table(table, out / "table")
    write_table(parity, out / "parity")
    for name, wanted in (("longer", longer), ("unlike", unlike)):
        save_training_runs(trial_frame(curve_rows(trials, wanted)), out / f"{name}.png")
    print(f"\n{format_table(table)}\n\nouter steps until the mean loss is tuned Adam's\n\n{format_table(parity)}")


if __name__ == "__main__":
    main()
