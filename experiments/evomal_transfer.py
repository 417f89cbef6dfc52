"""Losses that EvoMAL found on one data set and model, used on the others.

    python -m experiments.evomal_transfer [--out runs/evomal]

reads the searches that ``evomal_table`` has kept in a folder. For each seed every target, a data set with a model, is trained
under the loss that was found with that seed on each source, and under the standard losses, each with every learning rate of
one grid, in one population: rates are chosen on the target's validation part, errors are of its test part. Starts and batches
are those of no search, and other ones than in ``evomal_table``.

The first table has mean test errors, sources as rows, targets as columns; a source on its own target is the diagonal. The
second has differences from cross-entropy (in regression from mean squared error), paired by seed, with a bootstrap interval,
and Welch's p, corrected for all comparisons of the table (Holm).
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import evomal
from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.transfer import compared_losses, transfer_table, tuned_errors
from metalearn.analysis.trials import keep_trial, read_trials, trial_frame
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.losses.learned import loss_from_json
from metalearn.random import key

Place = tuple[str, str]  # data, model


def found_losses(folder: Path, data: Sequence[str] | None = None) -> dict[Place, dict[int, dict[str, Any]]]:
    """The losses that EvoMAL found at its evaluations, by place and seed, as they were saved."""
    found: dict[Place, dict[int, dict[str, Any]]] = {}
    for file in sorted(folder.glob("searches_*.jsonl")):
        for trial in read_trials(file):
            place = trial["settings"]["data"], trial["settings"]["model"]
            loss = trial["evaluations"]["loss"]
            if trial["method"] == "evomal" and loss is not None and (data is None or place[0] in data):
                found.setdefault(place, {})[trial["seed"]] = loss
    if not found:
        raise ValueError(f"{folder} has no searches by evomal; accepted: a folder that evomal_table wrote")
    return found


def run_target(target: Place, seed: int, found: dict[Place, dict[int, dict[str, Any]]], steps: int, file: Path) -> None:
    """Test errors of every source's loss of a seed on one target, and of the standard ones."""
    task = evomal.open_task(*target)
    losses: dict[str, ElementwiseLoss] = dict(compared_losses((), task))
    saved = {f"{data}, {model}": by_seed[seed] for (data, model), by_seed in found.items() if seed in by_seed}
    losses |= {name: loss_from_json(one) for name, one in saved.items() if one["output"] == task.output}
    rows = tuned_errors(task, losses, evomal.rates(task), steps, key(seed, "evomal", "transfer"))
    about = {
        "data": target[0],
        "model": target[1],
        "baseline": task.own_loss,
        "seed": seed,
        "settings": {"steps": steps},
    }
    for row in rows:
        keep_trial(file, about | row)
    print(f"seed {seed}, {', '.join(target)}: {len(rows)} losses", flush=True)


def matrix(trials: Sequence[dict[str, Any]]) -> Any:
    """Mean test errors: a row per loss, a column per target."""
    errors: dict[str, dict[str, list[float]]] = {}
    for trial in trials:
        by_target = errors.setdefault(trial["loss"], {})
        by_target.setdefault(f"{trial['data']}, {trial['model']}", []).append(trial["error"])
    rows = errors.items()
    return trial_frame([{"loss": loss} | {to: statistics.mean(own) for to, own in row.items()} for loss, row in rows])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", choices=evomal.DATA, help="sources and targets; by default all that are there"
    )
    parser.add_argument("--steps", type=int, help="of every run; by default evomal.SCALES has it")
    parser.add_argument("--budget_minutes", type=float, default=math.inf, help="nothing is begun after this time (> 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evomal"), help="folder of evomal_table, and of the tables"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps; the numbers mean nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * args.budget_minutes
    found = found_losses(args.out, args.data)
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})
    for seed in seeds:
        for target in found:
            file = args.out / f"transfer_{'_'.join(target)}.jsonl"
            steps = evomal.SMOKE.test_steps if args.smoke else args.steps or evomal.SCALES[target[1]].test_steps
            kept = evomal.kept_trials(file, {"steps": steps})
            if seed not in {trial["seed"] for trial in kept} and time.monotonic() < deadline:
                run_target(target, seed, found, steps, file)
    trials = [trial for file in sorted(args.out.glob("transfer_*.jsonl")) for trial in read_trials(file)]
    errors, table = matrix(trials), transfer_table(trial_frame(trials))
    write_table(errors, args.out / "transfer_matrix")
    write_table(table, args.out / "transfer_table")
    print(f"mean test error, by the place where the loss was found\n\n{format_table(errors)}\n")
    print(format_table(table.drop(columns="rates")))


if __name__ == "__main__":
    main()
