"""A run that was killed, or shared out over two processes, ends with the weights of a run that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_cli import HERE, TINY, fit, last, run_dir, signalled  # noqa: F401 (run_dir is a fixture)

from metalearn import InContextClassifier
from metalearn.analysis.runs import read_run

DDP = HERE.parent / "configs" / "hardware" / "ddp.yaml"


def start(config, folder, *overrides):
    """``metalearn fit`` in a process of its own."""
    arguments = [sys.executable, "-m", "metalearn", "fit", "-c", config, "--run_dir", folder, "--ckpt_path", "last"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run(
        list(map(str, (*arguments, *overrides))), env=environment, capture_output=True, text=True, timeout=120
    )


def command(folder, *overrides):
    return start(TINY, folder, *overrides)


def assert_same_training_state(folder, other):
    """Weights, optimizer, schedule, light checkpoints and counts, bit by bit; wall seconds differ."""
    ours, theirs = last(folder), last(other)
    for checkpoint in (ours, theirs):
        checkpoint["callbacks"]["Budget"].pop("seconds")
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group.pop("param_names")  # strings
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    for name in ("Budget", "StudyCheckpoints"):
        torch.testing.assert_close(ours["callbacks"][name], theirs["callbacks"][name], rtol=0, atol=0)
    names = [sorted(path.name for path in Path(run).rglob("*.safetensors")) for run in (folder, other)]
    assert names[0] == names[1]


def test_killed_run_resumes_bit_equal(run_dir, tmp_path):  # noqa: F811
    killed = command(tmp_path, *signalled(3, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last(tmp_path)["global_step"] == 2
    assert fit(tmp_path, "--ckpt_path", "last") == 0
    second = read_run(tmp_path).query("version == 1 and metric == 'train/loss'")
    assert list(second["step"]) == [2, 3]  # resumed, not started afresh
    assert_same_training_state(tmp_path, run_dir)


@pytest.mark.parametrize(
    "overrides",
    [
        ("--model.init_args.decay", "cosine", "--trainer.accumulate_grad_batches", "2"),
        ("--model.init_args.warmup_steps", "3", "--trainer.val_check_interval", "3"),
    ],
)
def test_terminated_run_resumes_bit_equal(tmp_path, overrides):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert fit(whole, *overrides) == 0
    with pytest.raises(SystemExit):
        fit(parts, *overrides, *signalled(3, signal.SIGTERM))
    assert last(parts)["global_step"] == 2
    assert fit(parts, *overrides, "--ckpt_path", "last") == 0
    assert_same_training_state(parts, whole)
    frames = [read_run(run).query("metric.str.startswith('validation')") for run in (whole, parts)]
    pd.testing.assert_frame_equal(*(frame[["step", "metric", "value"]].reset_index(drop=True) for frame in frames))


# A bias on all keys changes no attention. Its gradient is rounding noise, which Adam must not blow up to whole steps.
CALM = ("--model.init_args.optimizer.init_args.eps", "1e-3")


def test_two_ranks_equal_one(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert fit(alone, *CALM) == 0
    done = command(shared, *CALM, "-c", DDP, "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert done.returncode == 0, done.stderr
    assert "distributed_backend=gloo" in done.stderr and last(shared)["global_step"] == 4
    torch.testing.assert_close(last(shared)["state_dict"], last(alone)["state_dict"], rtol=0, atol=1e-5)
    two, one = (read_run(run).set_index(["metric", "step"])["value"] for run in (shared, alone))
    same = one.index[one.index.get_level_values(0).str.match("validation/|budget/(tokens|flops)")]
    assert len(same) > 8
    torch.testing.assert_close(torch.tensor(two[same].values), torch.tensor(one[same].values), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_sharded_run_is_read_by_the_classifier(tmp_path):
    fsdp = HERE.parent / "configs" / "hardware" / "fsdp.yaml"
    assert fit(tmp_path, "-c", fsdp, "--trainer.accelerator", "cuda") == 0
    assert {"step=00000001.safetensors", "step=00000004.safetensors"} <= {
        path.name for path in (tmp_path / "checkpoints" / "steps").iterdir()
    }
    classifier = InContextClassifier.from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", num_estimators=1)
    assert classifier.fit([[0.0], [1.0]], ["a", "b"]).predict_proba([[0.5]]).shape == (1, 2)
