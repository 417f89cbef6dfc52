"""Sweeps as tidy tables: a row per cell, or a row per cell and step."""

from pathlib import Path

import pandas as pd

from metalearn.analysis.runs import read_run, require_metric

CELLS, LOGS = "cells.csv", "logs.csv"
NUM_TASKS = "num_tasks"
ABOUT = ("cell", "run_dir", "state", "reason", "step", "seconds")


def read_sweep(sweep_dir: str | Path) -> pd.DataFrame:
    """A row per cell of a sweep, as ``metalearn sweep`` left it, finished or not.

    Args:
        sweep_dir: the folder of the sweep.

    Returns:
        Columns cell, run_dir, state ("complete", "failed", "running", "waiting"), reason (of a failure), one per axis
        (``num_tasks`` without a number is infinitely many), step, seconds, and one per metric of the runs' results.

    Raises:
        ValueError: if the folder holds no sweep.
    """
    path = Path(sweep_dir) / CELLS
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; make it with: metalearn sweep FILE --sweep_dir {sweep_dir}")
    frame = pd.read_csv(path)
    names = [name for name in axes_of(frame) if not pd.api.types.is_numeric_dtype(frame[name])]
    frame[names] = pd.read_csv(path, usecols=names, keep_default_na=False)[names] if names else frame[names]
    if NUM_TASKS in frame:
        frame[NUM_TASKS] = frame[NUM_TASKS].astype(float).fillna(float("inf"))
    return frame


def read_sweep_logs(sweep_dir: str | Path, metric: str) -> pd.DataFrame:
    """What the runs of a sweep logged of one metric: the columns of ``read_sweep`` that say which cell, step and value.

    Raises:
        ValueError: if the folder holds no sweep, or a run did not log the metric.
    """
    cells, folder = read_sweep(sweep_dir), Path(sweep_dir)
    places = cells[["cell", *axes_of(cells)]]
    if (folder / LOGS).is_file():
        logs = pd.read_csv(folder / LOGS)
        return places.merge(logs[logs["metric"] == metric].drop(columns="metric"), on="cell")
    frames = []
    for cell, run_dir in cells.loc[cells["state"] == "complete", ["cell", "run_dir"]].itertuples(index=False):
        frame = read_run(folder / run_dir)
        require_metric(frame, metric)
        frames.append(frame.loc[frame["metric"] == metric, ["step", "value"]].assign(cell=cell))
    if not frames:
        raise ValueError(f"{str(sweep_dir)!r} has no complete run yet; accepted: a sweep with one or more")
    return places.merge(pd.concat(frames, ignore_index=True), on="cell")


def axes_of(frame: pd.DataFrame) -> list[str]:
    """Names of the axes of a frame of ``read_sweep``, the seed's among them."""
    return [name for name in frame.columns if name not in ABOUT and "/" not in name]
