"""The loss plateau before learning to learn, and what shortens it (Kirsch et al. 2022, section 5).

    metalearn sweep configs/in_context/bias.sweep.yaml --sweep_dir runs/bias
    python -m experiments.gpicl_plateaus --sweep_dir runs/bias --by bias_fraction
    metalearn sweep configs/in_context/interventions.sweep.yaml --sweep_dir runs/interventions
    python -m experiments.gpicl_plateaus --sweep_dir runs/interventions

The paper: larger batches, a smaller epsilon of Adam and signs of averaged gradients shorten the plateau; one permutation of
labels in nine tenths of the tasks removes it.

A plateau is measured twice. On the training loss, as in the paper: but where training tasks are biased or restricted, less
than chance is reached by memorising or by guessing, and no loss of other tasks is meant. On the loss of unseen tasks,
which all variants share: this is the one to compare by. The first value of the axis is what others are compared with.
Seeds pair the runs. Beside ratios of lengths, which a run that stays on the plateau leaves unknown, there are
differences of lengths cut at the end of training, which are known always and understate the effect.

Prints tables, and writes them and the figures into ``--out``.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from metalearn.analysis.compare import format_table, paired_comparison, write_table
from metalearn.analysis.plateaus import (
    MARGIN,
    SMOOTHING,
    intervention_table,
    plateau_lengths,
    plot_interventions,
    plot_plateaus,
)
from metalearn.analysis.sweeps import axes_of, read_sweep, read_sweep_logs
from metalearn.base import require_choice

LOSSES = {"unseen tasks": "validation/unseen_held_out/loss", "training": "train/loss"}
ACCURACY = "validation/unseen_held_out/accuracy_last"
ZOOM = 0.1  # nats around chance shown of the training loss: small biases are memorised before the drop


def lengths_of(cells: Any, logs: Any, chance_loss: float, margin: float, smoothing: float) -> Any:
    """Plateau of every cell that has ended, in the order of the grid, and the same cut at the last step that was logged."""
    lengths = plateau_lengths(logs, chance_loss, margin, smoothing).set_index("cell")
    ordered = lengths.loc[[cell for cell in cells["cell"] if cell in lengths.index]].reset_index()
    return ordered.assign(cut=ordered["plateau"].clip(upper=ordered["steps"]))


def report(sweep_dir: Path, by: str, out: Path, chance_loss: float, margin: float, smoothing: float) -> None:
    """Print and write everything that is known of one sweep along the axis ``by``."""
    cells = read_sweep(sweep_dir)
    require_choice("by", by, tuple(axes_of(cells)))
    complete: Any = cells[cells["state"] == "complete"]
    baseline = cells[by].iloc[0]
    print(f"{sweep_dir}: {len(complete)} of {len(cells)} cells are complete; compared with {by} = {baseline}\n")
    for name, metric in LOSSES.items():
        logs, stem = read_sweep_logs(sweep_dir, metric), name.replace(" ", "_")
        lengths = lengths_of(complete, logs, chance_loss, margin, smoothing)
        table = intervention_table(lengths, by, baseline)
        cut = paired_comparison(lengths, group=by, value="cut", baseline=baseline)
        show(f"Plateau by the loss of {name}", table, out / f"{stem}_plateaus")
        show(f"Steps on the plateau by the loss of {name}, at most those of training", cut, out / f"{stem}_steps")
        save(plot_interventions(table), out / f"{stem}_plateaus.png")
        zoom = ZOOM if metric == "train/loss" else None
        save(plot_plateaus(logs, by, chance_loss, None, smoothing, margin, zoom), out / f"{stem}_losses.png")
    ends = paired_comparison(complete, group=by, value=ACCURACY, baseline=baseline)
    show("Accuracy on unseen tasks at the end", ends, out / "accuracy")


def show(title: str, table: Any, stem: Path) -> None:
    write_table(table, stem)
    print(f"{title}\n\n{format_table(table)}\n")


def save(axes: Any, path: Path) -> None:
    axes.figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sweep_dir", type=Path, required=True, help="folder of a sweep over configs/in_context/plateaus.yaml"
    )
    parser.add_argument("--by", default="variant", help="the axis whose values are compared")
    parser.add_argument("--out", type=Path, help="default: SWEEP_DIR/plateaus")
    parser.add_argument("--classes", type=int, default=5, help="of the tasks; a plateau is at their logarithm")
    parser.add_argument("--margin", type=float, default=MARGIN, help="nats below chance at which it is left")
    parser.add_argument("--smoothing", type=float, default=SMOOTHING, help="of the losses, per step")
    options = parser.parse_args(argv)
    if options.classes < 2:
        parser.error(f"classes is {options.classes}; accepted: at least 2")
    out = options.out or options.sweep_dir / "plateaus"
    report(options.sweep_dir, options.by, out, math.log(options.classes), options.margin, options.smoothing)


if __name__ == "__main__":
    main()
