"""What kind of algorithm a learner became: memorising, identifying, generalising, learning to learn, or none yet."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from metalearn.analysis.transitions import measured
from metalearn.base import require_range

SEEN, UNSEEN = "seen_train", "unseen_held_out"
RISE = 0.15
MARGIN = 0.05


def regimes(
    frame: pd.DataFrame,
    chance: float,
    rise: float = RISE,
    margin: float = MARGIN,
    seen: str = SEEN,
    unseen: str = UNSEEN,
    loss: str = "train/loss",
) -> pd.DataFrame:
    """The complete cells of a sweep, with a column ``regime``: the first of these that holds.

    - plateau: loss > ln(1 / chance) - margin;
    - learning-to-learn: on unseen tasks, accuracy rises by more than ``rise`` from the first to the last position;
    - zero-shot: it does not, but is above chance by more than ``rise``;
    - identification: on seen tasks it rises by more than ``rise``;
    - memorisation: on seen tasks it is above chance by more than ``rise``;
    - undecided: none of these.

    Where every sequence is a new task (no seen stream), seen is unseen.

    Args:
        frame: of ``analysis.sweeps.read_sweep``.
        chance: accuracy of guessing, 1 / K for K classes, in (0, 1).
        rise: of accuracy, in (0, 1).
        margin: in nats (>= 0).
        seen: stream of seen tasks.
        unseen: stream of unseen tasks.
        loss: column of the training loss.

    Raises:
        ValueError: for values out of range, or a frame that lacks a column.

    Source: Kirsch et al. 2022, table 1, "algorithm types"; the thresholds are ours.
    """
    require_range("chance", chance, np.nextafter(0, 1), np.nextafter(1, 0))
    require_range("rise", rise, 0, 1)
    require_range("margin", margin, 0)
    names = {(part, end): f"validation/{part}/accuracy_{end}" for part in (seen, unseen) for end in ("first", "last")}
    cells = measured(frame, [names[unseen, "first"], names[unseen, "last"], loss]).copy()
    unseen_first, unseen_last = (cells.loc[:, names[unseen, end]] for end in ("first", "last"))
    accuracies = cells.reindex(columns=list(names.values()))
    seen_first, seen_last = (
        accuracies[names[seen, end]].fillna(accuracies[names[unseen, end]]) for end in ("first", "last")
    )
    holds = {
        "plateau": cells[loss] > -np.log(chance) - margin,
        "learning-to-learn": unseen_last - unseen_first > rise,
        "zero-shot": unseen_last > chance + rise,
        "identification": seen_last - seen_first > rise,
        "memorisation": seen_last > chance + rise,
    }
    return cells.assign(regime=np.select(list(holds.values()), list(holds), "undecided"))


def regime_table(frame: pd.DataFrame, axes: Sequence[str], seen: str = SEEN, unseen: str = UNSEEN) -> pd.DataFrame:
    """The most common regime at every place of the axes, for ``compare.write_table``.

    Args:
        frame: of ``regimes``.
        axes: columns.
        seen: stream of seen tasks.
        unseen: stream of unseen tasks.

    Returns:
        One row per place: axes, cells, regime (of equally common ones the first in the alphabet), share (of the cells),
        and mean accuracies ``<stream>_first``, ``<stream>_last`` over the cells that have them.
    """
    means = {
        f"{stream}_{end}": column
        for stream in (seen, unseen)
        for end in ("first", "last")
        if (column := f"validation/{stream}/accuracy_{end}") in frame
    }
    rows = []
    for _, own in frame.groupby(list(axes), sort=True, dropna=False):
        names, counts = np.unique(own["regime"].to_numpy(str), return_counts=True)
        row = {axis: own[axis].iloc[0] for axis in axes} | {"cells": len(own), "regime": str(names[counts.argmax()])}
        accuracies = {name: own[column].mean() for name, column in means.items()}
        rows.append(row | {"share": counts.max() / len(own)} | accuracies)
    return pd.DataFrame(rows)
