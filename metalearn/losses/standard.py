"""Losses of the literature that learned ones are compared with.

Shape letters: N examples, K classes or outputs.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from metalearn.losses.elementwise import ElementwiseLoss


class CrossEntropy(ElementwiseLoss):
    """``-y log p``, computed from raw outputs: ``torch.nn.CrossEntropyLoss``, or with a sigmoid output its binary form."""

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        if self.output == "softmax":
            return -target_NK * functional.log_softmax(prediction_NK, -1)
        return functional.softplus(prediction_NK) - target_NK * prediction_NK


class MeanSquaredError(ElementwiseLoss):
    """``(y - p)^2``, summed over outputs."""

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        return (target_NK - self.probabilities(prediction_NK)).square()


STANDARD: dict[str, Callable[..., ElementwiseLoss]] = {"cross_entropy": CrossEntropy, "mse": MeanSquaredError}
