"""What dynamic modes of its own run are worth to an LSTM that optimizes: with and without them, on networks it has not seen.

    python -m experiments.dmd_features [--data digits fashion_mnist] [--seeds 5] [--steps 1000] [--out runs/dmd_features]

Two LSTMs (two layers of 20, both inputs of L2L's paper, output times 0.01), one of which is also given the three strongest
dynamic modes of its last eight parameters, are meta-trained on one network of 32 ReLU units on digits: by truncated
backpropagation through windows of 20 of 100 steps, 4 runs at a time, Adam at 0.001 with clipped gradients, which is not
tuned, for equally many outer steps. Their CPU seconds stand in trials.jsonl: modes make a step a quarter dearer.

Judged are new runs of 100 steps on test images, on three networks (the one above; two layers of 32 tanh units; LeNet) and two
data sets: the final loss (mean over the last tenth of a run, and over 32 runs) and the mean loss over all steps. A loss above
20, or that is no number, counts as 20. Adam, beside them, has the best of 13 learning rates, constant and falling along a
cosine, by the ends of 16 runs on training images of the same network. Differences are from the LSTM without modes, below 0
where modes help, paired by seed, with a bootstrap interval; seeds vary everything but the division of the images.

Other data than digits are read from $METALEARN_DATA, in 8 x 8 pixels. A seed takes about 23 CPU minutes, five of
them for judging. Each trial is kept when it is done, and the same command goes on with what is missing.

Source: Šimánek, Vašata and Kordík 2022, "Learning to Optimize with Dynamic Mode Decomposition", for the claim that the
features carry over to other networks and data. Differs from the paper: see ``metalearn.optim.dynamic_mode``.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from experiments.l2l_mlp import CAP, mean_curve, measures, paired_table
from experiments.meta_trained import (
    ADAMS,
    Budget,
    command,
    digits,
    digits_task,
    meta_train,
    parsed,
    perceptron,
    runs,
)
from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.training_curves import save_training_runs
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.base import Params, Rule, Source, require_range
from metalearn.estimators.unrolled import Unrolled
from metalearn.models.vision import LeNet
from metalearn.optim.dynamic_mode import DynamicModeLSTM
from metalearn.optim.learned import LearnedRule
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.saving import save_rule
from metalearn.problems.baselines import curves, tuned
from metalearn.problems.optimizees import Optimizee
from metalearn.tasks.sources import ImageSource
from metalearn.unroll import Tasks

PLAIN, MODES = "LSTM", "LSTM with modes"
RULES: dict[str, Callable[[], LearnedRule]] = {
    PLAIN: partial(CoordinateLSTM, (20, 20), "paper", 0.01),
    MODES: partial(DynamicModeLSTM, (20, 20), "paper", 0.01),
}
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "32 ReLU": perceptron(),
    "32, 32 tanh": perceptron((32, 32), "tanh"),
    "LeNet": partial(LeNet, channels=(4, 8), widths=(32, 32)),
}
IMAGES = 6000
SHOWN = ["data", "network", "optimizer", "n", "mean", "low", "high", "difference", "difference_low", "difference_high"]
SHOWN += ["p", "p_holm"]


class Scale(NamedTuple):
    """Sizes of a trial."""

    steps: int = 1000
    horizon: int = 100
    window: int = 20
    tasks: int = 4
    tuning_runs: int = 16
    runs: int = 32


SMOKE = Scale(steps=2, horizon=12, window=2, tasks=1, tuning_runs=1, runs=2)


def images(data: str) -> Source:
    """8 x 8 pixels in [0, 1], in three parts."""
    if data == "digits":
        return digits()
    split = f"train[:{IMAGES}]"
    return ImageSource(data, split=split, validation=0.3, test=0.3, normalise="largest", image_size=8, channels=1)


def train(rule: LearnedRule, seed: int, scale: Scale, seconds: float) -> tuple[Params, dict[str, float]]:
    """Weights of a rule after meta-training, and what they cost: steps and CPU seconds."""
    cost: dict[str, float] = {}

    def watch(step: int, spent: float, meta: Params) -> None:
        cost.update(steps=step, seconds=spent)

    tasks, estimator = Tasks(digits_task(rule, horizon=scale.horizon), scale.tasks), Unrolled("graph", warm_start=True)
    budget = Budget(scale.steps, seconds)
    return meta_train(tasks, estimator, seed, budget, window=scale.window, lr=1e-3, watch=watch), cost


def judge(given: dict[str, tuple[Rule, Params]], data: Sequence[str], seed: int, scale: Scale) -> list[dict[str, Any]]:
    """A row for each data set, network and optimizer, tuned rivals among them."""
    tuning_R, judging_R = runs(seed, "tuning", scale.tuning_runs), runs(seed, "judging", scale.runs)
    rows = []
    for name in data:
        source = images(name)
        for network, model in NETWORKS.items():
            problem = Optimizee(source, model, CoordinateLSTM(), scale.horizon)
            problem.open(test=True)
            optimizers = dict(given)
            for rival, baseline in ADAMS.items():
                tuning = problem.on("train"), baseline.rule(scale.horizon), tuning_R, scale.horizon
                best = tuned(*tuning, tail=max(1, scale.horizon // 10))
                optimizers[rival] = best.rule, {"lr": torch.tensor(best.lr)}
            for optimizer, (rule, meta) in optimizers.items():
                losses_RT = curves(problem.on("test"), rule, meta, judging_R, scale.horizon)
                row = {"data": name, "network": network, "optimizer": optimizer}
                curve = losses_RT.nan_to_num(CAP, CAP, CAP).mean(0).tolist()
                rows.append(row | measures(losses_RT) | {"curve": curve})
    return rows


def run(data: Sequence[str], seeds: int, scale: Scale, out: Path, budget_minutes: float) -> list[dict[str, Any]]:
    """All trials, those of an earlier call among them."""
    file, settings = out / "trials.jsonl", {"data": list(data), **scale._asdict()}
    kept = [trial for trial in read_trials(file) if trial["settings"] == settings]
    missing = [seed for seed in range(seeds) if seed not in {trial["seed"] for trial in kept}]
    ends = time.monotonic() + 60 * budget_minutes
    for number, seed in enumerate(missing):
        given, costs = {}, {}
        for left, (name, make) in enumerate(RULES.items()):
            rule, seconds = make(), (ends - time.monotonic()) / (len(RULES) * (len(missing) - number) - left)
            meta, costs[name] = train(rule, seed, scale, seconds)
            save_rule(out / f"{name.replace(' ', '_')}_{seed}.safetensors", rule, meta, seed=seed, **costs[name])
            given[name] = rule, meta
        trial = {"seed": seed, "settings": settings, "costs": costs, "rows": judge(given, data, seed, scale)}
        keep_trial(file, trial)
        kept.append(trial)
        shown = ", ".join(f"{name} {cost['steps']} in {cost['seconds']:.0f} s" for name, cost in costs.items())
        print(f"seed {seed}, outer steps: {shown}", flush=True)
    return [trial for trial in kept if trial["seed"] < seeds]


def curve_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean curve over seeds of each optimizer, by data and network."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for trial in trials for row in trial["rows"]):
        groups.setdefault((f"{row['network']}, {row['data']}", row["optimizer"]), []).append(row)
    table = []
    for (place, name), rows in groups.items():
        table += mean_curve(rows, {"problem": place, "horizon": 1, "optimizer": name})
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/dmd_features", seeds=5, budget="trials that it cuts short say so (> 0)")
    parser.add_argument("--data", nargs="+", default=["digits", "fashion_mnist"], help="that rules are judged on")
    parser.add_argument("--steps", type=int, default=Scale().steps, help="outer steps of meta-training, at least 1")
    options = parsed(parser, argv)
    require_range("steps", options.steps, 1)
    scale = SMOKE if options.smoke else Scale(steps=options.steps)
    trials = run(options.data, options.seeds, scale, options.out, options.budget_minutes)
    for value in ("final_loss", "mean_loss"):
        table = paired_table(trials, ["data", "network"], value, PLAIN)[SHOWN]
        write_table(table, options.out / value)
        print(f"\n{value.replace('_', ' ')}\n\n{format_table(table)}")
    save_training_runs(trial_frame(curve_rows(trials)), options.out / "curves.png")


if __name__ == "__main__":
    main()
