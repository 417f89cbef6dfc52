"""Meta-gradient runs from the command line: killed and resumed, shared over two processes, evaluated, refused."""

import json
import signal

import pytest
import torch
import yaml
from test_cli import HERE, last, refused, signalled
from test_resume import DDP, start

from metalearn.analysis.runs import read_metrics
from metalearn.cli import main

SCHEDULE, WEIGHTS = HERE / "training" / "tiny_schedule.yaml", HERE / "training" / "tiny_weights.yaml"
OPTIMIZER, MIXTURE = HERE / "training" / "tiny_optimizer.yaml", HERE / "training" / "tiny_mixture.yaml"
REWEIGHTING = HERE.parent / "configs" / "multilevel" / "reweighting.yaml"
ESTIMATOR = "model.init_args.estimator"
# Each family on a problem that it is for. Directions and pairs are a multiple of two ranks.
FAMILIES = {
    "checkpoint": (WEIGHTS, "Unrolled", {"mode": "checkpoint", "warm_start": True}),
    "implicit": (WEIGHTS, "ConjugateGradient", {"iterations": 3, "damping": 1.0, "reuse_solution": True}),
    "forward": (WEIGHTS, "ForwardGradient", {"directions": 4, "warm_start": True}),
    "zeroth": (WEIGHTS, "ZerothOrder", {"directions": 4, "chunk": 1}),
    "recurrent": (SCHEDULE, "UnbiasedOnlineRecurrent", {}),
    "noise": (SCHEDULE, "NoiseReuseES", {"pairs": 4, "std": 0.3}),
    "phases": (
        WEIGHTS,
        "TwoPhase",
        {
            "first": {"class_path": "Neumann", "init_args": {"terms": 2}},
            "second": {"class_path": "ForwardGradient", "init_args": {"directions": 4, "warm_start": True}},
            "switch": 3,
        },
    ),
}


def config_of(family, folder):
    """The family's config, written anew: another class may not be chosen over a file's settings."""
    base, class_path, init_args = FAMILIES[family]
    content = yaml.safe_load(base.read_text())
    content["model"]["init_args"]["estimator"] = {"class_path": class_path, "init_args": init_args}
    path = folder / f"{family}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(config, folder, *overrides):
    return main(["fit", "-c", str(config), "--run_dir", str(folder), "--ckpt_path", "last", *map(str, overrides)])


def assert_same(folder, other, tolerance=0.0, steps=6):
    ours, theirs = last(folder), last(other)
    for part in ("state_dict", "estimator", "optimizer_states"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=tolerance, atol=tolerance)
    assert ours["global_step"] == theirs["global_step"] == steps


