"""What learned optimizers cost and what they are worth: time and memory of a step against the loss that they leave.

    python -m experiments.lopt_tradeoffs [--rules ...] [--seeds 3] [--seconds 120] [--out runs/lopt_tradeoffs]

Seven rules are meta-trained for the same ``--seconds`` of CPU time each on the task of configs/learned_optimizer/digits_mlp.yaml
(100 steps of a network of 64-32-10 units on scikit-learn's digits): by NRES with 16 pairs and windows of 10 steps, the LSTM,
whose 5141 weights are too many for that, by truncated backpropagation through windows of 20 steps of 4 runs; STAR with weight
decay, which belongs to it. Rules are as published but for the size of the MLPs' steps, 0.01 instead of 0.001, since runs are
short.

Judged is the mean loss over the 100 steps of 32 new runs on the digits of "test", as a share of Adam's at the best of 13 learning
rates (by 16 runs on training digits). Beside it stands the share after equal numbers of outer steps: the largest that all of
the rules took. Time is that of a step of ``LearnedOptimizer`` on 784-512-512-10 units, 669 706 parameters: the median of one
thread's CPU time over 5 steps, taken in turns; memory is what the optimizer keeps. Hand-made optimizers stand beside.

A rule is on the front where no other learned rule is at least as good in time, memory and loss (means over seeds) and better
in one. Prints the table and whether the factored MLP is on the front; writes the table, and figures of the front without and with
hand-made optimizers, who count in the column ``dominated_by``. Intervals are bootstrapped over seeds, which vary everything.

Takes about 17 CPU minutes a seed. Each trial is kept when it is done, its weights beside it, and the same command goes on
with those that are missing.

Source: Metz et al. 2022, "Practical Tradeoffs between Memory, Compute, and Performance in Learned Optimizers". Differs from the
paper: one task instead of many, minutes of meta-training instead of days.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.meta_trained import (
    Budget,
    at_best_rate,
    command,
    digits_task,
    evolution,
    gather,
    measured,
    meta_train,
    parsed,
    runs,
)
from metalearn.analysis.compare import bootstrap_interval, format_table, write_table
from metalearn.analysis.fronts import dominators, save_front
from metalearn.analysis.trials import trial_frame
from metalearn.base import Params, require_choice, require_range
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import MLP
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.hyper import NNAdam
from metalearn.optim.learnable import LearnableAdam
from metalearn.optim.learned import LearnedRule
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.mlp import MLPRule
from metalearn.optim.saving import load_rule, save_rule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.star import STAR
from metalearn.optim.torch_face import LearnedOptimizer
from metalearn.problems.baselines import HAND_MADE, curves, decayed
from metalearn.problems.optimizees import Optimizee
from metalearn.random import key, normal
from metalearn.unroll import Tasks


class Recipe(NamedTuple):
    """A rule before meta-training, and how it is meta-trained."""

    rule: Callable[[], LearnedRule]
    lr: float = 1e-2  # of the outer Adam
    backpropagated: int = 0  # runs of truncated backpropagation; 0 is NRES
    window: int = 10
    weight_decay: float = 0.0  # of the outer Adam, decoupled


FACTORED, ADAM = "FactoredMLP", "Adam"
RULES = {
    "LearnableAdam": Recipe(LearnableAdam),
    "NNAdam": Recipe(NNAdam),
    "SmallMLP": Recipe(SmallMLP),
    "MLPRule": Recipe(lambda: MLPRule(step_mult=0.01)),
    FACTORED: Recipe(lambda: FactoredMLP(step_mult=0.01)),
    "STAR": Recipe(STAR, weight_decay=0.5),
    "CoordinateLSTM": Recipe(lambda: CoordinateLSTM(preprocessing="paper"), 5e-3, 4, 20),
}
MADE_BY_HAND = {ADAM: HAND_MADE["Adam"], "Adam, cosine": decayed(HAND_MADE["Adam"])}
COSTS = ["ns_per_parameter", "bytes_per_parameter", "share"]
SHOWN = ["rule", "weights", *COSTS, "share_low", "share_high", "final_share", "outer_steps", "equal_steps"]
SHOWN += ["share_then", "front_seeds", "dominated_by"]
FIRST = 25  # outer steps before the first weights that are kept, of which each later number is the double


class Scale(NamedTuple):
    """Sizes of the experiment."""

    seconds: float = 120.0
    steps: int = 10**6  # at most
    horizon: int = 100
    tuning_runs: int = 16
    runs: int = 32
    width: int = 512  # of the network on which steps are timed
    repeats: int = 5


SMOKE = Scale(seconds=0.0, steps=1, horizon=20, tuning_runs=1, runs=2, width=8, repeats=2)


# -- what a rule is worth ----------------------------------------------------------------------------------------------


def learn(recipe: Recipe, rule: LearnedRule, scale: Scale, seed: int) -> list[tuple[int, float, Params]]:
    """Outer steps, CPU seconds and weights after 25, 50, 100, ... outer steps, and at the end."""
    problem, found = digits_task(rule, horizon=scale.horizon), list[tuple[int, float, Params]]()

    def watch(steps: int, seconds: float, meta: Params) -> None:
        if found and not _is_kept(found[-1][0]):
            found.pop()
        found.append((steps, seconds, meta))

    runs_at_once = recipe.backpropagated
    whole = Tasks(problem, runs_at_once) if runs_at_once else problem
    estimator = Unrolled("graph", warm_start=True) if runs_at_once else evolution()
    budget = Budget(scale.steps, scale.seconds)
    settings = {"window": recipe.window, "lr": recipe.lr, "weight_decay": recipe.weight_decay}
    meta_train(whole, estimator, seed, budget, **settings, watch=watch)
    return found


def _is_kept(steps: int) -> bool:
    times, rest = divmod(steps, FIRST)
    return not rest and times & (times - 1) == 0


def learned(name: str, seed: int, scale: Scale, out: Path) -> dict[str, Any]:
    """The trial of a learned rule: losses on new runs after some numbers of outer steps, and after the last."""
    recipe = RULES[name]
    rule = recipe.rule()
    found = learn(recipe, rule, scale, seed)
    problem, keys_R = digits_task(rule, horizon=scale.horizon), runs(seed, "test", scale.runs)
    path = []
    for steps, seconds, meta in found:
        losses_RT = curves(problem.on("test"), rule, meta, keys_R, scale.horizon)
        path.append({"steps": steps, "seconds": seconds, **measured(losses_RT)})
    save_rule(weights_file(out, name, seed), rule, found[-1][2], outer_steps=found[-1][0], cpu_seconds=found[-1][1])
    return {**path[-1], "path": path, "weights": sum(value.numel() for value in rule.weights.values())}


def hand_made(name: str, seed: int, scale: Scale) -> dict[str, Any]:
    """The trial of a hand-made optimizer at its best learning rate."""
    problem: Optimizee = digits_task(SmallMLP(), horizon=scale.horizon)
    tuning, judging = runs(seed, "tuning", scale.tuning_runs), runs(seed, "test", scale.runs)
    best = at_best_rate(problem, MADE_BY_HAND[name], tuning, judging, scale.horizon)
    return {"lr": best.lr, **measured(best.losses)}


def weights_file(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}_{seed}.safetensors"


# -- what a step costs -------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of a step, per parameter."""

    ns: float
    bytes: float


