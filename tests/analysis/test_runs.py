"""Run folders: what a reader gets out of restarts, crashes and evaluations."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalearn.analysis.runs import find_runs, read_evaluation, read_run, require_metric, require_single_run

COLUMNS = ["run", "seed", "step", "metric", "value", "version"]


def write_version(run_dir: Path, version: int, metrics: str | None = None, config: str | None = None) -> None:
    folder = run_dir / "logs" / f"version_{version}"
    folder.mkdir(parents=True, exist_ok=True)
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    if config is not None:
        (folder / "config.yaml").write_text(config)


def values(frame: pd.DataFrame, metric: str) -> dict[int, float]:
    return frame[frame["metric"] == metric].set_index("step")["value"].to_dict()


def test_reads_sparse_columns_as_one_row_per_value(tmp_path: Path) -> None:
    write_version(tmp_path, 0, "epoch,step,train/loss,validation/accuracy\n0,0,1.5,\n0,1,1.25,\n0,1,,0.5\n")
    frame = read_run(tmp_path)
    assert list(frame.columns) == COLUMNS
    assert values(frame, "train/loss") == {0: 1.5, 1: 1.25}
    assert values(frame, "validation/accuracy") == {1: 0.5}
    assert set(frame["run"]) == {tmp_path.as_posix()}
    assert frame["seed"].isna().all()


def test_last_start_wins_where_restarts_overlap(tmp_path: Path) -> None:
    write_version(tmp_path, 0, "step,a,b\n0,0.0,7\n1,0.1,\n2,0.2,\n")
    write_version(tmp_path, 1, "step,a\n1,1.1\n2,1.2\n3,1.3\n")
    frame = read_run(tmp_path)
    assert values(frame, "a") == {0: 0.0, 1: 1.1, 2: 1.2, 3: 1.3}
    assert values(frame, "b") == {0: 7.0}
    assert frame.set_index(["metric", "step"])["version"].to_dict()["a", 1] == 1


def test_version_10_is_later_than_version_9(tmp_path: Path) -> None:
    for version in (10, 9):
        write_version(tmp_path, version, f"step,a\n0,{version}\n", f"seed_everything: {version}")
    frame = read_run(tmp_path)
    assert values(frame, "a") == {0: 10.0}
    assert frame["seed"].tolist() == [10]


@given(st.lists(st.dictionaries(st.integers(0, 9), st.floats(-1e6, 1e6), min_size=1), min_size=1, max_size=12))
def test_matches_a_dictionary_updated_by_each_start(
    tmp_path_factory: pytest.TempPathFactory, starts: list[dict[int, float]]
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    expected: dict[int, float] = {}
    for version, start in enumerate(starts):
        rows = "".join(f"{step},{value!r}\n" for step, value in start.items())
        write_version(run_dir, version, "step,a\n" + rows)
        expected |= start
    assert values(read_run(run_dir), "a") == expected


def test_reads_past_starts_that_crashed(tmp_path: Path) -> None:
    write_version(tmp_path, 0, "step,a,b\n0,1.0,2.0\n", "seed_everything: 4\nmodel: null\n")
    write_version(tmp_path, 1)  # before the first metric
    write_version(tmp_path, 2, "")  # while the header was written
    write_version(tmp_path, 3, "a,b,step\n3.0,,1\n4.0")  # in the middle of a row
    frame = read_run(tmp_path)
    assert values(frame, "a") == {0: 1.0, 1: 3.0}
    assert values(frame, "b") == {0: 2.0}
    assert set(frame["seed"]) == {4}


def test_keeps_the_nan_of_a_diverged_run(tmp_path: Path) -> None:
    write_version(tmp_path, 0, "step,loss,accuracy\n0,1.0,\n1,nan,\n2,inf,0.5\n")
    loss = values(read_run(tmp_path), "loss")
    assert np.isnan(loss[1]) and np.isinf(loss[2])


@pytest.mark.parametrize("config", ["seed_everything: true", "seed_everything: null", "model: null", ""])
def test_seed_is_missing_where_the_configuration_tells_none(tmp_path: Path, config: str) -> None:
    write_version(tmp_path, 0, "step,a\n0,1.0\n", config)
    assert read_run(tmp_path)["seed"].isna().all()


def test_refuses_folders_without_metrics_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        read_run(tmp_path / "nowhere")
    write_version(tmp_path / "crashed", 0)
    with pytest.raises(ValueError, match=r"crashed.*no metrics"):
        read_run(tmp_path / "crashed")


def test_evaluation_comes_with_its_run(tmp_path: Path) -> None:
    text = "stream,method,position,sequences,accuracy,standard_error\nseen,learner,0,8,0.25,0.1\n"
    (tmp_path / "validation.csv").write_text(text)
    frame = read_evaluation(tmp_path, "validation")
    assert frame.to_dict("records") == [
        {
            **{"run": tmp_path.as_posix(), "stream": "seen", "method": "learner"},
            **{"position": 0, "sequences": 8, "accuracy": 0.25, "standard_error": 0.1},
        }
    ]


def test_missing_evaluation_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"metalearn test -c ... --run_dir {tmp_path} --ckpt_path last"):
        read_evaluation(tmp_path)
    with pytest.raises(ValueError, match="metalearn validate -c"):
        read_evaluation(tmp_path, "validation")
    with pytest.raises(ValueError, match="stage is 'fit'; accepted: 'validation', 'test'"):
        read_evaluation(tmp_path, "fit")


def test_finds_runs_at_and_below_a_folder(tmp_path: Path) -> None:
    for name in ("b/seed_1", "a", "b/seed_0"):
        write_version(tmp_path / name, 0)
    (tmp_path / "c").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b/seed_0", tmp_path / "b/seed_1"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    assert find_runs(tmp_path / "c") == find_runs(tmp_path / "nowhere") == []


def test_unknown_metric_lists_close_matches_first() -> None:
    frame = pd.DataFrame({"run": "runs/x", "metric": ["a/loss", "train/loss", "zzz"]})
    require_metric(frame, "train/loss")
    with pytest.raises(ValueError, match="metric is 'train/los'; 'runs/x' has: train/loss, a/loss, zzz"):
        require_metric(frame, "train/los")


def test_several_runs_in_one_evaluation_are_refused() -> None:
    frame = pd.DataFrame({"run": ["a"], "stream": ["seen"], "method": ["ridge"], "position": [5]})
    require_single_run(frame)
    with pytest.raises(ValueError, match="stream 'seen', method 'ridge', position 5"):
        require_single_run(pd.concat([frame, frame.assign(run="b")]))