def assert_killed_run_resumes(config, tmp_path):
    killed = start(config, tmp_path / "killed", *signalled(3, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last(tmp_path / "killed")["global_step"] == 2
    assert fit(config, tmp_path / "killed") == fit(config, tmp_path / "whole") == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")


# Where directions cancel in an entry, what is left is rounding noise, which Adam must not blow up to whole steps.
CALM = ("--model.init_args.optimizer.init_args.eps", "1e-3")


def assert_two_ranks_equal_one(config, tmp_path, steps=6, tolerance=1e-6):
    two = ("-c", DDP, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    shared = start(config, tmp_path / "shared", *CALM, *two)
    assert shared.returncode == 0, shared.stderr
    assert "distributed_backend=gloo" in shared.stderr and fit(config, tmp_path / "alone", *CALM) == 0
    assert_same(tmp_path / "shared", tmp_path / "alone", tolerance, steps)


def test_killed_run_resumes_bit_equal(tmp_path):
    assert_killed_run_resumes(SCHEDULE, tmp_path)


def test_killed_program_of_two_levels_resumes_bit_equal(tmp_path):
    short = ("--trainer.max_steps", 6, "--checkpoint.every_n_train_steps", 2, "--trainer.accelerator", "cpu")
    killed = start(REWEIGHTING, tmp_path / "killed", *short, *signalled(3, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last(tmp_path / "killed")["global_step"] == 2
    quick = (*short, "--trainer.limit_val_batches", 0)
    assert fit(REWEIGHTING, tmp_path / "killed", *quick) == fit(REWEIGHTING, tmp_path / "whole", *quick) == 0
    ours, theirs = last(tmp_path / "killed"), last(tmp_path / "whole")
    for part in ("state_dict", "levels"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert ours["global_step"] == 6


def test_two_ranks_equal_one(tmp_path):
    assert_two_ranks_equal_one(SCHEDULE, tmp_path)


def test_killed_training_of_an_optimizer_resumes_bit_equal(tmp_path):
    assert_killed_run_resumes(OPTIMIZER, tmp_path)
    rules = [(tmp_path / name / "rule.safetensors").read_bytes() for name in ("killed", "whole")]
    assert rules[0] == rules[1]


@pytest.mark.slow
def test_two_ranks_that_train_an_optimizer_for_a_hundred_steps_equal_one(tmp_path):
    longer = yaml.safe_load(OPTIMIZER.read_text())
    longer["trainer"]["max_steps"] = 100
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(longer))
    # To the bit: evolution's differences magnify what rounding a mean leaves.
    assert_two_ranks_equal_one(tmp_path / "longer.yaml", tmp_path, steps=100, tolerance=0)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "tolerance"), [(OPTIMIZER, 0.0), (MIXTURE, 1e-6)], ids=["pairs", "tasks"])
def test_a_run_goes_from_one_rank_to_two_and_back(config, tolerance, tmp_path):
    """Pairs, and the tasks of a mixture, are divided anew among the ranks: pairs to the bit the run of one."""
    two = ("-c", DDP, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert fit(config, tmp_path / "moved", "--trainer.max_steps", 2) == 0
    shared = start(config, tmp_path / "moved", "--trainer.max_steps", 4, *two)
    assert shared.returncode == 0, shared.stderr
    assert last(tmp_path / "moved")["global_step"] == 4
    assert fit(config, tmp_path / "moved") == fit(config, tmp_path / "whole") == 0
    assert_same(tmp_path / "moved", tmp_path / "whole", tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_killed_run_of_any_estimator_resumes_bit_equal(family, tmp_path):
    assert_killed_run_resumes(config_of(family, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "recurrent"])
def test_two_ranks_with_any_estimator_equal_one(family, tmp_path):
    assert_two_ranks_equal_one(config_of(family, tmp_path), tmp_path)


def test_a_finished_run_goes_on_to_a_higher_max_steps(tmp_path):
    shortened = ("--trainer.max_steps", 4)
    assert fit(SCHEDULE, tmp_path / "parts", *shortened) == 0
    assert fit(SCHEDULE, tmp_path / "parts") == fit(SCHEDULE, tmp_path / "whole") == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_evaluation_is_written_printed_and_read(tmp_path, capsys):
    assert fit(WEIGHTS, tmp_path) == 0
    for command, stage in (("validate", "validation"), ("test", "test")):
        assert main([command, "-c", str(WEIGHTS), "--run_dir", str(tmp_path), "--ckpt_path", "last"]) == 0
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        assert 0 <= found["f1"] <= 1 and f"{stage}/f1" in capsys.readouterr().out
    frame = read_metrics(tmp_path).set_index("metric")["value"]
    assert frame["test/f1"] == found["f1"] and "validation/accuracy_learned" in frame.index


def test_mistakes_are_one_line(tmp_path, capsys):
    arguments = ["fit", "-c", SCHEDULE, "--run_dir", tmp_path]
    assert "steps is 0; accepted: 1 <= steps" in refused(capsys, *arguments, "--model.init_args.steps", 0)
    assert "std is -1.0" in refused(capsys, *arguments, f"--{ESTIMATOR}.init_args.std", -1)
    config = config_of("implicit", tmp_path)
    content = yaml.safe_load(config.read_text())
    content["model"]["init_args"]["problem"] = {"class_path": "LearningRateToy"}
    config.write_text(yaml.safe_dump(content))
    refusal = refused(capsys, "fit", "-c", config, "--run_dir", tmp_path)
    assert "ConjugateGradient cannot be used on LearningRateToy: it has no inner_loss" in refusal
    assert not (tmp_path / "checkpoints").exists()