def step_costs(rules: dict[str, LearnedRule], scale: Scale) -> dict[str, Cost]:
    """What a step of each rule, and of torch's Adam, takes and keeps; steps are taken in turns."""
    built: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        name: lambda params, rule=rule: LearnedOptimizer(params, rule) for name, rule in rules.items()
    }
    built |= {name: lambda params: torch.optim.Adam(params, foreach=True) for name in MADE_BY_HAND}
    optimizers = {name: build(_parameters(scale.width)) for name, build in built.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(1 + scale.repeats):
        for name, optimizer in optimizers.items():
            began = time.thread_time()
            optimizer.step()
            times[name].append(time.thread_time() - began)
    return {
        name: Cost(1e9 * statistics.median(times[name][1:]) / _count(optimizer), _kept_bytes(optimizer))
        for name, optimizer in optimizers.items()
    }


def _parameters(width: int) -> list[nn.Parameter]:
    """Those of a network of 784, twice ``width`` and 10 units, with gradients of the size of a trained network's."""
    params = list(MLP(784, 10, (width, width)).parameters())
    for place, p in enumerate(params):
        p.grad = 0.01 * normal(key(0, "gradients", place), tuple(p.shape))
    return params


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def _kept_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of the state per parameter."""
    leaves = tree_leaves([dict(part) for part in optimizer.state.values()])
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)) / _count(optimizer)


# -- the table ---------------------------------------------------------------------------------------------------------


def result_table(trials: Sequence[dict[str, Any]], costs: dict[str, Cost]) -> Any:
    """A row per rule, in ``SHOWN``'s columns: shares are of tuned Adam's loss with the same seed."""
    of_adam = {trial["seed"]: trial for trial in trials if trial["rule"] == ADAM}
    by_name: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["seed"] in of_adam:
            by_name.setdefault(trial["rule"], []).append(trial)
    equal = _common_steps([trial["path"] for own in by_name.values() for trial in own if "path" in trial])
    rows = []
    for name, own in by_name.items():
        shares, ends = ({t["seed"]: t[v] / of_adam[t["seed"]][v] for t in own} for v in ("mean_loss", "final_loss"))
        low, high = bootstrap_interval(list(shares.values()))
        row = {"rule": name, "weights": own[0].get("weights", 0), "share": statistics.fmean(shares.values())}
        row |= {"ns_per_parameter": costs[name].ns, "bytes_per_parameter": costs[name].bytes, "shares": shares}
        row |= {"share_low": low, "share_high": high, "final_share": statistics.fmean(ends.values())}
        if "path" in own[0]:
            then = [_at(t["path"], equal) / of_adam[t["seed"]]["mean_loss"] for t in own]
            steps = statistics.fmean(t["steps"] for t in own)
            row |= {"outer_steps": steps, "equal_steps": equal, "share_then": statistics.fmean(then)}
        rows.append(row)
    return _with_fronts(trial_frame(rows))


def _common_steps(paths: Sequence[list[dict[str, Any]]]) -> int:
    """The largest number of outer steps after which all of them were judged, 0 for none."""
    return max(set.intersection(*({point["steps"] for point in path} for path in paths)) | {0}) if paths else 0


def _at(path: Sequence[dict[str, Any]], steps: int) -> float:
    return next((point["mean_loss"] for point in path if point["steps"] == steps), float("nan"))


def _with_fronts(table: Any) -> Any:
    """The table with the names of those that dominate a row, and in how many seeds it is on the front of the learned rules."""
    table["dominated_by"] = [", ".join(others) for others in dominators(table, COSTS, "rule")]
    rules = learned_rows(table).copy()
    table["front_seeds"] = 0
    for seed in set.intersection(*map(set, rules["shares"])):
        rules["share"] = [shares[seed] for shares in rules["shares"]]
        on_front = [not others for others in dominators(rules, COSTS, "rule")]
        table.loc[rules.index[on_front], "front_seeds"] += 1
    return table[[column for column in SHOWN if column in table]]


def learned_rows(table: Any) -> Any:
    """The rows of learned rules."""
    return table[~table["rule"].isin(list(MADE_BY_HAND))]


def verdict(table: Any) -> str:
    """Whether the factored MLP is on the front of the learned rules, and who is, in a sentence."""
    rules = learned_rows(table)
    by_name = dict(zip(rules["rule"], dominators(rules, COSTS, "rule"), strict=True))
    if FACTORED not in by_name:
        return f"{FACTORED} was not among the rules"
    above = by_name[FACTORED]
    seeds = int(table.loc[table["rule"] == FACTORED, "front_seeds"].iloc[0])
    on = [name for name, others in by_name.items() if not others]
    found = f"is dominated by {', '.join(above)}" if above else "is on the front"
    return f"{FACTORED} {found} (seed by seed on it in {seeds}); the front of the learned rules: {', '.join(on)}"


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/lopt_tradeoffs", 3)
    parser.add_argument("--rules", nargs="+", default=list(RULES), help=f"of {', '.join(RULES)}")
    parser.add_argument("--seconds", type=float, default=Scale().seconds, help="of CPU time per meta-training (>= 1)")
    options = parsed(parser, argv)
    for name in options.rules:
        require_choice("rules", name, RULES)
    require_range("seconds", options.seconds, 1)
    scale = SMOKE if options.smoke else Scale(seconds=options.seconds)

    def make(rule: str, seed: int) -> dict[str, Any]:
        if rule in MADE_BY_HAND:
            return hand_made(rule, seed, scale)
        trial = learned(rule, seed, scale, options.out)
        print(f"{rule}, seed {seed}, {trial['steps']} outer steps: mean loss {trial['mean_loss']:.4f}", flush=True)
        return trial

    cells = [{"rule": name, "seed": s} for s in range(options.seeds) for name in (*MADE_BY_HAND, *options.rules)]
    trials = gather(cells, make, scale._asdict(), options.out, options.budget_minutes)
    names = [name for name in options.rules if any(trial["rule"] == name for trial in trials)]
    if not names:
        return
    costs = step_costs({name: load_rule(weights_file(options.out, name, 0)) for name in names}, scale)
    table = result_table(trials, costs)
    write_table(table, options.out / "table")
    save_front(learned_rows(table), COSTS, options.out / "front.png", "rule")
    save_front(table, COSTS, options.out / "front_with_hand_made.png", "rule")
    print(f"\n{format_table(table)}\n\n{verdict(table)}")


if __name__ == "__main__":
    main()
