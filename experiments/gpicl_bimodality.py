"""At the edge a seed either memorises or learns, and few end in between (Kirsch et al. 2022, figure 4).

    python -m experiments.gpicl_bimodality --sweep_dir runs/bimodality [--workers 2] [--budget_minutes 30]

first runs what is left of the sweep: all other options are those of ``metalearn sweep``. The paper: near the edge,
final training losses of many seeds fall into two clusters, nearly without any in between.

The loss is that of new sequences of the training tasks and training images, 512 of them, at the end of training: what
``train/loss`` estimates from one batch. Two modes are tested for by Hartigan's dip test over the seeds of each number
of tasks, and p is also corrected for the number of tests (Holm); a p above the level says nothing against two modes.

Prints a table per metric, and writes ``bimodality_loss.csv``, ``bimodality_accuracy.csv`` (and ``.tex``) and
``bimodality.png`` into the folder of the sweep.
"""

from experiments.gpicl_phases import beside, save, show, sweep_parser, swept
from metalearn.analysis.bimodality import bimodality_table, plot_bimodality
from metalearn.analysis.compare import holm

VALUES = {"loss": "validation/seen_train/loss", "accuracy": "validation/unseen_held_out/accuracy_last"}
TITLES = {"loss": "final training loss", "accuracy": "accuracy on unseen tasks"}


def main(argv: list[str] | None = None) -> None:
    parser = sweep_parser(__doc__, "bimodality.sweep.yaml")
    options, others = parser.parse_known_args(argv)
    cells = swept(options.sweep, options.sweep_dir, others)
    tables = {name: bimodality_table(cells, "num_tasks", value) for name, value in VALUES.items()}
    corrected = holm([p for table in tables.values() for p in table["p"]])
    for table, own in zip(tables.values(), corrected.reshape(len(tables), -1), strict=True):
        table.insert(3, "p_holm", own)
    for name, table in tables.items():
        show(f"Modes of the {TITLES[name]}", table, options.sweep_dir / f"bimodality_{name}")
    left = plot_bimodality(cells, "num_tasks", VALUES["loss"])
    right = plot_bimodality(cells, "num_tasks", VALUES["accuracy"], beside(left))
    left.set_ylabel(TITLES["loss"])
    right.set_ylabel(TITLES["accuracy"])
    save(left, options.sweep_dir / "bimodality.png")


if __name__ == "__main__":
    main()
