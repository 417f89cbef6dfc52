"""Muon for whole networks: orthogonalised momentum for the matrices of hidden layers, AdamW for everything else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from metalearn.base import require_choice, require_range
from metalearn.optim.first_order import BELOW_ONE

OUTER_LAYERS = ("embed", "head", "table")  # in the names of what meets the data: of these a matrix is Adam's, too
ADJUSTMENTS = ("match_rms_adamw", "original")


class Muon(Optimizer):
    """``torch.optim.Muon`` for the matrices of hidden layers and ``torch.optim.AdamW`` for the rest, as one optimizer.

    With gradient G and momentum B of a matrix W of a rows and b columns, ``B <- momentum B + (1 - momentum) G``,
    ``W <- W (1 - lr weight_decay) - lr s O``: O has the singular vectors of B (under ``nesterov`` of
    ``momentum B + (1 - momentum) G``) and singular values near 1, by five Newton-Schulz iterations in bfloat16.

    A hidden matrix is a parameter of two dimensions whose name contains none of "embed", "head" and "table". Parameters
    that come without names are told by their dimensions alone, so that embeddings and heads are Muon's, too.
    Every group of parameters becomes two, first its hidden matrices and then the rest, each with its own state and
    with a learning rate that schedules scale.

    Args:
        params: parameters, pairs of name and parameter, or groups of either; a group may have other values of any of
            the settings below.
        lr: learning rate of the matrices, at least 0.
        weight_decay: of the matrices, decoupled, in units of ``lr``, at least 0.
        momentum: weight of the past, at least 0.
        nesterov: look one step ahead.
        adjust_lr: "match_rms_adamw" (s = 0.2 sqrt(max(a, b)): updates as large as Adam's, so that its rates can be
            kept) or "original" (s = sqrt(max(1, a / b))).
        adam_lr: learning rate of the rest; null for ``lr``.
        adam_betas: of the rest, each in [0, 1).
        adam_eps: of the rest, at least 0.
        adam_weight_decay: of the rest, decoupled, at least 0.

    Raises:
        ValueError: for values out of range, or a group with a setting that there is not.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
    Scalable for LLM Training", eq. 4 (``match_rms_adamw``).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: str = "match_rms_adamw",
        adam_lr: float | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        adam_weight_decay: float = 0.0,
    ):
        self.settings: dict[str, Any] = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr=adjust_lr,
            adam_lr=adam_lr,
            adam_betas=adam_betas,
            adam_eps=adam_eps,
            adam_weight_decay=adam_weight_decay,
        )
        self.parts: list[Optimizer] = []
        super().__init__(params, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the hidden matrices of a group and the rest of it, as two groups of which either may be missing."""
        own = {name: value for name, value in param_group.items() if name != "params"}
        if unknown := own.keys() - self.settings.keys():
            raise ValueError(f"a group of parameters has {sorted(unknown)}; accepted: {', '.join(self.settings)}")
        given = param_group["params"]
        members = [given] if isinstance(given, Tensor) else list(given)
        matrices = [member for member in members if _is_hidden_matrix(member)]
        rest = [member for member in members if not _is_hidden_matrix(member)]
        muon, adam = _groups(**self.settings | own)
        for chosen, group in ((matrices, muon), (rest, adam)):
            if chosen:
                super().add_param_group({"params": chosen, **group})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Give torch's two optimizers the very groups and the very state of this one, which alone is saved and scheduled."""
        self.parts = []
        for make, hidden in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
            if groups := [group for group in self.param_groups if group["hidden_matrices"] is hidden]:
                part = make(groups)
                part.state = self.state
                self.parts.append(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the parameters that have gradients. Returns: what ``closure``, which computes these, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _is_hidden_matrix(member: Tensor | tuple[str, Tensor]) -> bool:
    name, p = member if isinstance(member, tuple) else ("", member)
    return p.ndim == 2 and not any(layer in name for layer in OUTER_LAYERS)


def _groups(
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    adjust_lr: str,
    adam_lr: float | None,
    adam_betas: tuple[float, float],
    adam_eps: float,
    adam_weight_decay: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a group's hidden matrices and of its rest, under torch's names."""
    rest_lr = lr if adam_lr is None else adam_lr
    rates = dict(lr=lr, weight_decay=weight_decay, momentum=momentum)
    adam = dict(adam_lr=rest_lr, adam_eps=adam_eps, adam_weight_decay=adam_weight_decay)
    for name, value in (rates | adam).items():
        require_range(name, value, 0.0)
    for beta in adam_betas:
        require_range("adam_betas", beta, 0.0, BELOW_ONE)
    require_choice("adjust_lr", adjust_lr, ADJUSTMENTS)
    rest = {"lr": rest_lr, "weight_decay": adam_weight_decay, "betas": adam_betas, "eps": adam_eps}
    return (
        {**rates, "nesterov": nesterov, "adjust_lr_fn": adjust_lr, "hidden_matrices": True},
        {**rest, "hidden_matrices": False},
    )
