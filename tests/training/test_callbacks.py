"""callbacks.py: resume points, the steps of light checkpoints, and a budget that adds up over restarts."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from metalearn.models.recurrent import LSTM
from metalearn.models.saving import load_learner
from metalearn.training.callbacks import Budget, RunCheckpoint, StudyCheckpoints, is_log_spaced


@pytest.mark.parametrize("max_steps", [6, 7])
def test_last_checkpoint_holds_the_last_step(train, tmp_path, max_steps):
    train(RunCheckpoint(str(tmp_path), every_n_train_steps=2), enable_checkpointing=True, max_steps=max_steps)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == max_steps


def test_refuses_to_save_never():
    with pytest.raises(ValueError, match="every_n_train_steps is 0"):
        RunCheckpoint(every_n_train_steps=0)


def test_log_spaced_steps_are_two_an_octave():
    steps = [step for step in range(-1, 1025) if is_log_spaced(step)]
    assert steps == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024]


def test_keeps_light_checkpoints_at_log_spaced_steps(train, tmp_path):
    trainer = train(StudyCheckpoints(0.05), max_steps=8, accumulate_grad_batches=2)
    folder = tmp_path / "checkpoints" / "steps"
    assert sorted(path.name for path in folder.iterdir()) == [f"step={k:08d}.safetensors" for k in (1, 2, 3, 4, 6, 8)]
    learner, card, _ = load_learner(folder / "step=00000008.safetensors")
    assert card["step"] == 8
    for ours, theirs in zip(learner.parameters(), trainer.lightning_module.learner.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def watch(callback, losses, tmp_path, accumulation=1, first=0):
    """Show ``callback`` the losses of consecutive micro-batches, as Lightning would: the share of the step's loss."""
    card = {"learner": {}, "tokens": "shift", "num_features": 4, "num_classes": 3, "length": 5}
    data = SimpleNamespace(tasks=SimpleNamespace(chance_loss=math.log(3)))
    module = SimpleNamespace(learner=LSTM(8, 3, width=4, depth=1), card=lambda: card, data=data)

    def alone(value, reduce_op):
        return value

    strategy = SimpleNamespace(lightning_module_state_dict=module.learner.state_dict, reduce=alone)
    for number, loss in enumerate(losses, start=first):
        trainer = SimpleNamespace(
            accumulate_grad_batches=accumulation, global_step=(number + 1) // accumulation, log_every_n_steps=2,
            is_global_zero=True, fast_dev_run=False, strategy=strategy, default_root_dir=tmp_path)  # fmt: skip
        outputs = {"loss": torch.tensor(loss / accumulation)}
        callback.on_train_batch_end(trainer, module, outputs, None, number)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_one_checkpoint_when_the_smoothed_loss_leaves_the_plateau(tmp_path, accumulation):
    losses = [math.log(3)] * 10 + [0.5] * 10
    smoothed, left = losses[0], []
    for step, loss in enumerate(losses, start=1):
        smoothed = 0.95 * smoothed + 0.05 * loss
        left += [step] if step % 2 == 0 and smoothed < math.log(3) - 0.05 else []
    callback = StudyCheckpoints(0.05)
    watch(callback, [loss for loss in losses for _ in range(accumulation)], tmp_path, accumulation)
    names = [path.name for path in (tmp_path / "checkpoints" / "steps").glob("left*")]
    assert names == [f"left_plateau_step={left[0]:08d}.safetensors"]
    assert float(callback.smoothed) == pytest.approx(smoothed, rel=1e-5)


def test_smoothed_loss_survives_a_resume(tmp_path):
    losses = [1.0, 0.9, 0.7, 0.8, 0.2]
    whole, first, second = (StudyCheckpoints(0.05) for _ in range(3))
    watch(whole, losses, tmp_path)
    watch(first, losses[:2], tmp_path)
    second.load_state_dict(first.state_dict())
    watch(second, losses[2:], tmp_path, first=2)
    assert torch.equal(whole.smoothed, second.smoothed) and whole.left_plateau_at == second.left_plateau_at


def spent(logger):
    return pd.read_csv(f"{logger.log_dir}/metrics.csv").filter(regex="^(step|budget/)").dropna()


def test_budget_counts_exactly_and_over_restarts(train, tmp_path):
    first, second = (CSVLogger(tmp_path, flush_logs_every_n_steps=1) for _ in range(2))
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "enable_checkpointing": True}
    keeper, budget = RunCheckpoint(str(tmp_path)), Budget()
    trainer = train(keeper, Budget(), logger=first, **options)
    train(keeper, budget, logger=second, ckpt_path=f"{keeper.dirpath}/last.ckpt", **options | {"max_steps": 6})
    flops_per_token = trainer.lightning_module.learner.flops_per_token(5)
    rows = pd.concat([spent(first), spent(second)])
    assert list(rows["step"]) == [1, 3, 5]
    for row in rows.to_dict("records"):
        steps = row["step"] + 1
        assert row["budget/tokens"] == steps * 8 * 5
        assert row["budget/gradient_evaluations"] == steps * 2
        assert row["budget/flops"] == steps * 8 * 5 * 3 * flops_per_token
        assert row["budget/peak_memory_bytes"] > 1e7
    assert rows["budget/seconds"].is_monotonic_increasing
    assert 0 < budget.earlier_seconds < budget.seconds
