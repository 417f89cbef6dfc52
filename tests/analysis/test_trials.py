import pytest

from metalearn.analysis.trials import keep_trial, read_trials, summarise_trials, trial_frame


def test_trials_come_back_in_order(tmp_path):
    file = tmp_path / "new" / "trials.jsonl"
    assert read_trials(file) == []
    trials = [{"method": "a", "seed": 0, "value": 0.1}, {"method": "b", "seed": 1, "value": None}]
    for trial in trials:
        keep_trial(file, trial)
    assert read_trials(file) == trials
    assert [path.name for path in file.parent.iterdir()] == ["trials.jsonl"]


def test_summary_matches_mean_and_standard_deviation():
    trials = [
        {"method": "z", "value": 1.0},
        {"method": "a", "value": 2.0, "other": 5.0},
        {"method": "z", "value": 3.0},
    ]
    table = summarise_trials(trials, {"value": 2, "other": 0})
    assert list(table.columns) == ["method", "trials", "value", "other"]
    assert table.values.tolist() == [["z", 2, "2.00 ± 1.41", "-"], ["a", 1, "2.00", "5"]]


def test_values_that_have_no_deviation_are_shown_without():
    trials = [{"method": "a", "value": 1.0}, {"method": "a", "value": float("inf")}]
    assert summarise_trials(trials, {"value": 1}).values.tolist() == [["a", 2, "inf"]]


def test_frame_has_a_row_per_trial():
    frame = trial_frame([{"method": "a", "accuracy": 0.5}, {"method": "b"}])
    assert frame["accuracy"].tolist() == pytest.approx([0.5, float("nan")], nan_ok=True)
