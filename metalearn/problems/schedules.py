"""Learning-rate schedules, learned through whole training runs, for a loss or for an accuracy that has no gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metalearn import random
from metalearn.base import (
    Batches,
    Examples,
    InnerState,
    Params,
    Rule,
    Source,
    StepOutput,
    require_choice,
    require_range,
)
from metalearn.problems.training_runs import TrainingRun, accuracy
from metalearn.unroll import ended, inner_gradient

OBJECTIVES = ("loss", "accuracy")
SMALLEST = 1e-12


class LearningRateSchedule(TrainingRun):
    """The two parameters of lr_t = lr (1 + t / time_scale)^-decay, t = 0, 1, ... counting the steps of the episode.

    Meta-parameters are "log_lr" and "log_decay", logarithms, so that both stay positive and one step length suits both.
    The meta-objective is the sum over steps of L_t / horizon: with "loss", L_t is the step's training loss before the
    update; with "accuracy" it is 1 - accuracy of validation examples after the update, which is piecewise constant, so
    that gradients through the run do not exist and zeroth-order estimators only are accepted.

    A step draws its own examples (with repetition) from its key, so that runs at different ages need no common batch.

    Args:
        source: as in ``TrainingRun``.
        model: as in ``TrainingRun``.
        rule: one with a learning rate, which is replaced.
        horizon: steps of an episode, at least 1.
        lr: the learning rate at t = 0 before meta-training, above 0.
        decay: the exponent before meta-training, above 0.
        time_scale: steps after which the learning rate is 2^-decay of the first, above 0.
        objective: "loss" or "accuracy".
        batch_size: examples of a step, at least 1.
        outer_batch_size: validation examples of a step's accuracy, at least 1; null for all.
        init_seed: as in ``TrainingRun``.

    Raises:
        ValueError: for values out of range.

    Source: Vicol et al. 2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
    Strategies", section 5.2.
    Differs from the paper: means over the episode instead of sums; errors instead of accuracies, which are minimised.
    """

    terminal = False

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        horizon: int,
        lr: float = 0.1,
        decay: float = 1.0,
        time_scale: float = 5000.0,
        objective: str = "loss",
        batch_size: int = 100,
        outer_batch_size: int | None = None,
        init_seed: int | None = None,
    ):
        super().__init__(source, model, rule, horizon, batch_size, outer_batch_size, init_seed)
        for name, value in dict(lr=lr, decay=decay, time_scale=time_scale).items():
            require_range(name, value, SMALLEST)
        require_choice("objective", objective, OBJECTIVES)
        self.num_drawn = batch_size
        self.lr, self.decay, self.time_scale, self.objective = lr, decay, time_scale, objective
        self.differentiable = objective == "loss"

    def init_meta(self, key: Tensor) -> Params:
        like = next(self.module.parameters())
        pair = {"log_lr": self.lr, "log_decay": self.decay}
        return {n: torch.full((), value, dtype=like.dtype, device=key.device).log() for n, value in pair.items()}

    def rate(self, meta: Params, step: Tensor) -> Tensor:
        """lr_t of ``t = step``."""
        stretched = torch.log1p(step / self.time_scale)
        return (meta["log_lr"] - meta["log_decay"].exp() * stretched).exp()

    def rule_meta(self, meta: Params) -> Params:
        return {"lr": meta["log_lr"].exp()}

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        assert self.rule is not None and self.horizon is not None
        drawn = self._with_repetition("train", self.num_drawn, random.fold(key, "train"))
        grads, loss, buffers = inner_gradient(self, meta, state, drawn, key)
        given = {"lr": self.rate(meta, state.step)}
        params, rule = self.rule.update(given, grads, state.rule, state.params, loss=loss)
        state = InnerState(params, buffers, rule, state.step + 1, state.extra)
        share = loss if self.objective == "loss" else self._error(state, key)
        return state, StepOutput(share / self.horizon, ended(self, state))

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return torch.zeros((), device=state.step.device)

    def batches(self, key: Tensor, steps: int) -> Batches:
        for part in ("train", "validation"):
            self.examples(part, key.device)  # moved there now, not within a step and whatever transforms it
        return Batches(lambda k: None, None, steps)

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """Of one new run: the meta-objective, and loss and accuracy of its end on validation or test examples."""
        assert self.horizon is not None
        run = self.trained(meta, key, self.batches(key, self.horizon))
        return {"objective": float(run.loss)} | self.score(run.end, "test" if test else "validation")

    def _error(self, state: InnerState, key: Tensor) -> Tensor:
        if self.outer_batch_size is None:
            held_out = self.examples("validation", key.device)
        else:
            held_out = self._with_repetition("validation", self.outer_batch_size, random.fold(key, "validation"))
        return 1 - accuracy(self.predict(state, held_out.inputs), held_out.targets)

    def _with_repetition(self, part: str, count: int, key: Tensor) -> Examples:
        inputs, targets = self.examples(part, key.device)
        rows = random.integers(key, (count,), len(targets))
        return Examples(inputs[rows], targets[rows])
