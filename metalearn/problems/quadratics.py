"""Random quadratics, the first thing that an optimizer was ever taught to optimize."""

from typing import Any, Self

import torch
from torch import Tensor

from metalearn import random, tree
from metalearn.base import InnerState, Params, StepOutput, require_choice, require_range
from metalearn.optim.learned import LearnedRule
from metalearn.problems.baselines import curves
from metalearn.unroll import Descent, ended, inner_gradient, update

ENTRIES = ("uniform", "normal")
START = 0.01
RUNS = 128  # of an evaluation


class Quadratics(Descent):
    """Descent on ``f(x) = |W x - y|^2`` by a learned rule, whose weights are the meta-parameters; every run draws W and y.

    W is square; x begins at N(0, 0.01^2). The meta-objective of an episode is the mean of f(x_1) … f(x_T), each after its
    update, so that in truncated backpropagation every update is credited to its own window. Estimators do not
    differentiate through the gradients that the rule is given.

    Args:
        rule: the learned rule; its weights before meta-training are where meta-training begins.
        horizon: T, the steps of an episode, at least 1.
        num_dims: of x and of y, at least 1.
        entries: of W and y: "uniform" in [0, 1), as in the released code, or standard "normal", as in the paper.

    Raises:
        ValueError: for values out of range.

    Source: Andrychowicz et al. 2016, "Learning to Learn by Gradient Descent by Gradient Descent", section 3.1. Differs from
    the paper: a mean over steps in place of a sum, without f(x_0), on which nothing depends.
    """

    terminal = False

    def __init__(self, rule: LearnedRule, horizon: int = 100, num_dims: int = 10, entries: str = "uniform"):
        super().__init__(rule, horizon)
        require_range("num_dims", num_dims, 1)
        require_choice("entries", entries, ENTRIES)
        self.num_dims, self.entries, self.num_steps = num_dims, entries, horizon

    @property
    def nominal_horizon(self) -> int:
        """What comparisons with other optimizers count in."""
        return self.num_steps

    def on(self, part: str) -> Self:
        """The same: every run draws its own problem, and keys tell runs of one purpose from those of another."""
        return self

    def init_meta(self, key: Tensor) -> Params:
        assert isinstance(self.rule, LearnedRule)
        return self.rule.init_meta(key)

    def rule_meta(self, meta: Params) -> Params:
        return meta

    def init(self, meta: Params, key: Tensor) -> InnerState:
        draw = random.uniform if self.entries == "uniform" else random.normal
        shapes = {"W": (self.num_dims, self.num_dims), "y": (self.num_dims,)}
        extra = {name: draw(random.fold(key, name), shape) for name, shape in shapes.items()}
        x = START * random.normal(random.fold(key, "x"), (self.num_dims,))
        return self.start(meta, {"x": x}, {}, extra)

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        residual = state.extra["W"] @ state.params["x"] - state.extra["y"]
        return residual.square().sum(), {}

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        grads, loss, _ = inner_gradient(self, meta, state, batch, key)
        state = update(self, meta, state, tree.detach(grads), loss.detach(), {})
        loss, _ = self.inner_loss(meta, state, batch, key)
        return state, StepOutput(loss / self.num_steps, ended(self, state))

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """Of new runs: ``mean_loss`` over all steps, ``final_loss``, and ``log_final_loss``, the latter's decimal logarithm."""
        assert self.rule is not None
        keys_R = random.fold(key, torch.arange(RUNS, device=key.device))
        losses_RT = curves(self, self.rule, meta, keys_R, self.num_steps)
        final = losses_RT[:, -1].mean()
        found = {"mean_loss": losses_RT.mean(), "final_loss": final, "log_final_loss": final.log10()}
        return {name: float(value) for name, value in found.items()}
