"""How many tasks make a learner of regression forget them: Raventós et al. 2023, figure 2, at the size of a CPU.

    metalearn sweep configs/in_context/task_diversity.sweep.yaml --sweep_dir runs/task_diversity
    python -m experiments.task_diversity --sweep_dir runs/task_diversity

sets every transformer of the sweep beside two predictors on the same new sequences: dMMSE, the Bayes predictor for the pool
of tasks that it was trained on, and ridge, that for fresh tasks. Trained on few tasks it should answer as dMMSE does, on
many as ridge does, although it never saw more than the pool. ``towards_ridge`` is a in the least squares fit dMMSE +
a (ridge - dMMSE) of its answers; the threshold is the number of tasks at which a on unseen tasks turns, by a fitted logistic
function, with a bootstrap interval over seeds.

Prints the table and the threshold, and writes ``task_diversity.csv``, ``.tex`` and ``.png`` into the folder of the sweep.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.diversity import (
    Predictors,
    compared,
    save_task_diversity,
    summarise_task_diversity,
    task_diversity_threshold,
)
from metalearn.analysis.sweeps import read_sweep
from metalearn.base import MetaTest
from metalearn.models.saving import load_learner
from metalearn.models.tokens import Tokens
from metalearn.tasks.regression import LinearRegression
from metalearn.training.in_context import answers


def trained_on(run_dir: Path) -> LinearRegression:
    """The tasks of a run, with meta-test opened."""
    config = yaml.safe_load((run_dir / "cell.yaml").read_text())
    settings: dict[str, Any] = config["data"]["init_args"]["tasks"]["init_args"]
    seed = config["seed_everything"] if settings.get("seed") is None else settings["seed"]
    tasks = LinearRegression(**(settings | {"seed": seed}))
    tasks.open(test=True)
    return tasks


@torch.inference_mode()
def measure(run_dir: Path, sequences: int) -> Iterator[Predictors]:
    """A run's learner beside ridge and dMMSE, on new sequences of every stream."""
    learner, card, _ = load_learner(run_dir / "checkpoints" / "last.ckpt")
    tasks, tokens = trained_on(run_dir), Tokens(card["tokens"], card["num_features"], card["num_classes"])
    for stream in tasks.streams():
        batch = tasks.batch(0, 0, sequences, card["length"], MetaTest(stream))
        said = {name: oracle(*batch, range(card["length"])) for name, oracle in tasks.oracles().items()}
        own_BT, dmmse_BT = answers(tokens.at_examples(learner(tokens.encode(*batch)))), said.get("dMMSE")
        yield compared(tasks.num_tasks, tasks.seed, stream, batch.y, own_BT, said["ridge"], dmmse_BT)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep_dir", type=Path, default=Path("runs/task_diversity"))
    parser.add_argument("--sequences", type=int, default=1024, help="of each run and stream")
    options = parser.parse_args(argv)
    if options.sequences < 1:
        parser.error(f"sequences is {options.sequences}; accepted: >= 1")
    cells = read_sweep(options.sweep_dir)
    done = cells.loc[cells["state"] == "complete", "run_dir"]
    if done.empty:
        parser.error(f"{options.sweep_dir} has no complete cell; accepted: a sweep with one or more")
    points = [point for run_dir in done for point in measure(options.sweep_dir / run_dir, options.sequences)]
    table = summarise_task_diversity(points)
    print(format_table(table), end="\n\n")
    print(f"{len(done)} of {len(cells)} cells; turns towards ridge at {task_diversity_threshold(points)}")
    write_table(table, options.sweep_dir / "task_diversity")
    save_task_diversity(points, options.sweep_dir / "task_diversity.png")


if __name__ == "__main__":
    main()
