"""TaylorGLO's loss: a third-order polynomial around a learned centre."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metalearn.losses.elementwise import ElementwiseLoss

NUM_WEIGHTS = 8


class TaylorLoss(ElementwiseLoss):
    """Eight numbers; see the source."""

    def __init__(self, weights: Sequence[float] | Tensor | None = None, trainable: bool = False, **options: Any):
        super().__init__(**options)
        values = torch.zeros(NUM_WEIGHTS) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        self.weights = nn.Parameter(values.clone(), requires_grad=trainable)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        raise NotImplementedError
