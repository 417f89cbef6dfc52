"""Hyper-parameters of convex problems: per-feature ridge penalties, with the hypergradient in closed form."""

from typing import Any

import torch
from torch import Tensor

from metalearn.base import Batches, InnerState, Params, Rule
from metalearn.unroll import Descent


class Ridge(Descent):
    """Ridge regression with one learned log-penalty per feature.

    Inner: g(w, l) = |X w - y|^2 / (2 n) + sum_i e^{l_i} w_i^2 / 2 on the training rows. Outer: |X' w - y'|^2 / (2 n')
    on the validation rows. The solution is w* = A^{-1} X^T y / n with A = X^T X / n + diag(e^l), and the
    hypergradient at it d outer/d l = -e^l * w* * A^{-1} grad outer(w*).

    Args:
        x: training inputs (N, D).
        y: training targets (N,).
        x_validation: validation inputs (M, D).
        y_validation: validation targets (M,).
        rule: of the inner run, which starts at w = 0.
        horizon: steps of an episode, null for an endless one.
    """

    def __init__(
        self, x: Tensor, y: Tensor, x_validation: Tensor, y_validation: Tensor, rule: Rule, horizon: int | None = None
    ):
        super().__init__(rule, horizon)
        self.train, self.validation = (x, y), (x_validation, y_validation)

    def init_meta(self, key: Tensor) -> Params:
        return {"log_penalty": self.train[0].new_zeros(self.train[0].shape[1])}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, {"w": torch.zeros_like(meta["log_penalty"])}, {})

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        w = state.params["w"]
        return _half_square(batch, w) + (meta["log_penalty"].exp() * w.square()).sum() / 2, {}

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return _half_square(batch, state.params["w"])

    def batches(self, key: Tensor, steps: int) -> Batches:
        return Batches(lambda k: self.train, self.validation, steps)

    def solution(self, meta: Params) -> Tensor:
        """w* (D,)."""
        x, y = self.train
        return torch.linalg.solve(self._normal_matrix(meta), x.T @ y / len(y))

    def hypergradient(self, meta: Params) -> Params:
        """d outer(w*)/d l in closed form."""
        x, y = self.validation
        w = self.solution(meta)
        adjoint = torch.linalg.solve(self._normal_matrix(meta), x.T @ (x @ w - y) / len(y))
        return {"log_penalty": -meta["log_penalty"].exp() * w * adjoint}

    def _normal_matrix(self, meta: Params) -> Tensor:
        x, _ = self.train
        return x.T @ x / len(x) + torch.diag(meta["log_penalty"].exp())


def _half_square(rows: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
    x, y = rows
    return (x @ w - y).square().mean() / 2
