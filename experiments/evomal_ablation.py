"""What the parts of EvoMAL's search are worth: screening, local search, successive halving, tabulated gradients.

    python -m experiments.evomal_ablation [--data digits] [--model mlp] [--seeds 5] [--out runs/evomal_ablation]

Every variant searches with the same seeds, so from the same first generation, for the same number of generations:

- full: screening and local search, every candidate trained to the end by its exact gradient;
- no screening: every candidate is tuned and trained, duplicates and dead ones too (equal programs still count once);
- no local search: weights stay 1;
- halving: half of the population stops after a quarter of the steps, half of the rest after a half;
- tabulated: gradients of losses from tables.

Reported: the test error under the loss that won, re-scored exactly with fresh starts and batches, each seed the mean over
``RESCORED`` runs, beside that under the standard loss; CPU seconds of the search; candidates that were trained; differences
from "full" paired by seed. Searches that found nothing have no error, which "found" tells. Every run has the task's own
learning rate, which the search chose by.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import evomal
from experiments.evomal import Generation, Scale
from metalearn import random
from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.trials import keep_trial, summarise_trials, trial_frame
from metalearn.base import require_range
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.evaluation import Evaluation
from metalearn.search.evolution import GeneticProgramming
from metalearn.search.finalists import Rescoring
from metalearn.search.halving import Halving

RESCORED = 5
VALUES = {"found": 1, "error": 4, "own_loss": 4, "seconds": 1, "trained": 1}


def full(task: LossTask, scale: Scale, key: Tensor) -> Evaluation:
    return evomal.evaluation(task, scale, key, local=True)


def without_screening(task: LossTask, scale: Scale, key: Tensor) -> Evaluation:
    made = full(task, scale, key)
    made.screening = None
    return made


def without_local_search(task: LossTask, scale: Scale, key: Tensor) -> Evaluation:
    return evomal.evaluation(task, scale, key, local=False)


def with_halving(task: LossTask, scale: Scale, key: Tensor) -> Evaluation:
    rungs = scale.train_steps // 4, scale.train_steps // 2
    return evomal.evaluation(task, scale, key, local=True, halving=Halving(rungs))


def with_tables(task: LossTask, scale: Scale, key: Tensor) -> Evaluation:
    return evomal.evaluation(task, scale, key, local=True, mode="tabulated")


VARIANTS: dict[str, Callable[[LossTask, Scale, Tensor], Evaluation]] = {
    "full": full,
    "no screening": without_screening,
    "no local search": without_local_search,
    "halving": with_halving,
    "tabulated": with_tables,
}


def run_variant(name: str, task: LossTask, scale: Scale, key: Tensor) -> dict[str, Any]:
    """What a variant finds with a seed, and what it takes."""
    scored_by = VARIANTS[name](task, scale, key)
    generations = evomal.evolve(GeneticProgramming(scale.population), scored_by, key)
    trained = 0

    def counted() -> Iterator[Generation]:
        nonlocal trained
        for done in generations:
            trained += scored_by.counts["trained"]
            yield done

    best, _ = evomal.cut(counted(), scale.population * scale.generations)
    losses = [] if best.loss is None else [best.loss]
    errors = Rescoring(seeds=RESCORED).errors(task, losses, scale.train_steps, fold(key, "rescore"), "test").mean(1)
    error = float(errors[0]) if losses else math.nan
    about = {
        "found": len(losses),
        "error": error,
        "own_loss": float(errors[-1]),
        "search": best.error,
        "seconds": best.seconds,
    }
    return about | {"trained": trained, "loss": None if best.loss is None else best.loss.to_json()}


def show(trials: Sequence[dict[str, Any]], out: Path) -> None:
    """Print and write means over seeds, and differences of error and seconds from the full search."""
    table = summarise_trials(trials, VALUES)
    print(f"{format_table(table)}\n")
    write_table(table, out / "ablation")
    for value in ("error", "seconds"):
        paired = paired_comparison(trial_frame(trials), group="method", value=value, baseline="full")
        write_table(paired, out / f"ablation_{value}")
        print(f"{value}, paired by seed\n\n{format_table(paired)}\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=evomal.DATA, default="digits")
    parser.add_argument("--model", choices=evomal.MODELS, default="mlp")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (>= 1)")
    parser.add_argument("--budget_minutes", type=float, default=math.inf, help="nothing is begun after this time (> 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/evomal_ablation"), help="folder of trials and tables")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the numbers mean nothing")
    args = parser.parse_args(argv)
    require_range("seeds", args.seeds, 1)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    scale = evomal.SMOKE if args.smoke else evomal.SCALES[args.model]
    settings = {"data": args.data, "model": args.model, **scale._asdict()}
    file, deadline = args.out / "trials.jsonl", time.monotonic() + 60 * args.budget_minutes
    task = evomal.open_task(args.data, args.model)
    evomal.warm_up(task, random.key(0, "warm-up"))
    for seed in range(args.seeds):
        kept = evomal.kept_trials(file, settings)
        done = {trial["method"] for trial in kept if trial["seed"] == seed}
        for name in VARIANTS:
            if name not in done and time.monotonic() < deadline:
                found = run_variant(name, task, scale, random.key(seed, "evomal"))
                keep_trial(file, {"method": name, "seed": seed, "settings": settings} | found)
                print(f"seed {seed}, {name}: {found['error']:.4f} in {found['seconds']:.1f} s", flush=True)
    show(evomal.kept_trials(file, settings), args.out)


if __name__ == "__main__":
    main()
