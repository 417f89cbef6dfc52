"""The boundary between memorising and learning moves with the token format (ours; the paper has one format).

    python -m experiments.token_format_boundary --sweep_dir runs/token_format [--workers 2] [--budget_minutes 60]

first runs what is left of the sweep: all other options are those of ``metalearn sweep``. The paper's token is (x_j,
y_{j-1}), so that a learner must find out by itself that a label belongs to the image of the token before; "shift" is
(x_j, x_{j-1}, y_{j-1}). All else is equal, and both have the paper's normalisation. Expected: fewer tasks are enough
for a learner that is given its examples whole.

Prints the critical number of tasks of both formats, how many octaves they are apart, and how long either stays on the
plateau; writes ``boundary.csv``, ``plateaus.csv`` (and ``.tex``) and ``boundary.png``, both edges in one figure, into the folder
of the sweep.
"""

import math
from typing import Any

from experiments.gpicl_phases import CRITICAL, save, show, sweep_parser, swept
from metalearn.analysis.curves import COLOURS
from metalearn.analysis.phases import plot_transitions
from metalearn.analysis.plateaus import plateau_lengths
from metalearn.analysis.regimes import SEEN, UNSEEN
from metalearn.analysis.sweeps import read_sweep_logs
from metalearn.analysis.transitions import critical_table

VALUE = f"validation/{UNSEEN}/accuracy_last"
CLASSES = 5


def by_format(cells: Any) -> Any:
    """The cells, with accuracies under a stream of its own for each format and kind of task."""
    columns = {}
    for tokens in dict.fromkeys(cells["tokens"]):
        own = cells["tokens"] == tokens
        for kind, stream in (("unseen tasks", UNSEEN), ("seen tasks", SEEN)):
            columns[f"validation/{tokens} tokens, {kind}/accuracy_last"] = cells[
                f"validation/{stream}/accuracy_last"
            ].where(own)
    return cells.assign(**columns)


def draw_edges(axes: Any, table: Any, colours: dict[str, str]) -> None:
    """The critical number of each format that has one, with its interval."""
    for _, row in table[table["found"]].iterrows():
        colour = colours[row["tokens"]]
        axes.axvline(math.log2(row["estimate"]), color=colour, linestyle=":", linewidth=1.4)
        if math.isfinite(row["low"]):
            axes.axvspan(math.log2(row["low"]), math.log2(row["high"]), color=colour, alpha=0.12, linewidth=0)


def main(argv: list[str] | None = None) -> None:
    parser = sweep_parser(__doc__, "token_format.sweep.yaml")
    options, others = parser.parse_known_args(argv)
    folder, cells = options.sweep_dir, swept(options.sweep, options.sweep_dir, others)
    table = critical_table(cells, "num_tasks", [VALUE], by="tokens")
    show("Critical number of tasks, by accuracy on unseen tasks", table[["tokens", *CRITICAL]], folder / "boundary")
    found = table.set_index("tokens").loc[:, ["estimate", "low", "high"]]
    if set(table["tokens"][table["found"]]) == {"paper", "shift"}:
        paper, shift = found.loc["paper"], found.loc["shift"]
        apart = [
            math.log2(paper[a] / shift[b]) for a, b in (("estimate", "estimate"), ("low", "high"), ("high", "low"))
        ]
        print("the edge of the paper's tokens is {:.2g} octaves [{:.2g}, {:.2g}] above that of shift\n".format(*apart))
    lengths = plateau_lengths(read_sweep_logs(folder, "train/loss"), math.log(CLASSES))
    plateaus = lengths.groupby(["tokens", "num_tasks"])["plateau"].agg(["count", "min", "max"]).reset_index()
    show("Steps on the plateau of the training loss", plateaus, folder / "plateaus")
    formats = list(dict.fromkeys(cells["tokens"]))
    streams = [f"{tokens} tokens, {kind} tasks" for tokens in formats for kind in ("unseen", "seen")]
    axes = plot_transitions(by_format(cells), "num_tasks", streams, quantity="accuracy_last")
    axes.axhline(1 / CLASSES, color="0.5", linestyle=":", linewidth=1.2)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figwidth(7.2)
    axes.set_ylabel("accuracy after 31 examples")
    draw_edges(axes, table, {tokens: COLOURS[2 * number] for number, tokens in enumerate(formats)})
    save(axes, folder / "boundary.png", ncols=2)


if __name__ == "__main__":
    main()
