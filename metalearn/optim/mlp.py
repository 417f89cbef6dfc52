"""Learned rules that are a small network applied to every parameter by itself, and the rule of Metz et al. 2018.

Letters: P parameters of all tensors together; n parameters of one tensor; T tensors; F features of a parameter; S time scales;
H hidden units; ``…`` leading axes. Features come before parameters, so that every pass runs along memory.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import Params, Tree, require_range, require_whole
from metalearn.optim.features import TIME_SCALES, affine, running_mean, second_moment_normaliser, time_features
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule, count

DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)


class CoordinateMLP(LearnedRule):
    """An MLP from features of a parameter to the two numbers d and m of its direction ``c d exp(e m)``.

    Residents give the features (``start``, ``observe``). The first ``num_normalised`` are divided by
    ``sqrt(1e-5 + mean x^2)``, the mean over the parameter's tensor: so far, and no further, parameters see each other.
    Features of time, ``tanh(t / s - 1)`` after t updates for each scale s, are added. Layers have weights ``weight_i``
    (inputs, outputs) and ``bias_i`` (outputs), i = 0, 1, ..., and ReLUs between them.

    Args:
        hidden_sizes: Units of each hidden layer, at least one layer.
        step_mult: c > 0.
        exp_mult: e >= 0.
        output_std: Standard deviation of the last layer's weights before meta-training, >= 0, in units of that of the others,
            ``1 / sqrt(inputs)``. Biases begin at 0.

    Raises:
        ValueError: A value is out of range.
    """

    num_features: ClassVar[int]
    num_normalised: ClassVar[int]
    time_scales: ClassVar[tuple[float, ...]]

    def __init__(self, hidden_sizes: Sequence[int], step_mult: float, exp_mult: float, output_std: float) -> None:
        super().__init__()
        require_range("number of hidden layers", len(hidden_sizes), 1)
        for units in hidden_sizes:
            require_whole("a hidden size", units, 1)
        require_range("step_mult", step_mult, math.ulp(0.0))
        require_range("exp_mult", exp_mult, 0.0)
        require_range("output_std", output_std, 0.0)
        self.hidden_sizes, self.output_std = list(hidden_sizes), output_std
        self.step_mult, self.exp_mult = step_mult, exp_mult

    @abstractmethod
    def observe(self, grads_P: Tensor, state: Tree, params_P: Tensor) -> tuple[list[Tensor], Tensor, Tree]:
        """Features (…, P), the factors (…, F - num_normalised) of those that are not normalised, and the state after.

        ``state["step"]`` is the count of updates.
        """

    def init_meta(self, key: Tensor) -> Params:
        sizes = [self.num_features + len(self.time_scales), *self.hidden_sizes, 2]
        meta = {}
        for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
            std = (self.output_std if layer == len(self.hidden_sizes) else 1.0) / math.sqrt(inputs)
            meta[f"weight_{layer}"] = std * random.normal(random.fold(key, layer), (inputs, outputs))
            meta[f"bias_{layer}"] = torch.zeros(outputs, device=key.device)
        return meta

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        features, factors, later = self.observe(grads_P, state, params_P)
        first_FH, of_time_SH = meta["weight_0"].split([self.num_features, len(self.time_scales)], -2)
        time_S1 = time_features(state["step"], self.time_scales, grads_P.dtype).unsqueeze(-1)
        bias_H1 = affine(of_time_SH.mT, meta["bias_0"].unsqueeze(-1), time_S1)
        others = range(1, len(self.hidden_sizes) + 1)
        others = [(meta[f"weight_{layer}"].mT, meta[f"bias_{layer}"].unsqueeze(-1)) for layer in others]
        all_FP = torch.stack(features, -2)
        # What is the same for all parameters of a tensor goes into the weights.
        first_THF = (first_FH.unsqueeze(-3) * self._scales(layout, all_FP, factors).unsqueeze(-1)).mT
        parts = zip(first_THF.unbind(-3), layout.split(all_FP), strict=True)
        outputs_2P = torch.cat([_network([(own_HF, bias_H1), *others], part_Fn) for own_HF, part_Fn in parts], -1)
        direction_P, magnitude_P = outputs_2P.unbind(-2)
        return self.step_mult * direction_P * (self.exp_mult * magnitude_P).exp(), later

    def _scales(self, layout: Layout, all_FP: Tensor, factors: Tensor) -> Tensor:
        """What each tensor's features are multiplied with: (…, T, F)."""
        normalised_FT = second_moment_normaliser(layout, all_FP[..., : self.num_normalised, :])
        others_FT = factors.unsqueeze(-1).expand(*factors.shape, len(layout.sizes))
        return torch.cat([normalised_FT, others_FT], -2).mT


def _network(layers: Sequence[tuple[Tensor, Tensor]], values: Tensor) -> Tensor:
    """The outputs (…, 2, n) for features (…, F, n), of matrices (…, outputs, inputs) and biases (…, outputs, 1)."""
    (matrix, bias), *others = layers
    values = affine(matrix, bias, values)
    for matrix, bias in others:
        values = affine(matrix, bias, values.relu_())
    return values


class MLPRule(CoordinateMLP):
    """19 features of a parameter and an MLP of two hidden layers of 32 units: 1762 weights.

    Features: gradient, parameter, running means of the gradient with decays .1, .5, .9, .99, .999 and .9999, each normalised
    over its tensor, and time at 11 scales from 1 to 1e5. Direction ``c d exp(e m)`` of the two outputs d and m. State: six
    numbers per parameter.

    Args:
        hidden_sizes: Units of each hidden layer, at least one layer.
        step_mult: c > 0.
        exp_mult: e >= 0.
        output_std: Standard deviation of the last layer's weights before meta-training, >= 0, in units of
            ``1 / sqrt(inputs)``, which is that of the other layers' weights.

    Raises:
        ValueError: A value is out of range.

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned optimizers", appendix D.
    Differs from the published code: weights begin normal instead of truncated normal.
    """

    num_features = 2 + len(DECAYS)
    num_normalised = num_features
    time_scales = TIME_SCALES

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (32, 32),
        step_mult: float = 1e-3,
        exp_mult: float = 1e-3,
        output_std: float = 1.0,
    ) -> None:
        super().__init__(hidden_sizes, step_mult, exp_mult, output_std)

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        return {"step": count(params_P), "momentum": {str(kept): torch.zeros_like(params_P) for kept in DECAYS}}

    def observe(self, grads_P: Tensor, state: Tree, params_P: Tensor) -> tuple[list[Tensor], Tensor, Tree]:
        means = {str(kept): running_mean(state["momentum"][str(kept)], grads_P, kept) for kept in DECAYS}
        later = {"step": state["step"] + 1, "momentum": means}
        return [grads_P, params_P, *means.values()], grads_P[..., :0], later
