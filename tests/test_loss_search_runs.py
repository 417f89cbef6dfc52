"""Runs of loss search from the command line: killed in any phase and resumed, shared by ranks or workers, shown, refused."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from test_cli import HERE, last, refused, signalled
from test_resume import DDP, start

import metalearn
from metalearn.analysis.runs import read_metrics
from metalearn.cli import main
from metalearn.search import processes
from metalearn.search.cache import Cache
from metalearn.search.hall_of_fame import HallOfFame
from metalearn.training.loss_search import LossSearch

CONFIG = HERE / "training" / "tiny_search.yaml"
FILES = ("hall_of_fame.csv", "best.json")
STEPS = 9  # four generations, two steps of two finalists, one scoring


def fit(folder, *overrides, config=CONFIG):
    return main(["fit", "-c", str(config), "--run_dir", str(folder), "--ckpt_path", "last", *map(str, overrides)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run. Tests may read it and must not change it."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    assert fit(folder) == 0
    return folder


def assert_same_files(folder, other):
    for name in FILES:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_ends_by_itself_with_both_columns(whole):
    assert (
        last(whole)["global_step"] == STEPS and json.loads((whole / "result.json").read_text())["global_step"] == STEPS
    )
    lines = (whole / "hall_of_fame.csv").read_text().splitlines()
    assert lines[0].split(",")[:5] == ["rank", "error", "complexity", "verdict", "program"]
    assert {"generation", "rescored", "rescored_tuned", "weights_tuned"} <= set(lines[0].split(","))
    best = metalearn.load_loss(str(whole / "best.json"))
    assert best(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).isfinite()
    about = best.provenance
    assert about["seed"] == 0 and 0 <= about["untouched_error"] <= 1 and about["generations"] == 4
    metrics = set(read_metrics(whole)["metric"])
    assert {
        "search/best",
        "search/median",
        "search/unique",
        "search/rejected",
        "search/seconds",
        "tune/loss",
    } <= metrics


@pytest.mark.parametrize("step", [3, 6])  # in the third generation; in the first finalist's tuning
def test_killed_run_resumes_byte_identical(whole, tmp_path, step):
    if step == 3:
        killed = start(CONFIG, tmp_path, *signalled(step, signal.SIGKILL))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    else:
        with pytest.raises(SystemExit):
            fit(tmp_path, *signalled(step, signal.SIGTERM))
    assert step - 1 <= last(tmp_path)["global_step"] <= step and not (tmp_path / "result.json").exists()
    assert fit(tmp_path) == 0
    assert_same_files(tmp_path, whole)
    ours, theirs = (last(folder)["search"] for folder in (tmp_path, whole))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


class PulledPlugError(Exception):
    """What ends a process between two writes."""


@pytest.mark.parametrize("where", [(Cache, "add"), (HallOfFame, "write"), (LossSearch, "on_save_checkpoint")])
def test_a_run_that_ends_between_two_writes_resumes_byte_identical(whole, tmp_path, monkeypatch, where):
    owner, name = where
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **named):
        calls.append(name)
        result = original(*arguments, **named)
        if len(calls) == 3:
            raise PulledPlugError
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(PulledPlugError):
            fit(tmp_path)
    assert fit(tmp_path) == 0
    assert_same_files(tmp_path, whole)


def test_a_capped_search_is_not_finished(whole, tmp_path):
    assert fit(tmp_path, "--trainer.max_steps", 2) == 0
    assert last(tmp_path)["global_step"] == 2 and not (tmp_path / "result.json").exists()
    (tmp_path / "cache.jsonl").unlink()  # the checkpoint has all that it takes
    assert fit(tmp_path) == 0
    assert_same_files(tmp_path, whole)


def test_mixed_precision_searches_too(tmp_path):
    assert fit(tmp_path, "--trainer.precision", "bf16-mixed") == 0
    best = metalearn.load_loss(str(tmp_path / "best.json"))
    assert best.provenance["untouched_error"] < 0.2


def test_every_generation_is_shown(tmp_path, capsys):
    assert fit(tmp_path, "--trainer.enable_progress_bar", "true", "--trainer.max_steps", 3) == 0
    shown = capsys.readouterr().out
    for step in (1, 2, 3):
        assert f" {step}/3 " in shown
    assert "search/best=" in shown and "search/median=" in shown and "search/rejected=" in shown


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_killed_at_any_step_resumes_byte_identical(whole, tmp_path, step):
    killed = start(CONFIG, tmp_path, *signalled(step, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert fit(tmp_path) == 0
    assert_same_files(tmp_path, whole)


def test_two_ranks_equal_one(whole, tmp_path):
    shared = start(CONFIG, tmp_path, "-c", DDP, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert shared.returncode == 0, shared.stderr
    assert "distributed_backend=gloo" in shared.stderr
    assert_same_files(tmp_path, whole)


def test_two_workers_equal_one_process(whole, tmp_path, monkeypatch):
    made = []

    def threads(workers, threads):
        made.append((workers, threads))
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(processes, "_started", threads)
    assert fit(tmp_path, "--model.init_args.workers", 2) == 0
    assert len(made) > 3 and set(made) == {(2, max(1, torch.get_num_threads() // 2))}
    assert_same_files(tmp_path, whole)


@pytest.mark.slow
def test_two_workers_one_of_which_is_killed_equal_one_process(whole, tmp_path):
    content = yaml.safe_load(CONFIG.read_text())
    arguments = content["model"]["init_args"]
    dying = {"steps": arguments["fitness"]["init_args"]["steps"], "folder": str(tmp_path)}
    arguments |= {"workers": 2, "fitness": {"class_path": "search.mortal.DiesOnce", "init_args": dying}}
    config = tmp_path / "workers.yaml"
    config.write_text(yaml.safe_dump(content))
    shared = start(config, tmp_path / "two")
    assert shared.returncode == 0, shared.stderr
    assert (tmp_path / "killed.txt").exists()
    assert_same_files(tmp_path / "two", whole)


@pytest.mark.slow
def test_two_ranks_that_halve_equal_one(tmp_path):
    content = yaml.safe_load(CONFIG.read_text())
    fitness = content["model"]["init_args"]["fitness"]["init_args"]
    fitness["halving"] = {"class_path": "Halving", "init_args": {"rungs": [3, 6], "keep": 0.6}}
    config = tmp_path / "halving.yaml"
    config.write_text(yaml.safe_dump(content))
    shared = start(config, tmp_path / "two", "-c", DDP, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert shared.returncode == 0, shared.stderr
    assert fit(tmp_path / "one", config=config) == 0
    assert_same_files(tmp_path / "two", tmp_path / "one")
    assert any(entry["verdict"] == "halved" for entry in last(tmp_path / "one")["search"]["population"])


def test_validate_and_test_compare_with_the_own_loss(whole, capsys):
    for command, stage in (("validate", "validation"), ("test", "test")):
        assert main([command, "-c", str(CONFIG), "--run_dir", str(whole), "--ckpt_path", "last"]) == 0
        found = json.loads((whole / f"{stage}.json").read_text())
        assert 0 <= found["error"] <= 1 and 0 <= found["own_loss_error"] <= 1
        assert f"{stage}/error" in capsys.readouterr().out


def test_show_prints_the_hall_of_fame_and_draws_it(whole, capsys):
    assert main(["loss", "show", str(whole)]) == 0
    shown = capsys.readouterr().out
    assert "losses.png" in shown and "error" in shown and (whole / "losses.png").stat().st_size > 10_000


def test_mistakes_are_one_line_and_lose_nothing(whole, tmp_path, capsys):
    before = (whole / "hall_of_fame.csv").read_bytes()
    assert "has checkpoints; add --ckpt_path last" in refused(capsys, "fit", "-c", CONFIG, "--run_dir", whole)
    other = ("--model.init_args.task.init_args.untouched", 0.25)
    arguments = ("fit", "-c", CONFIG, "--run_dir", whole, "--ckpt_path", "last")
    assert "division" in refused(capsys, *arguments, *other)
    for changed in (("fitness", "steps", 13), ("tuning", "steps", 1), ("task", "outer_batch_size", 16)):
        option = "--model.init_args.{}.init_args.{}".format(*changed)
        assert "settings" in refused(capsys, *arguments, option, changed[-1])
    assert "the same seed" in refused(capsys, *arguments, "--seed_everything", 1)
    assert (whole / "hall_of_fame.csv").read_bytes() == before
    fresh = ("fit", "-c", CONFIG, "--run_dir", tmp_path)
    assert "population_size is 0" in refused(capsys, *fresh, "--model.init_args.strategy.init_args.population_size", 0)
    seeds = ("--model.init_args.strategy.init_args.seeds", '["mul(y,"]')
    assert "position" in refused(capsys, *fresh, *seeds)
    assert "no examples to score" in refused(capsys, *fresh, "--model.init_args.task.init_args.untouched", 0)
    assert "lr is -1.0" in refused(capsys, *fresh, "--model.init_args.tuning.init_args.lr", -1)
    assert "workers is 0" in refused(capsys, *fresh, "--model.init_args.workers", 0)
