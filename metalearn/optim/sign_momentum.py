"""Optimizers of ``torch.optim``'s kind that step by the sign of a moving average: signSGD with momentum, and Lion."""

# pyright: reportPrivateImportUsage=false
# (torch's own optimizers are made of its _foreach functions, which it does not export.)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from metalearn.base import require_range
from metalearn.optim.first_order import BELOW_ONE


class SignMomentum(Optimizer):
    """Every parameter moves by lr in the direction of the sign of the averaged gradient, however small that gradient is.

    With gradient g, average m (0 at first) and parameter p, ``c = beta_1 m + (1 - beta_1) g``,
    ``p <- p - lr (sign(c) + weight_decay p)``, ``m <- beta_2 m + (1 - beta_2) g``.

    Equal betas give c = m: the sign of the moving average of gradients, with which Kirsch et al. shorten the loss
    plateau. Betas that differ give Lion; its authors use (0.9, 0.99). Rates are a third to a tenth of Adam's.

    Args:
        params: parameters, pairs of name and parameter, or groups of either with settings of their own.
        lr: step of every coordinate, at least 0.
        betas: weights of the past in the direction and in the average, each in [0, 1).
        weight_decay: decoupled, in units of ``lr``, at least 0.

    Raises:
        ValueError: for values out of range.

    Source: Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex Problems", Algorithm 2 (Signum);
    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2 (Lion).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.9),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = self.defaults | param_group
        require_range("lr", settings["lr"], 0.0)
        require_range("weight_decay", settings["weight_decay"], 0.0)
        for beta in settings["betas"]:
            require_range("betas", beta, 0.0, BELOW_ONE)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have gradients. Returns: what ``closure``, which computes these, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:  # torch refuses to work on empty lists
                self._update(params, [p.grad for p in params], group)
        return loss

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        lr, (direction_beta, average_beta) = group["lr"], group["betas"]
        averages = [self._average(p) for p in params]
        signs = torch._foreach_lerp(averages, grads, 1 - direction_beta)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, signs, alpha=-lr)
        torch._foreach_lerp_(averages, grads, 1 - average_beta)

    def _average(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "average" not in state:
            state["average"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["average"]
