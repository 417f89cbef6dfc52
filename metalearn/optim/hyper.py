"""A learned controller of Adam's hyper-parameters, tensor by tensor.

Letters: P parameters of all tensors together; n parameters of one tensor; T tensors; F features of a tensor; H hidden units;
``…`` leading axes.
"""

import math

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import Params, Tree, require_range, require_whole
from metalearn.optim.features import spread
from metalearn.optim.first_order import BELOW_ONE
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule, weight
from metalearn.optim.lstm import lstm_cell

GRADIENT_BOUND = 1000.0
NUM_FEATURES = 19
# Of a tenth of the logarithms: rates of 1e-8 ... 1e3, averages over 1 ... 22 026 updates, eps of 1e-11 ... 1e4.
BOUNDS = {
    "lr": (-0.8 * math.log(10), 0.3 * math.log(10)),
    "beta1": (-1.0, 0.0),
    "beta2": (-1.0, 0.0),
    "eps": (-1.1 * math.log(10), 0.4 * math.log(10)),
}


class NNAdam(LearnedRule):
    """Adam whose hyper-parameters an LSTM moves after every update, for each tensor its own: 6856 weights at 32 units.

    ``m <- beta1 m + (1 - beta1) g``; ``v <- beta2 v + (1 - beta2) g^2``; the direction is
    ``lr (1 + eps) m / (eps + sqrt(v + 1e-10))``: Adam's for small eps, momentum's for large ones. Neither m nor v is corrected
    for its start at 0, and gradients are clipped to -1000 ... 1000.

    Then the LSTM reads 19 statistics of each tensor and moves its ``log(lr)``, ``log(1 - beta1)``, ``log(1 - beta2)`` and
    ``log(eps)``, each divided by 10 and kept in bounds, by ``output_scale`` times its outputs. The statistics, with
    ``s(x) = clip(log(1e-8 + |x|), -5, 5) / 2``: of m, v, p and g each s(mean), the mean's sign and s(variance); s(mean |g|);
    1 or -1 for tensors with no axis, and for those with one; and a fifth of the four hyper-parameters as they are moved.
    The LSTM's first state and the first hyper-parameters are learned, too. Tensors do not see each other.

    Args:
        hidden: Units of the LSTM, at least 1.
        output_scale: How far an output of 1 moves a hyper-parameter, > 0.
        recall: Share of the way back to the first hyper-parameters that every move begins with, 0 ... 1.
        lr: Learning rate before meta-training, 1e-8 ... 1e3.
        beta1: Share of m that is kept before meta-training, 0 <= beta1 < 1.
        beta2: Share of v that is kept before meta-training, 0 <= beta2 < 1.
        eps: eps before meta-training, 1e-11 ... 1e4.

    Raises:
        ValueError: A value is out of range.

    Source: Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers", NNAdam.
    Differs from the published code: ``recall``; weights begin normal instead of truncated normal.
    """

    def __init__(
        self,
        hidden: int = 32,
        output_scale: float = 0.01,
        recall: float = 0.0,
        lr: float = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        require_whole("hidden", hidden, 1)
        require_range("output_scale", output_scale, math.ulp(0.0))
        require_range("recall", recall, 0.0, 1.0)
        require_range("lr", lr, 1e-8, 1e3)
        require_range("beta1", beta1, 0.0, BELOW_ONE)
        require_range("beta2", beta2, 0.0, BELOW_ONE)
        require_range("eps", eps, 1e-11, 1e4)
        self.hidden, self.output_scale, self.recall = hidden, output_scale, recall
        self.lr, self.beta1, self.beta2, self.eps = lr, beta1, beta2, eps

    def init_meta(self, key: Tensor) -> Params:
        inputs = NUM_FEATURES + self.hidden
        values = {"lr": self.lr, "beta1": 1 - self.beta1, "beta2": 1 - self.beta2, "eps": self.eps}
        hyper = {name: torch.full((), 0.1 * math.log(value), device=key.device) for name, value in values.items()}
        bias = torch.zeros(4 * self.hidden, device=key.device)
        bias[self.hidden : 2 * self.hidden] = 1.0  # of the forget gate
        return {
            "weight": random.normal(random.fold(key, "weight"), (inputs, 4 * self.hidden)) / math.sqrt(inputs),
            "bias": bias,
            "hidden": bias.new_zeros(self.hidden),
            "cell": bias.new_zeros(self.hidden),
            "head_weight": bias.new_zeros(self.hidden, len(BOUNDS)),
            "head_bias": bias.new_zeros(len(BOUNDS)),
            **hyper,
        }

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        zeros_T1 = params_P.new_zeros((*params_P.shape[:-1], len(layout.sizes), 1))
        return {
            "mean": torch.zeros_like(params_P),
            "square": torch.zeros_like(params_P),
            "hyper": {name: value + zeros_T1.squeeze(-1) for name, value in _first(meta).items()},
            "hidden": weight(meta, "hidden", 1) + zeros_T1,
            "cell": weight(meta, "cell", 1) + zeros_T1,
        }

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        grads_P = grads_P.clamp(-GRADIENT_BOUND, GRADIENT_BOUND)
        logs = {name: spread(layout, 10 * value_T) for name, value_T in state["hyper"].items()}
        rate_P, lost1_P, lost2_P, eps_P = (logs[name].exp() for name in BOUNDS)
        mean_P = state["mean"] + lost1_P * (grads_P - state["mean"])
        square_P = state["square"] + lost2_P * (grads_P.square() - state["square"])
        direction_P = rate_P * (1 + eps_P) * mean_P / (eps_P + (square_P + 1e-10).sqrt())
        features_TF = _features(layout, torch.stack([mean_P, square_P, params_P, grads_P], -2), state["hyper"])
        later = {"mean": mean_P, "square": square_P, **self._moved(meta, features_TF, state)}
        return direction_P, later

    def _moved(self, meta: Params, features_TF: Tensor, state: Tree) -> Tree:
        """The LSTM's state and the hyper-parameters after it has read the features."""
        gates = meta["weight"], weight(meta, "bias", 1)
        hidden_TH, cell_TH = lstm_cell(*gates, features_TF, state["hidden"], state["cell"])
        moves = (hidden_TH @ meta["head_weight"] + weight(meta, "head_bias", 1)).unbind(-1)
        hyper = {}
        for (name, first), move_T in zip(_first(meta).items(), moves, strict=True):
            recalled_T = torch.lerp(state["hyper"][name], first.expand_as(move_T), self.recall)
            hyper[name] = (recalled_T + self.output_scale * move_T).clamp(*BOUNDS[name])
        return {"hyper": hyper, "hidden": hidden_TH, "cell": cell_TH}


def _first(meta: Params) -> Params:
    """The first hyper-parameters, a tenth of their logarithms, (…, 1) each."""
    return {name: weight(meta, name, 0).clamp(*bounds) for name, bounds in BOUNDS.items()}


def _features(layout: Layout, values_4P: Tensor, hyper: Params) -> Tensor:
    """The 19 statistics (…, T, F) of each tensor, from m, v, p and g (…, 4, P)."""
    parts = zip(layout.split(values_4P), layout.shapes, strict=True)
    statistics_TF = torch.stack([_statistics(part_4n, len(shape)) for part_4n, shape in parts], -2)
    controls_T4 = torch.stack([0.2 * hyper[name].clamp(-5, 5) for name in BOUNDS], -1)
    return torch.cat([statistics_TF, controls_T4], -1)


def _statistics(values_4n: Tensor, axes: int) -> Tensor:
    """Those of one tensor of so many axes: (…, 15)."""
    if not values_4n.shape[-1]:  # whose mean would be NaN
        values_4n = values_4n.new_zeros((*values_4n.shape[:-1], 1))
    mean_4, variance_4 = values_4n.mean(-1), values_4n.var(-1, correction=0)
    size_1 = values_4n[..., 3:, :].abs().mean(-1)
    kind_2 = [torch.full_like(size_1, 1.0 if axes == kind else -1.0) for kind in (0, 1)]
    return torch.cat([_size(mean_4), mean_4.sign(), _size(variance_4), _size(size_1), *kind_2], -1)


def _size(x: Tensor) -> Tensor:
    return 0.5 * (1e-8 + x.abs()).log().clamp(-5, 5)
