"""Meta-train a learned optimizer, judge it beside tuned hand-made ones, and write it where ``LearnedOptimizer`` finds it."""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from metalearn import random
from metalearn.base import BASE, Estimator, InnerProblem, require_range
from metalearn.files import write_whole
from metalearn.optim.learned import LearnedRule
from metalearn.optim.saving import describe, save_rule
from metalearn.problems.comparison import Comparison, Judged, compare, mean_loss
from metalearn.problems.mixture import Mixture, OverMixture
from metalearn.training.meta_gradient import MetaGradientLearning
from metalearn.unroll import Tasks

RULE = "rule.safetensors"


class LearnedOptimizerTraining(MetaGradientLearning):
    """Gradient descent on the weights of a learned optimizer, through training runs under it.

    With every checkpoint and at the end, ``<run_dir>/rule.safetensors`` holds the rule with its present weights, for
    ``metalearn.LearnedOptimizer``. In ``fit``, an evaluation is the mean loss over ``runs`` new training runs on validation
    examples. The commands ``validate`` and ``test`` set the rule beside SGD with momentum, Adam, and AdamW whose rate falls
    along a cosine, each at the best of 13 or more learning rates for its own horizon, chosen on as many runs on training examples:
    ``<stage>.json`` has mean losses over all steps and over the last tenth, ``<stage>_curves.csv`` the loss at every step.

    Args:
        problem: an ``Optimizee`` or ``Quadratics``, several runs of one as ``Tasks``, or a ``Mixture`` of several.
        estimator: how training runs are differentiated; ``NoiseReuseES`` for rules of up to a few thousand weights.
        steps: inner steps of one window, at least 1.
        optimizer: class and settings of any torch optimizer, for the rule's weights.
        lr_scheduler: class and settings of any torch scheduler, stepped with the optimizer; null for none.
        runs: training runs of an evaluation, at least 2.
        horizons: lengths of the runs of ``validate`` and ``test``, in multiples of the problem's nominal horizon, each at least 1.

    Raises:
        ValueError: as in ``MetaGradientLearning``; for another problem, or problems whose rule is not a learned one.

    Source: Vicol et al. 2021 and Li et al. 2023 (see the estimators); the speed-up over tuned Adam: Metz et al. 2022,
    "VeLO: Training Versatile Learned Optimizers by Scaling Up".
    """

    needed_everywhere = (*MetaGradientLearning.needed_everywhere, "rule")

    def __init__(
        self,
        problem: InnerProblem,
        estimator: Estimator,
        steps: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        runs: int = 16,
        horizons: Sequence[int] = (1, 3),
    ):
        mixed = isinstance(problem, Mixture)
        super().__init__(problem, OverMixture(estimator) if mixed else estimator, steps, optimizer, lr_scheduler)
        require_range("runs", runs, 2)
        require_range("number of horizons", len(horizons), 1)
        for multiple in horizons:
            require_range("horizons", multiple, 1)
        self.optimizees = [_as_judged(each) for each in (problem.problems if mixed else [problem])]
        rules = [each.rule for each in self.optimizees if isinstance(each.rule, LearnedRule)]
        described = [describe(rule) for rule in rules]
        if other := [each for each in described if each != described[0]]:
            raise ValueError(
                f"problems of a mixture have the rules {described[0]} and {other[0]}; accepted: one rule for all"
            )
        self.runs, self.horizons = runs, tuple(horizons)

    @property
    def rule(self) -> LearnedRule:
        """The rule that is learned."""
        rule = self.optimizees[0].rule
        assert isinstance(rule, LearnedRule)
        return rule

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, stage: str) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self.trainer.state.fn == "fit":
                return self.report(stage, self._progress())
            found = self.compared(stage)
            self.report(stage, found.numbers)
            if self.trainer.is_global_zero:
                _write_rows(Path(self.trainer.default_root_dir) / f"{stage}_curves.csv", found.rows)
        return None

    def _progress(self) -> dict[str, float]:
        """The mean loss over the nominal horizon, over all problems."""
        keys_R = self._keys("progress")
        means = [mean_loss(each, self.meta, keys_R, "validation") for each in self.optimizees]
        return {"mean_loss": sum(means) / len(means)}

    def compared(self, stage: str) -> Comparison:
        """The rule beside tuned hand-made optimizers, on new runs on the stage's examples."""
        return compare(
            self.optimizees,
            self.meta,
            tuning=self._keys("tuning"),
            judging=self._keys(stage),
            part=stage,
            horizons=self.horizons,
        )

    def _keys(self, purpose: str) -> Tensor:
        return random.fold(self.key("evaluate", 0), purpose, torch.arange(self.runs, device=self.device))

    # -- what is taken home ------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        path = Path(self.trainer.default_root_dir) / RULE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_rule(path, self.rule, self.meta, **self._provenance())

    def _provenance(self) -> dict[str, Any]:
        return {
            "metalearn": version("metalearn"),
            "seed": self.trainer.datamodule.seed,
            "step": self.trainer.global_step,
            "problem": type(self.problem).__name__,
            "data": self.optimizees[0].record()["fingerprint"].get(BASE),
        }

    def _card(self) -> dict[str, Any]:
        return super()._card() | {"rule": {"class": type(self.rule).__name__, "settings": self.rule.settings}}


def _as_judged(problem: InnerProblem) -> Judged:
    if isinstance(problem, Tasks):
        return _as_judged(problem.problem)
    if not isinstance(problem, Judged):
        raise ValueError(
            f"problem is {type(problem).__name__}; accepted: Optimizee, Quadratics, Tasks or a Mixture of these"
        )
    if not isinstance(problem.rule, LearnedRule):
        raise ValueError(f"rule is {type(problem.rule).__name__}; accepted: a LearnedRule")
    return problem


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(rows[0])]
    lines += [",".join(str(value) for value in row.values()) for row in rows]
    write_whole(path, "\n".join(lines) + "\n")
