"""An LSTM that was taught to minimise random quadratics, beside hand-made optimizers at their best learning rates.

    python -m experiments.l2l_quadratics [--entries uniform normal] [--seeds 3] [--epochs 1000] [--out runs/l2l_quadratics]

Each run minimises |Wx - y|^2 in 10 dimensions, with W and y of its own: uniform numbers, as in the released code, or normal
ones, as in the paper. The LSTM (two layers of 20, gradients as they are, output as it is) is meta-trained by truncated
backpropagation: 128 runs at a time, five windows of 20 steps an epoch, by Adam, whose rate falls from 0.005 along a cosine
(picked by the mean loss over all steps: .31 after 150 epochs of 32 runs, where a constant 0.001 had .48 after 200 epochs of
128; their final losses were alike). Of 20 evaluations on the way the weights with the smallest final loss are kept. Trials
that the time cuts short have seen only part of the cosine.

Every rival has the best of 25 learning rates, by its final loss on 128 runs that are neither tested nor trained on, chosen
anew for each number of steps, with a constant rate and with one that falls along a cosine. "Adam at 0.001" is what the
LSTM is published beside. Judged is the decimal logarithm of the final loss, mean over 1024 new runs, after the 100 steps
that it was trained for and after 200. Differences from the LSTM, above 0 where it is better, are paired by seed, with a
bootstrap interval; seeds vary everything.

Published for uniform numbers, 10 000 epochs: -0.70, and Adam at 0.001 -0.06 (google-deepmind/learning-to-learn, issue 31).

Each trial is kept when it is done, its weights beside it, and the same command goes on with those that are missing.

Source: Andrychowicz et al. 2016, "Learning to Learn by Gradient Descent by Gradient Descent", section 3.1. Differs from the
released code: fewer epochs, with a rate that falls, where it has 10 000 at a constant 0.001.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.meta_trained import command, parsed
from metalearn import tree
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.training_curves import save_training_runs
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.base import Params, Rule, require_range
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.first_order import Adam
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.saving import save_rule
from metalearn.problems.baselines import HAND_MADE, curves, decayed, tuned
from metalearn.problems.quadratics import ENTRIES, Quadratics
from metalearn.random import fold, key
from metalearn.unroll import Tasks

LSTM, COSINE, UNTUNED = "LSTM", ", cosine", "Adam at 0.001"
RIVALS = ("SGD", "NAG", "RMSProp", "Adam")
RATES = tuple(10 ** (-3 + k / 8) for k in range(25))
MULTIPLES = (1, 2)  # of the horizon
PUBLISHED = {"uniform": {LSTM: -0.70, UNTUNED: -0.06}}
SHOWN = ["entries", "steps", "optimizer", "n", "log_final", "published", "low", "high", "difference", "difference_low"]
SHOWN += ["difference_high", "p_holm"]


class Scale(NamedTuple):
    """Sizes of a trial."""

    epochs: int = 1000
    horizon: int = 100
    window: int = 20
    lr: float = 0.005
    tasks: int = 128
    tuning_runs: int = 128
    runs: int = 1024
    evaluations: int = 20


SMOKE = Scale(epochs=1, horizon=4, window=2, tasks=2, tuning_runs=1, runs=2, evaluations=1)


class Trained(NamedTuple):
    """The best weights of a meta-training."""

    meta: Params
    epoch: int  # after which they were these
    epochs: int  # that there was time for


def train(problem: Quadratics, scale: Scale, own: Tensor, seconds: float) -> Trained:
    """Meta-train, and keep the weights of the evaluation with the smallest final loss."""
    tasks, estimator, began = Tasks(problem, scale.tasks), Unrolled("graph", warm_start=True), time.monotonic()
    meta = problem.init_meta(fold(own, "meta"))
    optimizer, state = torch.optim.Adam(list(meta.values())), estimator.init(tasks, meta, fold(own, "state"))
    best, least, every = Trained(tree.map(torch.clone, meta), 0, 0), math.inf, max(1, scale.epochs // scale.evaluations)
    for epoch in range(1, scale.epochs + 1):
        optimizer.param_groups[0]["lr"] = scale.lr * (1 + math.cos(math.pi * (epoch - 1) / scale.epochs)) / 2
        for window in range(scale.horizon // scale.window):
            keys = fold(own, "data", epoch, window), fold(own, "steps", epoch, window)
            found = estimator.estimate(tasks, meta, state, tasks.batches(keys[0], scale.window), keys[1])
            state = found.state
            for name, value in meta.items():
                value.grad = found.grad[name]
            optimizer.step()
        last = epoch == scale.epochs or time.monotonic() - began > seconds
        best = best._replace(epochs=epoch)
        if last or epoch % every == 0:
            loss = problem.evaluate(meta, fold(own, "validation"), test=False)["final_loss"]
            if loss < least:
                best, least = Trained(tree.map(torch.clone, meta), epoch, epoch), loss
        if last:
            break
    return best


def judge(problem: Quadratics, trained: Trained, scale: Scale, own: Tensor) -> list[dict[str, Any]]:
    """A row for each optimizer and number of steps: learning rate, log_final, mean_loss and the curve of losses."""
    assert problem.rule is not None
    tuning_R, test_R = (
        fold(own, purpose, torch.arange(runs))
        for purpose, runs in (("tuning", scale.tuning_runs), ("test", scale.runs))
    )
    chosen = {name: HAND_MADE[name] for name in RIVALS}
    chosen |= {name + COSINE: decayed(rival) for name, rival in chosen.items()}
    rows = []
    for multiple in MULTIPLES:
        steps = multiple * scale.horizon
        found: dict[str, tuple[Rule, Params]] = {LSTM: (problem.rule, trained.meta), UNTUNED: (Adam(), _rate(1e-3))}
        for name, rival in chosen.items():
            best = tuned(problem, rival.rule(steps), tuning_R, steps, RATES, tail=1)
            found[name] = best.rule, _rate(best.lr)
        for name, (rule, meta) in found.items():
            losses_T = curves(problem, rule, meta, test_R, steps).mean(0)
            row = {"optimizer": name, "multiple": multiple, "steps": steps, "lr": float(meta.get("lr", math.nan))}
            row |= {"log_final": float(losses_T[-1].log10()), "mean_loss": float(losses_T.mean())}
            rows.append(row | {"curve": losses_T.tolist()})
    return rows


def _rate(lr: float) -> Params:
    return {"lr": torch.tensor(lr)}


# -- trials ------------------------------------------------------------------------------------------------------------


def run(entries: Sequence[str], seeds: int, scale: Scale, out: Path, budget_minutes: float) -> list[dict[str, Any]]:
    """All trials, those of an earlier call among them."""
    file, settings = out / "trials.jsonl", scale._asdict()
    kept = [trial for trial in read_trials(file) if trial["settings"] == settings]
    done = {(trial["entries"], trial["seed"]) for trial in kept}
    missing = [(kind, seed) for seed in range(seeds) for kind in entries if (kind, seed) not in done]
    ends = time.monotonic() + 60 * budget_minutes
    for number, (kind, seed) in enumerate(missing):
        own = key(seed, "l2l_quadratics", kind)
        problem = Quadratics(CoordinateLSTM((20, 20), "none", 1.0), scale.horizon, entries=kind)
        trained = train(problem, scale, own, (ends - time.monotonic()) / (len(missing) - number))
        rows = judge(problem, trained, scale, own)
        trial = {"entries": kind, "seed": seed, "settings": settings, "epoch": trained.epoch, "epochs": trained.epochs}
        assert isinstance(problem.rule, CoordinateLSTM)
        save_rule(out / f"{kind}_{seed}.safetensors", problem.rule, trained.meta, **trial)
        keep_trial(file, trial | {"rows": rows})
        kept.append(trial | {"rows": rows})
        shown = ", ".join(f"{row['optimizer']} {row['log_final']:.3f}" for row in rows if row["multiple"] == 1)
        print(f"{kind}, seed {seed}, {trained.epochs} epochs, best after {trained.epoch}: {shown}", flush=True)
    return [trial for trial in kept if trial["entries"] in entries and trial["seed"] < seeds]


def rows_of(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all trials, each with its seed and kind of numbers."""
    return [{"entries": trial["entries"], "seed": trial["seed"], **row} for trial in trials for row in trial["rows"]]


