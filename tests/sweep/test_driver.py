"""Sweeps of fake runs: every cell exactly once, whatever dies."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep import fake, fake_runs

from metalearn.files import locked
from metalearn.sweep.driver import Driver, Options
from metalearn.sweep.grid import read_sweep_file

GRID = {"seed_everything": [0, 1, 2], "x": [10, 20, 30]}


def table(folder):
    with open(folder / "cells.csv") as file:
        return list(csv.DictReader(file))


def starts(folder):
    return {path.parent.name: len(path.read_text().split()) for path in Path(folder).rglob("starts.txt")}


def test_every_cell_is_run_once_and_a_repetition_runs_none(write, tmp_path):
    outcomes = fake.sweep(write(GRID), tmp_path / "s")
    rows = table(tmp_path / "s")
    assert len(outcomes) == len(rows) == 9 and {row["state"] for row in rows} == {"complete"}
    assert [float(row["loss"]) for row in rows] == [seed + x for seed in range(3) for x in (10, 20, 30)]
    assert [(row["seed"], row["x"]) for row in rows[:2]] == [("0", "10"), ("0", "20")]
    again = fake.sweep(write(GRID), tmp_path / "s")
    assert again == outcomes and set(starts(tmp_path / "s").values()) == {1}
    more = fake.sweep(write(GRID | {"x": [10, 20, 30, 40]}), tmp_path / "s")  # a longer axis in the same folder
    assert len(more) == 12 and set(starts(tmp_path / "s").values()) == {1}


def test_failures_are_recorded_with_their_log_and_are_never_values(write, tmp_path):
    kinds = {
        "good": {},
        "crash": {"crash": True},
        "refused": {"refuse": True},
        "nan": {"loss": float("nan")},
        "slow": {"seconds": 30},
        "mortal": {"die_at": 2, "lives": 99},
        "reborn": {"die_at": 2, "lives": 3},
    }
    file = write({"kind": kinds})
    fake.sweep(file, tmp_path / "s", timeout_seconds=2)
    rows = {row["kind"]: row for row in table(tmp_path / "s")}
    reasons = {kind: row["reason"] for kind, row in rows.items() if row["state"] == "failed"}
    assert reasons.keys() == kinds.keys() - {"good", "reborn"}
    assert reasons["crash"] == "crashed" and reasons["refused"] == "wrong settings"
    assert reasons["nan"] == "not finite: loss" and rows["nan"]["loss"] == ""
    assert reasons["slow"] == "took longer than the timeout" and "3 times" in reasons["mortal"]
    assert "it broke" in (tmp_path / "s" / rows["crash"]["run_dir"] / "failure.json").read_text()
    counts = {kind: starts(tmp_path / "s")[row["cell"]] for kind, row in rows.items()}
    assert counts["mortal"] == counts["reborn"] == 3 and counts["crash"] == 1
    fake.sweep(file, tmp_path / "s", timeout_seconds=2)
    assert starts(tmp_path / "s")[rows["crash"]["cell"]] == 1  # failures stay failures,
    fake.sweep(file, tmp_path / "s", timeout_seconds=2, retry_failed=True)
    assert starts(tmp_path / "s")[rows["crash"]["cell"]] == 2  # unless one asks


def test_stops_where_every_run_breaks_down(write, tmp_path):
    with pytest.raises(ValueError, match="first 3 runs of the sweep all failed: crashed"):
        fake.sweep(write(GRID, {"crash": True}), tmp_path / "s", workers=1)
    assert len(starts(tmp_path / "s")) == 3


def test_a_budget_starts_no_further_runs(write, tmp_path):
    fake.sweep(write(GRID, {"seconds": 0.1}), tmp_path / "s", budget_minutes=0.6 / 60)
    states = [row["state"] for row in table(tmp_path / "s")]
    assert 0 < states.count("complete") < 9 and states.count("waiting") == 9 - states.count("complete")
    assert all(row["state"] == "complete" for row in _repeated(write(GRID, {"seconds": 0.1}), tmp_path / "s"))


def _repeated(file, folder):
    fake.sweep(file, folder)
    return table(folder)


def test_refuses_a_second_sweep_in_a_folder_and_another_config(write, tmp_path):
    with locked(tmp_path / "s", ""), pytest.raises(ValueError, match="another process sweeps in"):
        fake.sweep(write(GRID), tmp_path / "s")
    fake.sweep(write({"x": [1]}), tmp_path / "s")
    with pytest.raises(ValueError, match="holds a sweep of another config"):
        fake.sweep(write({"x": [1]}, {"steps": 6}), tmp_path / "s")


def test_a_cell_that_is_still_at_work_is_waited_for(write, tmp_path):
    fake.sweep(write({"x": [1]}), tmp_path / "s")
    folder = tmp_path / "s" / table(tmp_path / "s")[0]["run_dir"]
    (folder / "result.json").unlink()
    hold = f"with locked({str(folder)!r}, ''): print(1, flush=True); time.sleep(1.5)"
    code = f"import time; from metalearn.files import locked\n{hold}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        began = time.monotonic()
        os.remove(tmp_path / "s" / "journal.log")
        fake.sweep(write({"x": [1]}), tmp_path / "s")
    assert time.monotonic() - began > 1 and table(tmp_path / "s")[0]["state"] == "complete"


def test_a_search_proposes_betters_and_goes_on(write, tmp_path):
    search = {"x": {"low": 0.0, "high": 100.0}}
    options = {"search": search, "trials": 14, "objective": {"metric": "loss", "direction": "minimize"}}
    fake.sweep(write(**options, base={"steps": 1}), tmp_path / "s", workers=1)
    found = [float(row["x"]) for row in table(tmp_path / "s")]
    assert len(found) == 14 and min(found[10:]) < 20
    fake.sweep(write(**options | {"trials": 16}, base={"steps": 1}), tmp_path / "s", workers=1)
    assert len(table(tmp_path / "s")) == 16 and set(starts(tmp_path / "s").values()) == {1}


class Cluster:
    """An executor as submitit's: jobs with ``done`` and ``result``, errors of its own, and no end."""

    def __init__(self, broken):
        self.broken = broken

    def submit(self, function, *arguments):
        self.broken -= 1

        def result():
            if self.broken >= 0:
                raise RuntimeError("the queue lost a job")
            return function(*arguments)

        return SimpleNamespace(done=lambda: True, result=result)


