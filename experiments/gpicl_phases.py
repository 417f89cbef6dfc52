r"""When memorising turns into learning: accuracy by number of training tasks and width (Kirsch et al. 2022, figures 2 and 3).

    python -m experiments.gpicl_phases --sweep_dir runs/phases [--workers 2] [--budget_minutes 30]
    python -m experiments.gpicl_phases --sweep_dir runs/phases_mlp --mlp
    python -m experiments.gpicl_phases --sweep configs/in_context/phases_paper.sweep.yaml \
        --sweep_dir runs/phases_paper --executor ensemble

first runs what is left of the sweep: all other options are those of ``metalearn sweep``, and a second start costs nothing.
The paper: few tasks are memorised, then identified, and from 2^13 on, within a factor of two, learners of width
128 and more learn unseen tasks to about .8; an MLP, which sees no context, only memorises. Here the edge is expected
between 2^5 and 2^8 tasks, for learners, images and budgets that are much smaller.

Prints, for every width, the critical number of tasks by accuracy on unseen tasks and by that on other data, and the
regimes; writes ``phases.png`` (the diagrams on seen and on unseen tasks), ``critical.csv``, ``regimes.csv`` (and
``.tex``) and ``transitions.png``, what is gained within a sequence against the number of tasks, into the folder of the
sweep.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metalearn.analysis.compare import format_table, write_table
from metalearn.analysis.phases import plot_transitions
from metalearn.analysis.regimes import SEEN, UNSEEN, regime_table, regimes
from metalearn.analysis.sweeps import read_sweep
from metalearn.analysis.transitions import critical_table
from metalearn.cli import main as metalearn
from metalearn.models.saving import load_learner

CONFIGS = Path(__file__).parents[1] / "configs" / "in_context"
MLP = "model.init_args.learner={class_path: metalearn.models.feed_forward.FeedForward, init_args: {width: 64}}"
CRITICAL = ("found", "estimate", "low", "high", "octaves", "before", "after", "p", "seeds", "cells", "reason")


def sweep_parser(description: str | None, file: str) -> argparse.ArgumentParser:
    """Options of an experiment that runs the sweep ``file`` of ``configs/in_context``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sweep", type=Path, default=CONFIGS / file, help=f"the sweep file; default: {file}")
    parser.add_argument("--sweep_dir", type=Path, required=True, help="folder of the sweep, and of what is written")
    return parser


def swept(sweep: Path, sweep_dir: Path, others: Sequence[str]) -> Any:
    """Run what is left of a sweep with these options of ``metalearn sweep``. Returns: its complete cells."""
    code = metalearn(["sweep", str(sweep), "--sweep_dir", str(sweep_dir), *others])
    if code == 2 or "--dry_run" in others:
        sys.exit(code)
    cells = read_sweep(sweep_dir)
    complete: Any = cells[cells["state"] == "complete"]
    if complete.empty:
        sys.exit(f"{sweep_dir} has no complete cell yet; repeat the command to go on")
    print(f"\n{sweep_dir}: {len(complete)} of {len(cells)} cells, {complete['seed'].nunique()} seeds\n")
    return complete


def show(title: str, table: Any, stem: Path) -> None:
    """Print a table, and write it as .csv and .tex."""
    write_table(table, stem)
    print(f"{title}\n\n{format_table(table)}\n")


def save(axes: Any, path: Path, ncols: int = 3) -> None:
    """Write the figure that axes are in, with their legend below it, and say where."""
    handles, names = axes.get_legend_handles_labels()
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    if names:
        axes.figure.legend(handles, names, loc="outside lower center", ncols=ncols, frameon=False, fontsize="small")
    axes.figure.savefig(path, dpi=110)
    print(path)


def beside(axes: Any) -> Any:
    """New axes to the right of those that fill a figure, which becomes twice as wide."""
    figure = axes.figure
    figure.set_figwidth(2 * figure.get_figwidth())
    left, right = figure.add_gridspec(1, 2)
    axes.set_subplotspec(left)
    return figure.add_subplot(right)


def other_data(cells: Any) -> list[str]:
    """Streams of evaluation that are made of data sets never trained on."""
    streams = [name.split("/")[1] for name in cells.columns if name.startswith("validation/")]
    return [stream for stream in dict.fromkeys(streams) if stream not in (SEEN, "seen_held_out", UNSEEN)]


def main(argv: list[str] | None = None) -> None:
    parser = sweep_parser(__doc__, "phases.sweep.yaml")
    parser.add_argument("--mlp", action="store_true", help="the control: an MLP on single tokens, figure 2 (a)")
    options, others = parser.parse_known_args(argv)
    folder = options.sweep_dir
    cells = swept(options.sweep, folder, [*others, *(["--set", MLP] if options.mlp else [])])
    transfer = other_data(cells)
    values = [f"validation/{stream}/accuracy_last" for stream in (UNSEEN, *transfer)]
    critical = critical_table(cells, "num_tasks", values, by="width")
    critical["stream"] = critical["metric"].str.split("/").str[1]
    show("Critical number of tasks", critical[["width", "stream", *CRITICAL]], folder / "critical")
    classes = load_learner(folder / cells["run_dir"].iloc[0] / "checkpoints" / "last.ckpt")[1]["num_classes"]
    widest = cells[cells["width"] == cells["width"].max()]
    table = regime_table(regimes(widest, 1 / classes), ["num_tasks"])
    show(f"Regimes at width {widest['width'].iloc[0]}", table, folder / "regimes")
    save(plot_transitions(widest, streams=(SEEN, UNSEEN, *transfer)), folder / "transitions.png")


if __name__ == "__main__":
    main()