def result_table(trials: Sequence[dict[str, Any]]) -> Any:
    """Mean log_final of each optimizer, and its difference from the LSTM's with interval, by numbers and steps."""
    rows, table = rows_of(trials), []
    for kind, multiple in dict.fromkeys((row["entries"], row["multiple"]) for row in rows):
        own = [row for row in rows if (row["entries"], row["multiple"]) == (kind, multiple)]
        paired = paired_comparison(trial_frame(own), group="optimizer", value="log_final", baseline=LSTM)
        place = {"entries": kind, "steps": own[0]["steps"]}
        for row in paired.to_dict("records"):
            published = PUBLISHED.get(kind, {}).get(row["group"], math.nan) if multiple == 1 else math.nan
            table.append(place | row | {"optimizer": row["group"], "log_final": row["mean"], "published": published})
    return trial_frame(table)[SHOWN]


def curve_rows(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean curve over seeds of the LSTM and of each rival, with or without cosine, whichever ends lower."""
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in rows_of(trials):
        groups.setdefault((row["entries"], row["multiple"]), {}).setdefault(row["optimizer"], []).append(row)
    table = []
    for (kind, multiple), by_name in groups.items():
        shown = [min((name, name + COSINE), key=lambda one, by=by_name: _end(by[one])) for name in RIVALS]
        for name in (LSTM, *shown):
            losses_ST = torch.tensor([row["curve"] for row in by_name[name]], dtype=torch.float64)
            errors_T = losses_ST.std(0, correction=0) / max(1, len(losses_ST) - 1) ** 0.5
            place = {"problem": f"{kind} numbers", "horizon": multiple, "optimizer": name, "lr": by_name[name][0]["lr"]}
            table += [
                place | {"step": step, "loss": loss, "standard_error": error}
                for step, (loss, error) in enumerate(zip(losses_ST.mean(0).tolist(), errors_T.tolist(), strict=True))
            ]
    return table


def _end(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["log_final"] for row in rows) / len(rows)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = command(__doc__, "runs/l2l_quadratics", seeds=3, budget="trials that it cuts short say so (> 0)")
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--epochs", type=int, default=Scale().epochs, help="of meta-training, at least 1")
    parser.add_argument(
        "--window", type=int, default=Scale().window, help="of truncated backpropagation, a divisor of 100"
    )
    parser.add_argument("--lr", type=float, default=Scale().lr, help="of meta-training, at its start (> 0)")
    options = parsed(parser, argv)
    require_range("epochs", options.epochs, 1)
    if not options.lr > 0:
        raise ValueError(f"lr is {options.lr}; accepted: lr > 0")
    if options.window < 1 or Scale().horizon % options.window:
        raise ValueError(f"window is {options.window}; accepted: a divisor of {Scale().horizon}")
    scale = SMOKE if options.smoke else Scale(epochs=options.epochs, window=options.window, lr=options.lr)
    trials = run(options.entries, options.seeds, scale, options.out, options.budget_minutes)
    table = result_table(trials)
    write_table(table, options.out / "table")
    save_training_runs(trial_frame(curve_rows(trials)), options.out / "curves.png")
    print(f"\ndecimal logarithm of the final loss\n\n{format_table(table)}")


if __name__ == "__main__":
    main()
