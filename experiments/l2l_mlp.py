"""An LSTM that was taught to train a small network, beside hand-made optimizers at their best learning rates.

    python -m experiments.l2l_mlp [--data digits] [--seeds 5] [--epochs 500] [--out runs/l2l_mlp]

What is trained is a network of 20 sigmoid units on images with pixels in [0, 1], in batches of 128. The LSTM (two layers of
20, both inputs of the paper with p = 10, output times 0.01) is meta-trained on it by truncated backpropagation: 4 runs at a
time, each epoch 100 steps in windows of 20, Adam at 0.001 with clipped gradients, which is not tuned. Of 20 evaluations on
validation runs on the way the weights with the smallest final loss are kept.

Judged are new runs, on test images, of the 100 steps that it was trained for, of 200, and of 100 with 40 units, with two
layers, and with ReLU. Every rival has the best of 13 learning rates, or of more where it is at their end, by its final loss on
16 runs on training images of that very network and length, with a constant rate and with one that falls along a cosine. The
final loss is the mean over the last tenth of a run, and over 64 runs; a loss above 20, or that is no number, counts as 20.
Differences from the LSTM, above 0 where it is better, are paired by seed, with a bootstrap interval; seeds vary everything but
the division of the images.

``--data mnist`` has 28 x 28 pixels, and reads $METALEARN_DATA/mnist. Published: the LSTM ahead of all rivals everywhere but
with ReLU; google-deepmind/learning-to-learn, issue 31, ends at log10 0.18 where Adam ends at -0.31.

A seed takes about 25 CPU minutes on digits; MNIST, with ten times the parameters, ten times as many (meta-training has the
greater part of both). Each trial is kept when it is done, its weights beside it, and the same command goes on with what is
missing.

Source: Andrychowicz et al. 2016, "Learning to Learn by Gradient Descent by Gradient Descent", section 3.2. Differs from the
paper: images that are judged are not those that are meta-trained on; torch's initial weights; several runs at a time.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.meta_trained import Budget, command, digits, meta_train, parsed, perceptron, runs
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.training_curves import save_training_runs
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.base import Params, Rule, Source, require_range
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.learned import LearnedRule
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.saving import save_rule
from metalearn.problems.baselines import HAND_MADE, curves, decayed, tuned
from metalearn.problems.optimizees import Optimizee
from metalearn.tasks.sources import ImageSource
from metalearn.unroll import Tasks

LSTM, COSINE = "LSTM", ", cosine"
RIVALS = ("SGD", "NAG", "RMSProp", "Adam")
CAP = 20.0
IMAGES = 20_000
SHOWN = [
    "network",
    "optimizer",
    "n",
    "mean",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p_holm",
]


class Network(NamedTuple):
    """What is trained, and for how long."""

    hidden: tuple[int, ...] = (20,)
    activation: str = "sigmoid"
    multiple: int = 1  # of the horizon


TRAINED_ON = "100 steps"
NETWORKS = {
    TRAINED_ON: Network(),
    "200 steps": Network(multiple=2),
    "40 units": Network((40,)),
    "2 layers": Network((20, 20)),
    "ReLU": Network(activation="relu"),
}


class Scale(NamedTuple):
    """Sizes of a trial."""

    epochs: int = 500
    horizon: int = 100
    window: int = 20
    tasks: int = 4
    batch_size: int = 128
    tuning_runs: int = 16
    runs: int = 64
    evaluations: int = 20
    evaluation_runs: int = 16


SMOKE = Scale(epochs=1, horizon=4, window=2, tasks=2, batch_size=8, tuning_runs=1, runs=2, evaluation_runs=1)


def images(data: str) -> Source:
    """Digits in three parts, or as many images of a larger set, whose own test split is not touched."""
    if data == "digits":
        return digits()
    return ImageSource(data, split=f"train[:{IMAGES}]", validation=0.3, test=0.3, normalise="largest")


def problem(source: Source, network: Network, rule: LearnedRule, scale: Scale) -> Optimizee:
    """Training runs of a network, their data open."""
    model = perceptron(network.hidden, network.activation)
    found = Optimizee(source, model, rule, scale.horizon, batch_size=scale.batch_size)
    found.open(test=True)
    return found


class Trained(NamedTuple):
    """The best weights of a meta-training."""

    meta: Params
    step: int  # outer step after which they were these
    steps: int  # that there was time for


def train(own: Optimizee, seed: int, scale: Scale, seconds: float) -> Trained:
    """Meta-train, and keep the weights of the evaluation with the smallest final loss on validation runs."""
    steps = scale.epochs * (scale.horizon // scale.window)
    keys_R, every = runs(seed, "evaluation", scale.evaluation_runs), max(1, steps // scale.evaluations)
    evaluated: list[tuple[float, Trained]] = []

    def watch(step: int, spent: float, meta: Params) -> None:
        if step % every == 0 or step == steps or spent > seconds:
            loss = measures(curves(own.on("validation"), _rule(own), meta, keys_R, scale.horizon))["final_loss"]
            evaluated.append((loss, Trained(meta, step, step)))

    tasks, estimator = Tasks(own, scale.tasks), Unrolled("graph", warm_start=True)
    meta_train(tasks, estimator, seed, Budget(steps, seconds), window=scale.window, lr=1e-3, watch=watch)
    return min(evaluated, key=lambda one: one[0])[1]._replace(steps=evaluated[-1][1].step)


def measures(losses_RT: Tensor) -> dict[str, float]:
    """Means over runs: of all steps, and of the last tenth; what is above 20, or no number, counts as 20."""
    capped_RT = losses_RT.nan_to_num(CAP, CAP, CAP).clamp(max=CAP)
    tail = max(1, losses_RT.shape[1] // 10)
    diverged = (capped_RT[:, -tail:].mean(1) >= CAP).double().mean()
    return {
        "mean_loss": float(capped_RT.mean()),
        "final_loss": float(capped_RT[:, -tail:].mean()),
        "diverged": float(diverged),
    }


def judge(source: Source, rule: LearnedRule, meta: Params, seed: int, scale: Scale) -> list[dict[str, Any]]:
    """A row for each network and optimizer: learning rate, measures, and the mean curve of losses."""
    tuning_R, judging_R = runs(seed, "tuning", scale.tuning_runs), runs(seed, "judging", scale.runs)
    rows = []
    for place, network in NETWORKS.items():
        own, steps = problem(source, network, rule, scale), network.multiple * scale.horizon
        found: dict[str, tuple[Rule, Params]] = {LSTM: (rule, meta)}
        for name in RIVALS:
            for end, rival in (("", HAND_MADE[name]), (COSINE, decayed(HAND_MADE[name]))):
                given = own.on("train"), rival.rule(steps), tuning_R, steps
                best = tuned(*given, tail=max(1, steps // 10))
                found[name + end] = best.rule, {"lr": torch.tensor(best.lr)}
        for name, (one, given) in found.items():
            losses_RT = curves(own.on("test"), one, given, judging_R, steps)
            row = {"network": place, "optimizer": name, "lr": float(given.get("lr", math.nan))}
            curve = losses_RT.nan_to_num(CAP, CAP, CAP).mean(0).tolist()
            rows.append(row | measures(losses_RT) | {"curve": curve})
    return rows


def _rule(own: Optimizee) -> LearnedRule:
    assert isinstance(own.rule, LearnedRule)
    return own.rule


# -- trials ------------------------------------------------------------------------------------------------------------


def run(data: str, seeds: int, scale: Scale, out: Path, budget_minutes: float) -> list[dict[str, Any]]:
    """All trials, those of an earlier call among them."""
    file, settings = out / "trials.jsonl", {"data": data, **scale._asdict()}
    kept = [trial for trial in read_trials(file) if trial["settings"] == settings]
    missing = [seed for seed in range(seeds) if seed not in {trial["seed"] for trial in kept}]
    ends, source = time.monotonic() + 60 * budget_minutes, images(data)
    for number, seed in enumerate(missing):
        rule = CoordinateLSTM((20, 20), "paper", 0.01)
        seconds = (ends - time.monotonic()) / (len(missing) - number)
        trained = train(problem(source, NETWORKS[TRAINED_ON], rule, scale), seed, scale, seconds)
        rows = judge(source, rule, trained.meta, seed, scale)
        trial = {"seed": seed, "settings": settings, "step": trained.step, "steps": trained.steps}
        save_rule(out / f"{data}_{seed}.safetensors", rule, trained.meta, **trial)
        keep_trial(file, trial | {"rows": rows})
        kept.append(trial | {"rows": rows})
        shown = ", ".join(f"{row['optimizer']} {row['final_loss']:.4f}" for row in rows if row["network"] == TRAINED_ON)
        print(f"seed {seed}, {trained.steps} outer steps, best after {trained.step}: {shown}", flush=True)
    return [trial for trial in kept if trial["seed"] < seeds]


def paired_table(trials: Sequence[dict[str, Any]], places: Sequence[str], value: str, baseline: str) -> Any:
    """The mean of ``value`` of each optimizer and its difference from the baseline's, by seed, in each place of the rows.

    Args:
        trials: each with a seed and rows.
        places: names of the columns that say where a row was measured.
        value: column that is compared.
        baseline: optimizer that others are compared with.
    """
    rows = [{"seed": trial["seed"], **row} for trial in trials for row in trial["rows"]]
    table = []
    for place in dict.fromkeys(tuple(row[name] for name in places) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in places) == place]
        paired = paired_comparison(trial_frame(own), group="optimizer", value=value, baseline=baseline)
        for row in paired.to_dict("records"):
            table.append(dict(zip(places, place, strict=True)) | row | {"optimizer": row["group"]})
    return trial_frame(table)


def curve_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean curve over seeds of the LSTM and of each rival, with or without cosine, whichever ends lower."""
    by_place: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in (row for trial in trials for row in trial["rows"]):
        by_place.setdefault(row["network"], {}).setdefault(row["optimizer"], []).append(row)
    table = []
    for place, by_name in by_place.items():
        ends = {name: sum(row["final_loss"] for row in rows) for name, rows in by_name.items()}
        shown = [min(name, name + COSINE, key=lambda one, ends=ends: ends[one]) for name in RIVALS]
        for name in (LSTM, *shown):
            table += mean_curve(by_name[name], {"problem": place, "horizon": 1, "optimizer": name})
    return table