def test_any_executor_with_done_and_result_will_do_and_may_lose_jobs(write, tmp_path):
    plan = read_sweep_file(write({"x": [1, 2]}))
    cluster = Cluster(broken=2)
    driver = Driver(plan, tmp_path / "s", fake_runs.main, lambda: cluster, Options(retries=2), fake.Silent())
    assert [outcome.metrics["loss"] for outcome in driver.run().values()] == [1, 2]


def test_a_search_runs_what_is_proposed_twice_once(write, tmp_path):
    options = {
        "search": {"x": {"choices": [1, 2]}},
        "trials": 8,
        "objective": {"metric": "loss", "direction": "maximize"},
    }
    outcomes = fake.sweep(write(**options), tmp_path / "s", workers=3)
    assert len(outcomes) == 2 and set(starts(tmp_path / "s").values()) == {1}
    with pytest.raises(ValueError, match="another config"):
        fake.sweep(write(**options | {"objective": {"metric": "loss", "direction": "minimize"}}), tmp_path / "s")


def test_a_grid_that_shrinks_and_grows_again_runs_what_is_left(write, tmp_path):
    fake.sweep(write({"x": [1, 2, 3]}), tmp_path / "s", budget_minutes=0)
    fake.sweep(write({"x": [1]}), tmp_path / "s")
    rows = _repeated(write({"x": [1, 2, 3]}), tmp_path / "s")
    assert [row["state"] for row in rows] == ["complete"] * 3 and set(starts(tmp_path / "s").values()) == {1}


def _driver(file, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sweep.fake", str(file), str(folder)]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait_for(folder, count, driver):
    while len(starts(folder)) < count:
        assert driver.poll() in (None, 0)
        time.sleep(0.02)


@pytest.mark.parametrize("victim", ["driver", "worker", "group"])
def test_whatever_is_killed_the_table_is_that_of_an_undisturbed_sweep(write, tmp_path, victim):
    draw = random.Random(victim)
    file, folder = write(GRID, {"seconds": 0.05}), tmp_path / "s"
    driver = _driver(file, folder)
    for count in (2, 5) if victim == "worker" else (3,):
        _wait_for(folder, count, driver)
        time.sleep(draw.uniform(0, 0.2))
        if victim == "worker":
            newest = max(folder.rglob("starts.txt"), key=lambda path: path.stat().st_mtime)
            os.kill(int(newest.read_text().split()[-1]), signal.SIGKILL)
            continue
        if victim == "driver":
            driver.kill()
        else:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        driver = _driver(file, folder)
    assert driver.wait(60) == 0
    fake.sweep(file, tmp_path / "undisturbed")
    assert table(folder) == table(tmp_path / "undisturbed")
    last_steps = [int((path.parent / "last").read_text()) for path in folder.rglob("starts.txt")]
    assert last_steps == [5] * 9
