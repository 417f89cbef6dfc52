"""Losses of the literature that learned ones are compared with.

Shape letters: N examples, K classes or outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metalearn.losses.elementwise import ElementwiseLoss, require_number

_CLASSES = ("softmax", "sigmoid")


class CrossEntropy(ElementwiseLoss):
    """``-y log p``, computed from raw outputs: ``torch.nn.CrossEntropyLoss``.

    With a sigmoid output, ``-y log p - (1 - y) log(1 - p)``: ``torch.nn.BCEWithLogitsLoss`` summed over outputs.
    """

    kind = "cross_entropy"
    outputs = _CLASSES

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        if self.output == "softmax":
            return -target_NK * functional.log_softmax(prediction_NK, -1)
        return functional.softplus(prediction_NK) - target_NK * prediction_NK


class LabelSmoothing(CrossEntropy):
    """Cross-entropy of targets ``(1 - epsilon) y + epsilon u``, u the uniform distribution over classes.

    Args:
        epsilon: share of the uniform distribution, 0 to 1.
        options: those of ``ElementwiseLoss``; output "softmax" or "sigmoid", which has two classes.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", section 7; the
    ``label_smoothing`` of ``torch.nn.CrossEntropyLoss``.
    """

    kind = "label_smoothing"
    settings = (*ElementwiseLoss.settings, "epsilon")

    def __init__(self, epsilon: float = 0.1, **options: Any):
        super().__init__(**options)
        self.epsilon = require_number("epsilon", epsilon, 0, 1)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        num_classes = prediction_NK.shape[-1] if self.output == "softmax" else 2
        return super().terms(prediction_NK, (1 - self.epsilon) * target_NK + self.epsilon / num_classes)


class Focal(ElementwiseLoss):
    """``-(1 - p)^gamma y log p``: cross-entropy that leaves aside what is already right.

    With a sigmoid output, ``-(1 - p)^gamma y log p - p^gamma (1 - y) log(1 - p)``.

    Args:
        gamma: focusing parameter, at least 0, where it is cross-entropy.
        options: those of ``ElementwiseLoss``; output "softmax" or "sigmoid".

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 4; the weights alpha_t are ``weight``.
    """

    kind = "focal"
    outputs = _CLASSES
    settings = (*ElementwiseLoss.settings, "gamma")

    def __init__(self, gamma: float = 2.0, **options: Any):
        super().__init__(**options)
        self.gamma = require_number("gamma", gamma, 0)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        if self.output == "softmax":
            return self._focused(target_NK, functional.log_softmax(prediction_NK, -1))
        right = self._focused(target_NK, functional.logsigmoid(prediction_NK))
        return right + self._focused(1 - target_NK, functional.logsigmoid(-prediction_NK))

    def _focused(self, target: Tensor, log_p: Tensor) -> Tensor:
        # The power has no derivative at 0 where gamma < 1.
        doubt = -torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).tiny))
        return -doubt.pow(self.gamma) * target * log_p


class MeanSquaredError(ElementwiseLoss):
    """``(y - p)^2``, summed over outputs, averaged over examples: K times ``torch.nn.MSELoss``."""

    kind = "mse"

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        return (target_NK - self.probabilities(prediction_NK)).square()


class Brier(ElementwiseLoss):
    """``(y - p)^2`` of probabilities, summed over classes: a proper score.

    Source: Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", equation 2.
    """

    kind = "brier"
    outputs = _CLASSES

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        return (target_NK - self.probabilities(prediction_NK)).square()


class MeanAbsoluteError(ElementwiseLoss):
    """``|y - p|``, summed over outputs, averaged over examples: K times ``torch.nn.L1Loss``."""

    kind = "mae"

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        return (target_NK - self.probabilities(prediction_NK)).abs()


class Huber(ElementwiseLoss):
    """``(y - p)^2 / 2`` up to a distance of delta and ``delta (|y - p| - delta / 2)`` beyond: K times ``torch.nn.HuberLoss``.

    ``torch.nn.SmoothL1Loss`` of the same beta is this divided by delta.

    Args:
        delta: distance at which it changes from square to absolute, above 0.
        options: those of ``ElementwiseLoss``.

    Source: Huber 1964, "Robust Estimation of a Location Parameter".
    """

    kind = "huber"
    settings = (*ElementwiseLoss.settings, "delta")

    def __init__(self, delta: float = 1.0, **options: Any):
        super().__init__(**options)
        self.delta = require_number("delta", delta, torch.finfo(torch.float32).tiny)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        distance = (target_NK - self.probabilities(prediction_NK)).abs()
        near = distance.clamp(max=self.delta)
        return near * (distance - near / 2)


STANDARD: dict[str, type[ElementwiseLoss]] = {
    loss.kind: loss for loss in (CrossEntropy, MeanSquaredError, MeanAbsoluteError, Huber, Focal, LabelSmoothing, Brier)
}


def standard_name(output: str) -> str:
    """Name of the standard loss for this kind of output."""
    return "mse" if output == "identity" else "cross_entropy"