def mean_curve(rows: Sequence[dict[str, Any]], place: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows as ``save_training_runs`` takes them, of curves of several seeds."""
    losses_ST = torch.tensor([row["curve"] for row in rows], dtype=torch.float64)
    errors_T = losses_ST.std(0, correction=0) / max(1, len(losses_ST) - 1) ** 0.5
    return [
        place | {"lr": rows[0].get("lr", math.nan), "step": step, "loss": loss, "standard_error": error}
        for step, (loss, error) in enumerate(zip(losses_ST.mean(0).tolist(), errors_T.tolist(), strict=True))
    ]


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/l2l_mlp", seeds=5, budget="trials that it cuts short say so (> 0)")
    parser.add_argument("--data", default="digits", help="digits, mnist or another set of images")
    parser.add_argument("--epochs", type=int, default=Scale().epochs, help="of meta-training, at least 1")
    options = parsed(parser, argv)
    require_range("epochs", options.epochs, 1)
    scale = SMOKE if options.smoke else Scale(epochs=options.epochs)
    trials = run(options.data, options.seeds, scale, options.out, options.budget_minutes)
    for value in ("final_loss", "mean_loss"):
        table = paired_table(trials, ["network"], value, LSTM)[SHOWN]
        write_table(table, options.out / value)
        print(f"\n{value.replace('_', ' ')} on {options.data}\n\n{format_table(table)}")
    save_training_runs(trial_frame(curve_rows(trials)), options.out / "curves.png")


if __name__ == "__main__":
    main()
