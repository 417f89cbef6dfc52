"""Trials of an experiment, one per method and seed: kept in a file while they are made, and summarised over seeds."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def read_trials(path: str | Path) -> list[dict[str, Any]]:
    """The trials of a JSON-lines file, in the order in which they were kept; none where there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep_trial(path: str | Path, trial: dict[str, Any]) -> None:
    """Add a line to a JSON-lines file, which a kill leaves with or without the whole of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(".begun")
    begun.write_text("".join(json.dumps(one) + "\n" for one in [*read_trials(path), trial]))
    os.replace(begun, path)


def summarise_trials(trials: Sequence[dict[str, Any]], values: dict[str, int], group: str = "method") -> pd.DataFrame:
    """A row per group, in order of appearance: its number of trials, and of each value "mean ± standard deviation".

    Args:
        trials: each with a group and, by name, numbers; what a group has none of is shown as "-".
        values: names of the numbers to show, and decimals of each.
        group: name of what the rows are.
    """
    frame = pd.DataFrame(trials)
    groups = frame.groupby(group, sort=False)
    table = pd.DataFrame({"trials": groups.size()})
    for name, decimals in values.items():
        table[name] = groups[name].agg(lambda column, d=decimals: _spread(column.to_numpy(float), d))
    return table.reset_index()


def trial_frame(trials: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The trials as they are, a row each: what ``paired_comparison`` takes."""
    return pd.DataFrame(trials)


def _spread(values: np.ndarray, decimals: int) -> str:
    values = values[~np.isnan(values)]
    if not len(values):
        return "-"
    mean = f"{values.mean():.{decimals}f}"
    known = len(values) > 1 and np.isfinite(values).all()
    return f"{mean} ± {values.std(ddof=1):.{decimals}f}" if known else mean
