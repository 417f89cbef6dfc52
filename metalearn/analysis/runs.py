"""Run folders as tidy tables: what was logged, and what ``validate`` and ``test`` measured.

A run folder holds ``logs/version_<k>``, one for each start, and after an evaluation ``validation.csv`` or ``test.csv``.
"""

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import pandas as pd
import yaml

COMMANDS = {"validation": "validate", "test": "test"}


def read_run(run_dir: str | Path) -> pd.DataFrame:
    """Everything that was logged in a run, over all of its restarts.

    A killed run repeats the steps since its last checkpoint; the last start wins for each (step, metric).

    Args:
        run_dir: the run folder, which holds ``logs/``.

    Returns:
        One row per logged value: run (the folder), seed (of the newest configuration; missing without one), step
        (0-based batch index), metric, value (NaN where training diverged) and version (the start that logged it).

    Raises:
        ValueError: if the folder or its metrics are missing.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(
            f"run folder is {str(run_dir)!r}, which does not exist; accepted: a folder with logs/version_*"
        )
    versions = _versions(run_dir)
    starts = [_read_start(path, version) for version, path in versions.items() if _has_metrics(path)]
    if not starts:
        raise ValueError(f"run folder is {str(run_dir)!r}, which has no metrics; accepted: logs/version_*/metrics.csv")
    frame = pd.concat(starts).drop_duplicates(["step", "metric"], keep="last")
    frame = frame.sort_values(["metric", "step"], ignore_index=True)
    frame.insert(0, "run", run_dir.as_posix())
    frame.insert(1, "seed", pd.array([_seed(versions.values())] * len(frame), dtype="Int64"))
    return frame


def read_evaluation(run_dir: str | Path, stage: str = "test") -> pd.DataFrame:
    """Accuracy against number of examples seen, as ``metalearn validate`` or ``metalearn test`` left it.

    Args:
        run_dir: the run folder.
        stage: "validation" or "test".

    Returns:
        Columns run, stream, method, position (number of examples seen before), sequences, accuracy (in regression
        squared_error), standard_error.

    Raises:
        ValueError: if the stage is unknown, or was not run yet.
    """
    frame = read_table_of(run_dir, stage, f"{stage}.csv")
    frame.insert(0, "run", Path(run_dir).as_posix())
    return frame


def read_table_of(run_dir: str | Path, stage: str, name: str) -> pd.DataFrame:
    """A table that the command of a stage has left in the run folder; ``ValueError`` as ``read_evaluation``."""
    if stage not in COMMANDS:
        raise ValueError(f"stage is {stage!r}; accepted: {', '.join(map(repr, COMMANDS))}")
    path = Path(run_dir) / name
    if not path.is_file():
        command = f"metalearn {COMMANDS[stage]} -c ... --run_dir {run_dir} --ckpt_path last"
        raise ValueError(f"{str(path)!r} does not exist; make it with: {command}")
    return pd.read_csv(path)


def read_metrics(run_dir: str | Path) -> pd.DataFrame:
    """``read_run``, and below it what was evaluated since.

    That is ``<stage>/<stream>/<method>/<examples seen>`` of ``<stage>.csv``, and ``<stage>/<name>`` of ``<stage>.json``.
    """
    run = read_run(run_dir)
    same = {name: run[name].iloc[-1] for name in ("run", "seed", "version")} | {"step": run["step"].max()}
    frames: list[pd.DataFrame] = [run]
    for stage in COMMANDS:
        if (Path(run_dir) / f"{stage}.csv").is_file():
            rows = read_evaluation(run_dir, stage)
            names = stage + "/" + rows["stream"] + "/" + rows["method"] + "/" + rows["position"].astype(str)
            frames.append(pd.DataFrame({"metric": names, "value": rows[quantity_of(rows)]}).assign(**same))
        if (path := Path(run_dir) / f"{stage}.json").is_file():
            numbers = {f"{stage}/{name}": value for name, value in json.loads(path.read_text()).items()}
            frames.append(pd.DataFrame(numbers.items(), columns=pd.Index(["metric", "value"])).assign(**same))
    return pd.concat(frames, ignore_index=True).astype({"seed": "Int64"})


def read_evaluations(run_dirs: Sequence[str | Path], stage: str = "test") -> pd.DataFrame:
    """The evaluation frames of several runs, one below the other."""
    return pd.concat([read_evaluation(run_dir, stage) for run_dir in run_dirs], ignore_index=True)


def quantity_of(frame: pd.DataFrame) -> str:
    """What an evaluation frame measures: "accuracy", or in regression "squared_error"."""
    return "accuracy" if "accuracy" in frame else "squared_error"


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders at or below ``folder``, sorted: those that have ``logs/``."""
    return sorted(logs.parent for logs in Path(folder).rglob("logs") if logs.is_dir())


def require_metric(frame: pd.DataFrame, metric: str) -> None:
    """Raise ``ValueError`` unless ``frame`` of ``read_run`` holds ``metric``; the message lists close matches first."""
    available = sorted(frame["metric"].unique())
    if metric not in available:
        close = get_close_matches(metric, available, n=5)
        names = ", ".join([*close, *(name for name in available if name not in close)])
        raise ValueError(f"metric is {metric!r}; {frame['run'].iloc[0]!r} has: {names}")


def require_single_run(frame: pd.DataFrame) -> None:
    """Raise ``ValueError`` if an evaluation frame has two accuracies for one (stream, method, position)."""
    repeated = frame[frame.duplicated(["stream", "method", "position"])]
    if len(repeated):
        first = repeated.iloc[0]
        place = f"stream {first['stream']!r}, method {first['method']!r}, position {first['position']}"
        raise ValueError(f"the evaluation has several rows for {place}; accepted: one run at a time")


def _versions(run_dir: Path) -> dict[int, Path]:
    """The starts of a run in order; as text, version_10 would sort before version_9."""
    folders = {path.name.removeprefix("version_"): path for path in (run_dir / "logs").glob("version_*")}
    return dict(sorted((int(number), path) for number, path in folders.items() if number.isdecimal()))


def _has_metrics(version_dir: Path) -> bool:
    path = version_dir / "metrics.csv"
    return path.is_file() and path.stat().st_size > 0


def _read_start(version_dir: Path, version: int) -> pd.DataFrame:
    # Read as text: pandas would take the nan of a diverged run for a cell that was not logged, and hide the divergence.
    wide = pd.read_csv(version_dir / "metrics.csv", dtype=str, keep_default_na=False)
    metrics = [column for column in wide.columns if column not in ("epoch", "step")]
    long = wide.melt(id_vars="step", value_vars=metrics, var_name="metric")
    long = long[
        (long["step"] != "") & (long["value"].fillna("") != "")
    ]  # a killed start may end in the middle of a row
    return long.astype({"step": int, "value": float}).assign(version=version)


def _seed(version_dirs: Iterable[Path]) -> int | None:
    """``seed_everything`` of the newest start that has a configuration."""
    configs = [path / "config.yaml" for path in version_dirs if (path / "config.yaml").is_file()]
    if not configs:
        return None
    seed = (yaml.safe_load(configs[-1].read_text()) or {}).get("seed_everything")
    # True asks Lightning to draw a seed, which the configuration does not tell.
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None
