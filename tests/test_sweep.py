"""``metalearn sweep`` on real runs: processes, an ensemble and Ray give the same table, and mistakes are told at once."""

import csv
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from test_cli import TINY, refused

from metalearn.analysis.sweeps import read_sweep_logs
from metalearn.cli import main

TASKS = "data.init_args.tasks.init_args.num_tasks"
GRID = {TASKS: [4, None], "seed_everything": [0, 1]}


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "x.sweep.yaml", GRID)


def write(path, grid, **content):
    path.write_text(yaml.safe_dump({"config": str(TINY), "grid": grid} | content))
    return path


def sweep(file, folder, *options):
    return main(["sweep", str(file), "--sweep_dir", str(folder), *map(str, options)])


def table(folder):
    with open(folder / "cells.csv") as text:
        return {row.pop("cell"): row for row in csv.DictReader(text)}


def numbers(row):
    return {name: float(value) for name, value in row.items() if value and ("/" in name or name == "step")}


def assert_same_tables(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for cell, row in ours.items():
        assert row["state"] == theirs[cell]["state"] == "complete"
        assert numbers(row) == pytest.approx(numbers(theirs[cell]), rel=tolerance, abs=tolerance)


def last(folder, cell):
    return torch.load(folder / "runs" / cell / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_an_ensemble_gives_the_table_of_single_runs(file, tmp_path, capsys):
    write(file, GRID, report={"x": "num_tasks"})
    calm = ("--set", "model.init_args.optimizer.init_args.eps=1.0e-3")  # see test_resume
    assert sweep(file, tmp_path / "alone", *calm) == 0
    assert "4 of 4 cells complete, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "alone" / "phases.png").is_file()
    logs = read_sweep_logs(tmp_path / "alone", "train/loss")
    assert logs.groupby("cell").step.max().tolist() == [3] * 4 and logs["seed"].nunique() == 2
    assert sweep(file, tmp_path / "together", "--executor", "ensemble", "--threads", 1, *calm) == 0
    ours, theirs = table(tmp_path / "alone"), table(tmp_path / "together")
    assert [(row["seed"], row["num_tasks"]) for row in ours.values()] == [("0", "4"), ("0", ""), ("1", "4"), ("1", "")]
    assert_same_tables(ours, theirs, 1e-4)
    for cell in ours:
        torch.testing.assert_close(
            last(tmp_path / "alone", cell), last(tmp_path / "together", cell), rtol=1e-4, atol=1e-4
        )
    one = tmp_path / "together" / "runs" / next(iter(ours))
    assert main(["test", "-c", str(one / "cell.yaml"), "--run_dir", str(one), "--ckpt_path", "last"]) == 0


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"trainer.max_stepss": [1, 2]}, "the run at max_stepss 1 is refused: Subcommand 'fit' does not accept"),
        ({"model.init_args.tokens": ["shift", "papier"]}, "the run at tokens papier is refused: tokens is 'papier'"),
        ({TASKS: [4, 0]}, "the run at num_tasks 0 is refused: num_tasks is 0"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(tmp_path, capsys, grid, message):
    line = refused(capsys, "sweep", write(tmp_path / "x.sweep.yaml", grid), "--sweep_dir", tmp_path / "s")
    assert message in line and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--executor", "cluster"), "executor is 'cluster'; accepted: 'processes', 'ray', 'ensemble'"),
        (("--workers", "0"), "workers is 0"),
        (("--set", "trainer.max_steps"), "set is 'trainer.max_steps'; accepted: dotted.path=value"),
        (("--timeout_minutes", "0"), "timeout_seconds is 0.0"),
    ],
)
def test_refuses_options_by_name(file, tmp_path, capsys, options, message):
    assert message in refused(capsys, "sweep", file, "--sweep_dir", tmp_path / "s", *options)


def test_a_dry_run_lists_the_cells_and_estimates_the_cost(file, tmp_path, capsys):
    assert sweep(file, tmp_path / "s", "--dry_run") == 0
    out = capsys.readouterr().out
    assert out.count("seed=") == 4 and "4 cells, " in out and "core-hours" in out and not (tmp_path / "s").exists()


@pytest.mark.slow
def test_ray_gives_the_table_of_processes(file, tmp_path):
    pytest.importorskip("ray")
    assert sweep(file, tmp_path / "here") == 0
    code = f"import sys; from metalearn.cli import main; sys.exit(main(['sweep', {str(file)!r}, '--sweep_dir', "
    code += f"{str(tmp_path / 'there')!r}, '--executor', 'ray', '--workers', '2']))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)  # Ray's own warnings are not ours
    assert_same_tables(table(tmp_path / "here"), table(tmp_path / "there"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ensemble"])
def test_a_sweep_that_is_killed_again_and_again_ends_in_the_same_weights(file, tmp_path, executor):
    settings = ["--set", "trainer.max_steps=2000", "--set", "trainer.val_check_interval=500", "--executor", executor]
    command = [
        sys.executable,
        "-m",
        "metalearn",
        "sweep",
        str(file),
        "--sweep_dir",
        str(tmp_path / "killed"),
        *settings,
    ]
    for _ in range(3):
        driver = subprocess.Popen(command, start_new_session=True)
        while not list((tmp_path / "killed").rglob("last.ckpt")):
            time.sleep(0.1)
            assert driver.poll() is None
        time.sleep(random.uniform(0, 6))
        assert driver.poll() is None
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    subprocess.run(command, check=True, timeout=1200)
    assert sweep(file, tmp_path / "whole", *settings) == 0
    assert_same_tables(table(tmp_path / "killed"), table(tmp_path / "whole"), 0)
    for cell in table(tmp_path / "whole"):
        torch.testing.assert_close(last(tmp_path / "killed", cell), last(tmp_path / "whole", cell), rtol=0, atol=0)
