"""The bench of sweeps against a command that leaves a sweep of known times behind, and once against the real one."""

import json
import sys

import pytest
import torch

from experiments.bench import ensemble, sweeps
from experiments.bench.sweeps import SIZES, Bench
from experiments.bench.timing import Comparison, UnequalError
from metalearn.sweep.grid import read_sweep_file

# Runs of 10 s, and 1 s from one to the next on the same worker.
COMMAND = """
import csv, json, os, pathlib, shutil, sys
file, workers = sys.argv[1], int(sys.argv[sys.argv.index("--workers") + 1])
folder = pathlib.Path(sys.argv[sys.argv.index("--sweep_dir") + 1])
kept, cells, change, code = pathlib.Path(sys.argv[0]).parent, {cells}, {change}, {code}
shutil.copyfile(file, kept / "copy.sweep.yaml")
(kept / "words.json").write_text(json.dumps(sys.argv))
rows = []
for cell in range(cells):
    run = folder / "runs" / str(cell)
    run.mkdir(parents=True)
    start = 1000 + 11 * (cell // workers)
    for name, text, at in (("cell.yaml", "", start), ("result.json", json.dumps(dict(seconds=8.5)), start + 10)):
        (run / name).write_text(text)
        os.utime(run / name, (at, at))
    rows.append(dict(cell=cell, seconds=8.5 + workers, loss=0.25 + change * workers * (cell == 1)))
with open(folder / "cells.csv", "w") as file:
    csv.DictWriter(file, rows[0]).writeheader()
    csv.DictWriter(file, rows[0]).writerows(rows)
print("the reason")
sys.exit(code)
"""


@pytest.fixture
def make_bench(tmp_path):
    def make_bench(change=0.0, code=0, **options):
        script = tmp_path / "command.py"
        script.write_text(COMMAND.format(cells=len(options.get("sizes", SIZES)), change=change, code=code))
        return Bench(command=(sys.executable, str(script)), **options)

    return make_bench


def test_ratios_and_overhead_match_the_times_that_the_command_left(make_bench, tmp_path, capsys):
    sweeps.measure(make_bench(), ["workers"], tmp_path / "rows.json")
    whole, later, alone, shared, command = json.loads((tmp_path / "rows.json").read_text())
    assert later["ratio"] == pytest.approx((9 * 10 + 8) / (5 * 10 + 4)) and later["met"] is True
    assert (alone["ours"], alone["theirs"]) == ([8.0], [90.0])
    assert (shared["ours"], shared["theirs"]) == ([7.0], [90.0])
    assert alone["met"] is shared["met"] is False and [alone["bar"], command["bar"]] == [0.05, 120.0]
    assert whole["ours"] == command["ours"] and command["met"] is True
    printed = capsys.readouterr().out
    assert "9 cells are equal; at most 1.80 can come of two" in printed
    assert "10.0 s a run, 8.5 s of it inside fit" in printed


def test_the_command_is_told_of_nine_runs_of_so_many_steps(make_bench, tmp_path):
    bench = make_bench(steps=20)
    assert sweeps.sweep(bench, 2).inside_fit == pytest.approx(9 * 8.5)
    words = json.loads((tmp_path / "words.json").read_text())
    settings = [words[k + 1] for k, word in enumerate(words) if word == "--set"]
    cells = list(read_sweep_file(tmp_path / "copy.sweep.yaml", settings).cells())
    assert [cell.point for cell in cells] == [{"seed": 0, "num_tasks": 2**k} for k in range(2, 11)]
    assert {cell.config["trainer"]["max_steps"] for cell in cells} == {20}
    assert {cell.config["trainer"]["val_check_interval"] for cell in cells} == {20}


def test_small_grids_are_held_to_no_bar(make_bench, tmp_path):
    sweeps.measure(make_bench(sizes=(4, 8, 16, 32), steps=20, pairs=2), ["workers"], tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["bar"] for row in rows} == {None} and {len(row["ours"]) for row in rows} == {2}


def test_no_ratio_where_tables_differ(make_bench, tmp_path, capsys):
    sweeps.measure(make_bench(change=0.5), ["workers"], tmp_path / "rows.json")
    assert "workers: NOT MEASURED: loss of 1 is 1.25 and 0.75" in capsys.readouterr().out
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["workers"]


def test_a_command_that_fails_is_shown(make_bench):
    with pytest.raises(RuntimeError, match=r"ended with 3: the reason"):
        sweeps.sweep(make_bench(code=3), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "worker"}, "only is 'worker'; accepted: 'workers', 'ensemble'"),
        ({"steps": 9}, "steps is 9; accepted: 10 <= steps"),
        ({"pairs": 0}, "pairs is 0"),
        ({"device": "tpu"}, "device is 'tpu'; accepted: 'cpu'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sweeps.main(**options)


def test_an_ensemble_is_found_equal_to_its_members_before_it_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(ensemble.Effort, "compare", lambda effort, ours, theirs: Comparison([ours()], [theirs()]))
    row = ensemble.against_one_by_one(members=2, steps=6, width=8)
    assert row.measured.ratio > 0 and row.bar is None and "backward" in capsys.readouterr().out
    made, warmups = ensemble.make_members, iter((0, 50))

    def of_another_schedule(*arguments):
        members = made(*arguments)
        members[1].model.warmup_steps = next(warmups)
        return members

    monkeypatch.setattr(ensemble, "make_members", of_another_schedule)
    with pytest.raises(UnequalError, match="logits of member 1"):
        ensemble.against_one_by_one(members=2, steps=6, width=8)


@pytest.mark.slow
def test_two_workers_make_the_table_that_one_makes():
    rows = list(sweeps.workers(Bench(sizes=(4, 1024), steps=10)))
    assert torch.tensor([row.ratio for row in rows[2:]]).isfinite().all()
