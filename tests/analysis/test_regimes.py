"""Regimes of learners whose algorithm is known."""

import math

import numpy as np
import pandas as pd
import pytest

from metalearn.analysis.regimes import regime_table, regimes

CHANCE = 0.2
# Accuracies at the first and last position on seen and on unseen tasks, the training loss, and what the learner is.
KNOWN = [
    (0.99, 1.00, 0.20, 0.216, 0.02, "memorisation"),  # transformers of width 64 with 2^2, 2^4, 2^5, 2^6, 2^8 tasks
    (0.889, 0.996, 0.20, 0.204, 0.1, "memorisation"),
    (0.752, 0.967, 0.20, 0.198, 0.3, "identification"),
    (0.582, 0.906, 0.20, 0.412, 0.6, "learning-to-learn"),
    (0.291, 0.833, 0.21, 0.807, 0.9, "learning-to-learn"),
    (0.21, 0.20, 0.19, 0.20, math.log(5) - 0.01, "plateau"),
    (0.90, 0.91, 0.90, 0.91, 0.3, "zero-shot"),  # labels that are never permuted
    (0.25, 0.30, 0.20, 0.20, 1.5, "undecided"),
]


def frame_of(rows: list[tuple]) -> pd.DataFrame:
    columns = [f"validation/{s}/accuracy_{e}" for s in ("seen_train", "unseen_held_out") for e in ("first", "last")]
    frame = pd.DataFrame(rows, columns=[*columns, "train/loss", "expected"])
    return frame.assign(state="complete", seed=0, num_tasks=2.0 ** np.arange(len(frame)))


def test_names_known_learners() -> None:
    frame = regimes(frame_of(KNOWN), CHANCE)
    assert list(frame["regime"]) == list(frame["expected"])


def test_thresholds_are_arguments() -> None:
    frame = frame_of(KNOWN)
    assert regimes(frame, CHANCE, rise=0.1)["regime"][1] == "identification"
    assert regimes(frame, CHANCE, margin=0.2)["regime"][7] == "plateau"
    with pytest.raises(ValueError, match=r"chance is 0\.0"):
        regimes(frame, 0.0)
    with pytest.raises(ValueError, match="rise is -1"):
        regimes(frame, CHANCE, rise=-1)


def test_new_tasks_in_every_sequence_are_seen_and_unseen_alike() -> None:
    frame = frame_of([(math.nan, math.nan, 0.2, 0.8, 0.9, ""), (math.nan, math.nan, 0.9, 0.9, 0.3, "")])
    assert list(regimes(frame, CHANCE)["regime"]) == ["learning-to-learn", "zero-shot"]
    without = frame.drop(columns=[name for name in frame if "seen_train" in name])
    assert list(regimes(without, CHANCE)["regime"]) == ["learning-to-learn", "zero-shot"]


def test_table_counts_the_cells_of_every_place() -> None:
    rows = [KNOWN[0], KNOWN[2], KNOWN[2], KNOWN[4]]
    frame = frame_of(rows).assign(num_tasks=[4.0, 4.0, 4.0, np.inf], width=64)
    failed = frame.assign(state="failed")
    table = regime_table(regimes(pd.concat([frame, failed]), CHANCE), ["num_tasks", "width"])
    assert list(table["num_tasks"]) == [4, np.inf] and list(table["cells"]) == [3, 1]
    assert list(table["regime"]) == ["identification", "learning-to-learn"]
    assert table["share"][0] == pytest.approx(2 / 3)
    assert table["seen_train_last"][0] == pytest.approx((1.0 + 2 * 0.967) / 3)
