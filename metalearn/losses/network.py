"""ML3's loss: a small network of target and output."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metalearn.losses.elementwise import ElementwiseLoss


class NetworkLoss(ElementwiseLoss):
    """A network; see the source."""

    def __init__(self, weights: Sequence[float] | Tensor | None = None, trainable: bool = False, **options: Any):
        super().__init__(**options)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        raise NotImplementedError
