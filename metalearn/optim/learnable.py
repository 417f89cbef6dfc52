"""Hand-made optimizers with learned hyper-parameters: the smallest learned rules.

Letters: g a gradient; t = 1, 2, ... the update; P parameters of all tensors together; ``…`` leading axes. No parameter sees
another one.
"""

import math

import torch
from torch import Tensor

from metalearn.base import Params, Tree, require_range
from metalearn.optim.first_order import BELOW_ONE
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule, count, weight

ADAM_WEIGHTS = ("log_lr", "log_one_minus_beta1", "log_one_minus_beta2", "log_eps")


class LearnableSGD(LearnedRule):
    """Gradient descent ``lr g`` with a learned rate: one weight, ``log_lr``.

    Args:
        lr: Learning rate before meta-training, > 0.

    Raises:
        ValueError: ``lr`` is out of range.
    """

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        require_range("lr", lr, math.ulp(0.0))
        self.lr = lr

    def init_meta(self, key: Tensor) -> Params:
        return {"log_lr": _log(key, self.lr)}

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        return {}

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        return weight(meta, "log_lr", 0).exp() * grads_P, state


class LearnableMomentum(LearnedRule):
    """Gradient descent with momentum: ``b <- momentum b + g``, direction ``lr b``; weights ``log_lr``, ``log_one_minus_momentum``.

    Args:
        lr: Learning rate before meta-training, > 0.
        momentum: Share of the buffer that is kept before meta-training, 0 <= momentum < 1.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(self, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__()
        require_range("lr", lr, math.ulp(0.0))
        require_range("momentum", momentum, 0.0, BELOW_ONE)
        self.lr, self.momentum = lr, momentum

    def init_meta(self, key: Tensor) -> Params:
        return {"log_lr": _log(key, self.lr), "log_one_minus_momentum": _log(key, 1 - self.momentum)}

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        return {"momentum": torch.zeros_like(params_P)}

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        lost = weight(meta, "log_one_minus_momentum", 0).exp()
        buffer_P = (1 - lost) * state["momentum"] + grads_P
        return weight(meta, "log_lr", 0).exp() * buffer_P, {"momentum": buffer_P}


class LearnableAdam(LearnedRule):
    """Adam with learned hyper-parameters: four weights, the logarithms of lr, 1 - beta1, 1 - beta2 and eps.

    ``m <- beta1 m + (1 - beta1) g``; ``v <- beta2 v + (1 - beta2) g^2``; the direction is
    ``lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        lr: Learning rate before meta-training, > 0.
        beta1: Share of the mean that is kept before meta-training, 0 <= beta1 < 1.
        beta2: Share of the mean square that is kept before meta-training, 0 <= beta2 < 1.
        eps: Added to the root before meta-training, > 0.

    Raises:
        ValueError: A value is out of range.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
    """

    def __init__(self, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        require_range("lr", lr, math.ulp(0.0))
        require_range("beta1", beta1, 0.0, BELOW_ONE)
        require_range("beta2", beta2, 0.0, BELOW_ONE)
        require_range("eps", eps, math.ulp(0.0))
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps

    def init_meta(self, key: Tensor) -> Params:
        values = (self.lr, 1 - self.beta1, 1 - self.beta2, self.eps)
        return {name: _log(key, value) for name, value in zip(ADAM_WEIGHTS, values, strict=True)}

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        return {"step": count(params_P), "mean": torch.zeros_like(params_P), "square": torch.zeros_like(params_P)}

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        rate, lost1, lost2, eps = (weight(meta, name, 0).exp() for name in ADAM_WEIGHTS)
        step = state["step"] + 1
        mean_P = (1 - lost1) * state["mean"] + lost1 * grads_P
        square_P = (1 - lost2) * state["square"] + lost2 * grads_P * grads_P
        # A root of 0 has no derivative that is a number.
        root_P = (square_P / _held(lost2, step)).clamp(min=torch.finfo(square_P.dtype).tiny).sqrt()
        direction_P = rate * (mean_P / _held(lost1, step)) / (root_P + eps)
        return direction_P, {"step": step, "mean": mean_P, "square": square_P}


def _log(key: Tensor, value: float) -> Tensor:
    return torch.full((), math.log(value), device=key.device)


def _held(lost: Tensor, step: Tensor) -> Tensor:
    """``1 - beta^t`` (…, 1) of ``1 - beta``: the weight of t values in a running mean that started at 0."""
    # In float32, 1 - 0.999^t would have no more than four digits.
    return (1 - (1 - lost.double()) ** step.double().unsqueeze(-1)).to(lost.dtype)
