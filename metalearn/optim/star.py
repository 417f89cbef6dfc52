"""A learned rule beside a hand-made one that keeps it stable: STAR.

Letters: P parameters of all tensors together, n of a piece of one tensor; ``…`` leading axes, of tasks and of particles; 5 stands
for the five axes that a tensor is seen with.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metalearn.base import Params, require_choice, require_range
from metalearn.optim.factored_mlp import FactoredRule, Features

# Estimates of the gradient (…, 1, 5) for the nominal term; the last momentum is the slowest.
NOMINAL: dict[str, Callable[[Features], Tensor]] = {
    "sgd": lambda features: features.gradient,
    "momentum": lambda features: _last(features.momenta),
    "aggmo": lambda features: features.momenta.mean(-6, keepdim=True),
    "adam": lambda features: _last(features.scaled_momenta),
    "adam_aggmo": lambda features: features.scaled_momenta.mean(-6, keepdim=True),
}


class STAR(FactoredRule):
    """The factored MLP as a black box with a nominal term and weight decay beside it, each of a learned magnitude.

    The network of ``FactoredRule`` has outputs (d, m_b, m_n, m_r) for each entry. ``p <- p (1 - weight_decay exp(exp_mult m_r)) -
    b - n``, black box ``b = d exp(exp_mult m_b) step_mult / sqrt(v + 1e-6)``, nominal term ``n = nominal_lr exp(exp_mult m_n)
    e``, where e is an estimate of the gradient made by hand; the default is the mean over momenta m of ``m / sqrt(v + 1e-6)``.
    On a noisy quadratic of curvature H the nominal term ``alpha g`` moves the eigenvalues of ``1 - (alpha + P) H``, P the black
    box's, into the unit disc, at the edge of which a rule without one begins.

    The heavy L2 penalty on the weights that the paper also asks for is no part of the rule: it is the weight decay of the
    outer optimizer. State: 4 floats per parameter, 3 for each row and each column.

    Args:
        hidden_sizes: units of each hidden layer, at least one layer, each >= 1.
        exp_mult: of the logarithms of the three magnitudes, >= 0.
        step_mult: of the black box, >= 0; 0 turns it off.
        nominal_lr: alpha, of the nominal term, >= 0; 0 turns it off.
        nominal: the estimate of the gradient: "sgd" g, "momentum" the slowest m, "aggmo" the mean over m, "adam" and
            "adam_aggmo" these of ``m / sqrt(v + 1e-6)``.
        weight_decay: share of a parameter that an update removes, >= 0.
        precondition: whether the black box is divided by ``sqrt(v + 1e-6)``.
        magnitude_control: whether m_n and m_r are the network's; else they are 1 and 0.

    Raises:
        ValueError: a value is out of range.

    Source: Harrison et al. 2022, "A closer look at learned optimization: stability, robustness, and inductive biases", section 4.
    Differs from the released code: that has no nominal term, preconditioning or magnitude control unless asked for; the last
    layer begins at 0, so that the untrained rule is its nominal term; magnitudes are never averaged over a tensor.
    """

    num_outputs = 4

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (4, 4),
        exp_mult: float = 1e-3,
        step_mult: float = 1e-3,
        nominal_lr: float = 1e-3,
        nominal: str = "adam_aggmo",
        weight_decay: float = 0.0,
        precondition: bool = True,
        magnitude_control: bool = True,
    ) -> None:
        super().__init__(hidden_sizes)
        sizes = {"exp_mult": exp_mult, "step_mult": step_mult, "nominal_lr": nominal_lr, "weight_decay": weight_decay}
        for name, value in sizes.items():
            require_range(name, value, 0.0)
        require_choice("nominal", nominal, NOMINAL)
        self.exp_mult = exp_mult
        self.step_mult = step_mult
        self.nominal_lr = nominal_lr
        self.nominal = nominal
        self.weight_decay = weight_decay
        self.precondition = precondition
        self.magnitude_control = magnitude_control

    def init_meta(self, key: Tensor) -> Params:
        meta, last = super().init_meta(key), f"weight_{len(self.hidden_sizes)}"
        return meta | {last: torch.zeros_like(meta[last])}

    def combine(self, outputs: Sequence[Tensor], features: Features) -> Tensor:
        direction, black_box, nominal, decay = outputs
        if not self.magnitude_control:
            nominal, decay = torch.ones_like(nominal), torch.zeros_like(decay)
        step = direction * (black_box * self.exp_mult).exp() * self.step_mult
        if self.precondition:
            step = step * features.inverse_root
        step = step + self.nominal_lr * (nominal * self.exp_mult).exp() * NOMINAL[self.nominal](features)
        if self.weight_decay:
            step = step + self.weight_decay * (decay * self.exp_mult).exp() * features.parameter
        return step


def _last(momenta: Tensor) -> Tensor:
    """(…, momenta, 5) -> (…, 1, 5)."""
    return momenta.narrow(-6, momenta.shape[-6] - 1, 1)
