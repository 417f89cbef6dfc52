"""What predicts how well a learner learns: the size of its state, not its number of parameters (Kirsch et al. 2022, figure 5)?

    python -m experiments.gpicl_state_size --sweep_dir runs/state_size [--workers 2] [--budget_minutes 60]

first runs what is left of the sweep: all other options are those of ``metalearn sweep``. The paper: across LSTMs,
outer-product LSTMs, transformers and VSML without symmetries, accuracy on unseen tasks rises with the number of floats
of the state, and does not with that of the parameters.

All learners have the same tasks, steps, batch and learning rate, none of which was tuned for any of them, so that the axis is
also one of how fast they leave the plateau; ``chance`` counts the seeds that have not left it. Compared are Spearman's
rank correlations of accuracy with log state and with log parameters over learners, and their difference with a bootstrap
interval.

Prints learners and correlations, and writes ``state_size.csv``, ``correlations.csv`` (and ``.tex``) and ``state_size.png`` into
the folder of the sweep.
"""

from typing import Any

from experiments.gpicl_phases import beside, other_data, save, show, sweep_parser, swept
from metalearn.analysis.regimes import UNSEEN
from metalearn.analysis.state_size import PARAMETERS, STATE, plot_state_size, rank_correlations
from metalearn.analysis.trials import trial_frame

LEFT = 0.05  # above an untaught guess, at which a learner counts as having left chance


def learners(cells: Any, value: str, first: str) -> Any:
    """A row per learner: both sizes, seeds, mean, least and greatest accuracy, and seeds that gained less than ``LEFT``."""
    stuck = cells.assign(chance=cells[value] - cells[first] < LEFT)
    groups = stuck.groupby(["learner", STATE, PARAMETERS], sort=False)
    return groups.agg(
        seeds=(value, "size"),
        mean=(value, "mean"),
        least=(value, "min"),
        greatest=(value, "max"),
        chance=("chance", "sum"),
    ).reset_index()


def main(argv: list[str] | None = None) -> None:
    parser = sweep_parser(__doc__, "state_size.sweep.yaml")
    options, others = parser.parse_known_args(argv)
    cells = swept(options.sweep, options.sweep_dir, others)
    cells = cells.assign(architecture=cells["learner"].str.split().str[0])
    streams = {stream: f"validation/{stream}/accuracy_last" for stream in (UNSEEN, *other_data(cells))}
    value, first = streams[UNSEEN], f"validation/{UNSEEN}/accuracy_first"
    show("Accuracy on unseen tasks", learners(cells, value, first), options.sweep_dir / "state_size")
    found = {stream: rank_correlations(cells, column) for stream, column in streams.items()}
    table = trial_frame([{"stream": stream, **one._asdict()} for stream, one in found.items()])
    show("Rank correlations of accuracy with log size", table, options.sweep_dir / "correlations")
    between = cells.drop_duplicates("learner")[[STATE, PARAMETERS]].corr("spearman").iloc[0, 1]
    print(f"rank correlation of the two sizes with each other: {between:.2f}")
    left = plot_state_size(cells, value, STATE)
    plot_state_size(cells, value, PARAMETERS, beside(left)).set_ylabel("")
    left.set_ylabel("accuracy on unseen tasks")
    save(left, options.sweep_dir / "state_size.png", ncols=4)


if __name__ == "__main__":
    main()
