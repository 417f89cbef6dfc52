"""What every run of every procedure does besides training: resume points, light checkpoints for study, a budget."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar

from metalearn.base import require_range
from metalearn.models.saving import save_weights


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``<run_dir>/checkpoints/last.ckpt`` at every N-th step and at the end of training: the run's only resume point.

    Args:
        run_dir: the run folder; null inside a config, where ``--run_dir`` fills it in.
        every_n_train_steps: optimizer steps between two saves, at least 1.
    """

    def __init__(self, run_dir: str | None = None, every_n_train_steps: int = 250):
        require_range("every_n_train_steps", every_n_train_steps, 1)
        super().__init__(
            dirpath=None if run_dir is None else Path(run_dir) / "checkpoints",
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Whole or not at all. Lightning moves a file over from the temporary folder, which across disks is a copy."""
        partial = f"{filepath}.partial"
        super()._save_checkpoint(trainer, partial)
        if trainer.is_global_zero:
            if Path(partial).is_file():  # a folder, where it is sharded
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
            Path(partial).replace(filepath)
        self._last_checkpoint_saved = filepath

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # ModelCheckpoint itself leaves last.ckpt at the last multiple of N.
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


DECAY = 0.95  # of the smoothed loss, per optimizer step


class StudyCheckpoints(Callback):
    """Light weight-only checkpoints for the study of transitions: ``<run_dir>/checkpoints/steps/step=00000128.safetensors``.

    Written at the steps round(2^(k/2)), k = 0, 1, 2, …, and once as ``left_plateau`` when the exponential moving
    average of the training loss (decay 0.95) first falls below that of chance by a margin. The average is read from the device
    only where the trainer logs.

    Args:
        margin: below the tasks' loss at chance: nats below ln K, with K classes.
    """

    def __init__(self, margin: float):
        self.margin = margin
        self.smoothed: torch.Tensor | None = None
        self.left_plateau_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": self.smoothed, "left_plateau_at": self.left_plateau_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.smoothed, self.left_plateau_at = state_dict["smoothed"], state_dict["left_plateau_at"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        accumulation, step = trainer.accumulate_grad_batches, trainer.global_step
        loss = outputs["loss"].detach() * accumulation  # Lightning hands out the micro-batch's share of the step's loss
        weight = 1 - DECAY ** (1 / accumulation)
        self.smoothed = loss.clone() if self.smoothed is None else self.smoothed.to(loss.device).lerp(loss, weight)
        if (batch_idx + 1) % accumulation:
            return
        if is_log_spaced(step):
            self._save(trainer, pl_module, f"step={step:08d}")
        if self.left_plateau_at is None and step % trainer.log_every_n_steps == 0:
            self._look(trainer, pl_module, step)

    def _look(self, trainer: Trainer, pl_module: Any, step: int) -> None:
        loss = trainer.strategy.reduce(self.smoothed, reduce_op="mean")  # so that all ranks decide alike
        if float(loss) < pl_module.data.tasks.chance_loss - self.margin:
            self.left_plateau_at = step
            self._save(trainer, pl_module, f"left_plateau_step={step:08d}")

    def _save(self, trainer: Trainer, pl_module: Any, name: str) -> None:
        if trainer.fast_dev_run:
            return
        weights = trainer.strategy.lightning_module_state_dict()  # asks every rank where weights are sharded
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "checkpoints" / "steps" / f"{name}.safetensors"
            save_weights(path, weights, pl_module.card() | {"step": trainer.global_step})


def is_log_spaced(step: int) -> bool:
    """Whether ``step`` is round(2^(k/2)) for some k >= 0: two steps an octave."""
    if step < 1:
        return False
    k = round(2 * math.log2(step))
    return any(round(2 ** (j / 2)) == step for j in (k - 1, k, k + 1) if j >= 0)


class Progress(TQDMProgressBar):
    """A bar over optimizer steps; where a module says ``expected_steps``, its steps are few and long, and each is shown."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20)  # at every step it costs 3 % of quick.yaml

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if hasattr(pl_module, "expected_steps"):
            self._refresh_rate = 1

    @property
    def total_train_batches(self) -> int | float:
        expected = getattr(self.trainer.lightning_module, "expected_steps", None)
        return super().total_train_batches if expected is None else expected


class Cost(NamedTuple):
    """Of one optimizer step over all ranks: tokens (or inner steps), gradient evaluations, floating-point operations (estimate)."""

    tokens: int
    gradient_evaluations: int
    flops: int | None  # None where a procedure cannot tell


class Budget(Callback):
    """Logs what the run has spent so far, over all restarts, under ``budget/``.

    That is tokens, gradient_evaluations, flops, seconds and peak_memory_bytes. Counts come from the module's
    ``step_cost``; seconds are wall time inside ``fit`` up to the last checkpoint plus this start's; peak memory is
    the device's allocated maximum, or the process's resident maximum on a CPU, of the first rank.
    """

    def __init__(self) -> None:
        self.spent: dict[str, int] = dict.fromkeys(Cost._fields, 0)
        self.earlier_seconds = 0.0
        self.started: float | None = None

    @property
    def seconds(self) -> float:
        """Wall seconds of this start and the resumed ones before it."""
        return self.earlier_seconds + (time.monotonic() - self.started if self.started is not None else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {**self.spent, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent = {name: state_dict[name] for name in self.spent}
        self.earlier_seconds = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()
        self.cost: Cost = pl_module.step_cost

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        for name, amount in self.cost._asdict().items():
            self.spent[name] += amount or 0
        if trainer.global_step % trainer.log_every_n_steps == 0:
            counted = {name: total for name, total in self.spent.items() if getattr(self.cost, name) is not None}
            values = {**counted, "seconds": self.seconds, "peak_memory_bytes": peak_memory_bytes(pl_module.device)}
            for logger in trainer.loggers:  # not pl_module.log, which rounds counts to float32
                logger.log_metrics({f"budget/{name}": value for name, value in values.items()}, trainer.global_step - 1)


def peak_memory_bytes(device: torch.device) -> int:
    """Maximum allocated on a GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
