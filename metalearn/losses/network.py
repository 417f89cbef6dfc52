"""ML3's loss, and AdaLFL's: a small network of target and output.

Shape letters: N examples, K classes or outputs, H hidden units.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metalearn import random
from metalearn.base import require_choice
from metalearn.losses.elementwise import WeightedLoss

WIDTHS = (2, 50, 50, 1)
SHAPES = tuple((rows, columns) for columns, rows in itertools.pairwise(WIDTHS))
NUM_WEIGHTS = sum(rows * columns for rows, columns in SHAPES)
LEAK, SHARPNESS = 0.01, 10.0


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """``(1 - gamma) log(1 + exp(beta x)) / beta + gamma x`` with gamma .01 and beta 10: never flat, and negative for x << 0."""
    return (1 - LEAK) * functional.softplus(x, beta=SHARPNESS) + LEAK * x


def _leaky_relu(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, LEAK)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # hidden, output
    "relu": (functional.relu, functional.softplus),
    "smooth_leaky_relu": (_leaky_relu, smooth_leaky_relu),
}


class NetworkLoss(WeightedLoss):
    """``l(y, p)``: a network 2-50-50-1 without biases of (p, y), summed over outputs, averaged over examples.

    Its only parameter, ``weights``, holds the three matrices row by row, (2650,). New ones are drawn as He et al. 2015
    do: normal with variance ``2 / inputs``.

    Args:
        weights: of the network, (2650,); null for new ones.
        trainable: whether ``weights`` requires a gradient.
        activation: "relu" has ReLU inside and softplus at the output, as ML3; "smooth_leaky_relu" has leaky ReLU
            inside and its smooth form at the output, as AdaLFL.
        seed: of new weights.
        options: those of ``ElementwiseLoss``.

    Raises:
        ValueError: for weights that are not finite or not as many, and for an unknown activation.

    Source: Bechtle et al. 2021, "Meta Learning via Learned Loss"; with "smooth_leaky_relu", Raymond et al. 2023,
    "Meta-Learning Adaptive Loss Functions" (activations and their constants from memory).
    """

    kind = "network"
    settings = (*WeightedLoss.settings, "activation")

    def __init__(
        self,
        weights: Sequence[float] | Tensor | None = None,
        trainable: bool = False,
        activation: str = "relu",
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(**options)
        require_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self._set_weights([0.0] * NUM_WEIGHTS if weights is None else weights, NUM_WEIGHTS, trainable)
        if weights is None:
            self.reset_parameters(random.key(seed, "network_loss"))

    @torch.no_grad()
    def reset_parameters(self, key: Tensor) -> None:
        """Draw new weights from the key."""
        drawn = random.normal(key, (NUM_WEIGHTS,)).split([rows * columns for rows, columns in SHAPES])
        parts = [part * math.sqrt(2 / columns) for part, (_, columns) in zip(drawn, SHAPES, strict=True)]
        self.weights.copy_(torch.cat(parts))

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        hidden, last = ACTIVATIONS[self.activation]
        matrices = self.weights.to(prediction_NK.dtype).split([rows * columns for rows, columns in SHAPES])
        x_NKH = torch.stack([self.probabilities(prediction_NK), target_NK], -1)
        for matrix, shape in zip(matrices[:-1], SHAPES, strict=False):
            x_NKH = hidden(functional.linear(x_NKH, matrix.reshape(shape)))
        return last(functional.linear(x_NKH, matrices[-1].reshape(SHAPES[-1]))).squeeze(-1)
