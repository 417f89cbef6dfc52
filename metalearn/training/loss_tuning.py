"""Tune the parameters of one loss at length, and write it where ``load_loss`` finds it."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import copy
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable

from metalearn.base import BASE, Estimator, InnerProblem
from metalearn.files import write_whole
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.problems.learned_loss import LossTask
from metalearn.training.meta_gradient import MetaGradientLearning
from metalearn.unroll import Tasks

BEST = "best.json"
EVALUATION = "evaluation"


class LossTuning(MetaGradientLearning):
    """Gradient descent on a loss's own parameters, through training runs under it.

    With every checkpoint and at the end, ``<run_dir>/best.json`` holds the loss with its present parameters, for
    ``metalearn.load_loss``, and says where they come from: seed, step, task, and the last evaluation. Evaluations compare
    training runs under the loss as tuned, as it began, and under the task's own; they do not tune learning rates, so that
    a loss that merely became larger can come out ahead.

    Args:
        problem: a ``LossTask``, or ``Tasks`` of one: several runs whose meta-gradients are averaged.
        estimator: how training runs are differentiated.
        steps: inner steps of one window, at least 1. Windows of 1 of an endless warm-started run adapt the loss while it is
            trained under.
        optimizer: class and settings of any torch optimizer, for the loss's parameters.
        lr_scheduler: class and settings of any torch scheduler, stepped with the optimizer; null for none.

    Raises:
        ValueError: as in ``MetaGradientLearning``; for another problem, a loss that has nothing to tune or cannot be saved, or
        a checkpoint of another loss.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", section 3.3; online:
    Raymond et al. 2025, "Meta-Learning Adaptive Loss Functions", algorithm 2.
    """

    def __init__(
        self,
        problem: InnerProblem,
        estimator: Estimator,
        steps: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__(problem, estimator, steps, optimizer, lr_scheduler)
        task = problem.problem if isinstance(problem, Tasks) else problem
        if not isinstance(task, LossTask):
            raise ValueError(f"problem is {type(problem).__name__}; accepted: LossTask, or Tasks of a LossTask")
        self.task = task
        self.evaluation: dict[str, float | None] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not list(self.loss.parameters()):
            raise ValueError(f"the loss is {self.loss}, which has no parameters; accepted: one with parameters to tune")

    @property
    def loss(self) -> ElementwiseLoss:
        """The loss as it began."""
        if not isinstance(self.task.loss, ElementwiseLoss):
            name = type(self.task.loss).__name__
            raise ValueError(f"the loss is {name}, which cannot be saved; accepted: an ElementwiseLoss")
        return self.task.loss

    @property
    def tuned(self) -> ElementwiseLoss:
        """The loss with its present parameters."""
        loss = copy.deepcopy(self.loss).cpu()
        given = self.meta
        with torch.no_grad():
            for name, parameter in loss.named_parameters():
                parameter.copy_(given[name])
        return loss

    # -- evaluation --------------------------------------------------------------------------------------------------

    def report(self, stage: str, values: dict[str, float]) -> None:
        super().report(stage, values)
        if self.trainer.state.fn == "fit":
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.evaluation = {"step": self.trainer.global_step, **finite}

    # -- what is taken home ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[EVALUATION] = self.evaluation
        self._save_loss()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.evaluation = checkpoint.get(EVALUATION, {})

    def on_train_end(self) -> None:
        self._save_loss()  # an evaluation may have come after the last checkpoint

    def _save_loss(self) -> None:
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        content = self.tuned.to_json()
        content["provenance"] = {**content.get("provenance", {}), "tuning": self._provenance()}
        path = Path(self.trainer.default_root_dir) / BEST
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1))

    def _provenance(self) -> dict[str, Any]:
        task, data = self.task, self.task.record()
        return {
            "metalearn": version("metalearn"),
            "seed": self.trainer.datamodule.seed,
            "step": self.trainer.global_step,
            "estimator": type(self.estimator).__name__,
            "task": {
                "source": type(task.source).__name__,
                "fingerprint": data["fingerprint"][BASE],
                "model": type(task.module).__name__,
                "horizon": task.horizon,
            },
            "evaluation": self.evaluation,
        }

    def _card(self) -> dict[str, Any]:
        """With the loss, whatever its parameters: those of one say nothing of another."""
        varying = ("version", "weights", "provenance", "program")
        kind = {name: value for name, value in self.loss.to_json().items() if name not in varying}
        return super()._card() | {"problem": f"{type(self.problem).__name__} of {kind}"}
