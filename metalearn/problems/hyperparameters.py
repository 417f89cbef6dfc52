"""Hyper-parameters of convex problems: per-feature penalties of ridge and of logistic regression."""

from typing import Any

import torch
from torch import Tensor, nn

from metalearn import random, tree
from metalearn.base import Batches, InnerState, Params, Rule, Source, require_range
from metalearn.problems.training_runs import TrainingRun
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

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """``outer`` at the solution, and the norm of the hypergradient there, which is 0 at the best penalties."""
        slope = self.hypergradient(meta)["log_penalty"]
        return {"loss": float(_half_square(self.validation, self.solution(meta))), "slope": float(slope.norm())}

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


class RandomRidge(Ridge):
    """``Ridge`` on random rows: standard normal inputs, y = X w + noise e with standard normal w and e, in float64.

    Only the first half of the features has a weight, so that the others' penalties should rise.

    Args:
        rule: of the inner run.
        num_rows: training rows, and as many for validation, at least 1.
        num_features: D, at least 1.
        noise: standard deviation of what is added to a target, at least 0.
        seed: of the rows.
        horizon: as in ``Ridge``.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        rule: Rule,
        num_rows: int = 40,
        num_features: int = 6,
        noise: float = 1.0,
        seed: int = 0,
        horizon: int | None = None,
    ):
        for name, value in dict(num_rows=num_rows, num_features=num_features).items():
            require_range(name, value, 1)
        require_range("noise", noise, 0)
        key = random.key(seed, "ridge")
        x = random.normal(random.fold(key, "x"), (2, num_rows, num_features)).double()
        w = random.normal(random.fold(key, "w"), (num_features,)).double()
        w[(num_features + 1) // 2 :] = 0
        y = x @ w + noise * random.normal(random.fold(key, "noise"), (2, num_rows)).double()
        super().__init__(x[0], y[0], x[1], y[1], rule, horizon)
        self.rows = {"num_rows": num_rows, "num_features": num_features, "noise": noise, "seed": seed}

    def record(self) -> dict[str, Any]:
        return {"fingerprint": {}, "division": self.rows}


class LogisticRegression(TrainingRun):
    """Multinomial logistic regression with one learned log-penalty per feature.

    Inner: mean CE of the logits W x + b + sum_d e^{l_d} sum_k W_kd^2 / 2 on training examples, from W = 0, b = 0. Outer:
    mean CE on validation examples.

    Args:
        source: as in ``TrainingRun``.
        rule: of the inner run.
        horizon: as in ``TrainingRun``.
        log_penalty: l_d before meta-training.
        batch_size: as in ``TrainingRun``.
        outer_batch_size: as in ``TrainingRun``.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        source: Source,
        rule: Rule,
        horizon: int | None = None,
        log_penalty: float = -5.0,
        batch_size: int | None = None,
        outer_batch_size: int | None = None,
    ):
        super().__init__(source, nn.Linear, rule, horizon, batch_size, outer_batch_size)
        self.log_penalty = log_penalty

    def init_meta(self, key: Tensor) -> Params:
        weight = self.module.get_parameter("weight")
        return {"log_penalty": weight.new_full(weight.shape[1:], self.log_penalty, device=key.device)}

    def initial(self, key: Tensor) -> tuple[Params, Params]:
        params, buffers = super().initial(key)
        return tree.zeros_like(params), buffers

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        loss, buffers = super().inner_loss(meta, state, batch, key)
        squares = state.params["weight"].square().sum(0)
        return loss + (meta["log_penalty"].exp() * squares).sum() / 2, buffers


def _half_square(rows: tuple[Tensor, Tensor], w: Tensor) -> Tensor:
    x, y = rows
    return (x @ w - y).square().mean() / 2
