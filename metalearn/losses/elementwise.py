"""Criteria that are a sum over outputs: what a drop-in for ``torch.nn``'s criteria has to take and to give.

Shape letters: N examples, K classes or outputs.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metalearn.base import Loss, require_choice

OUTPUTS = ("softmax", "sigmoid", "identity")
REDUCTIONS = ("mean", "sum", "none")


class ElementwiseLoss(Loss):
    """``loss_n = sum_k weight_k l(y_nk, z_n, k)``, reduced as ``torch.nn.CrossEntropyLoss`` does.

    Computed in float32 at least, whatever autocast says. With output "softmax" a prediction is (K,), (N, K) or
    (N, K, d1, ...) and a target class indices without the K axis, or probabilities of the prediction's shape. With
    "sigmoid" and "identity" both are of one shape, or the target lacks a last axis of size 1.

    Args:
        output: "softmax", "sigmoid" or "identity": what is made of raw outputs.
        reduction: "mean", "sum" or "none". The mean is over examples; with ``weight`` and class indices it is the weighted mean.
        weight: factor of each class's term, (K,); null for ones.
        ignore_index: class index of examples that do not count; only for class indices.

    Raises:
        ValueError: for values out of range, and shapes that do not fit.
    """

    def __init__(
        self,
        output: str = "softmax",
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ):
        super().__init__()
        require_choice("output", output, OUTPUTS)
        require_choice("reduction", reduction, REDUCTIONS)
        self.output, self.reduction, self.ignore_index = output, reduction, ignore_index
        self.weight: Tensor | None
        self.register_buffer("weight", weight)

    @abstractmethod
    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        """``l``: (N, K) of raw outputs and targets."""

    def probabilities(self, prediction_NK: Tensor) -> Tensor:
        """What the loss sees of raw outputs."""
        return activate(prediction_NK, self.output)

    def per_example(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        terms_NK = self.terms(prediction_NK, target_NK)
        return (terms_NK if self.weight is None else terms_NK * self.weight).sum(-1)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        precise = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        with torch.autocast(prediction.device.type, enabled=False):
            if self.output == "softmax":
                return self._of_classes(precise, target)
            return self._of_numbers(precise, target)

    def _of_classes(self, prediction: Tensor, target: Tensor) -> Tensor:
        axis = 1 if prediction.ndim > 1 else 0
        with_last = prediction.movedim(axis, -1)
        num_classes = with_last.shape[-1]
        if self.weight is not None and self.weight.shape != (num_classes,):
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}; accepted: ({num_classes},)")
        if target.is_floating_point():
            if target.shape != prediction.shape:
                raise ValueError(
                    f"target has shape {tuple(target.shape)}; accepted for probabilities: {tuple(prediction.shape)}"
                )
            target_NK, counts = target.movedim(axis, -1), None
        else:
            if target.shape != with_last.shape[:-1]:
                raise ValueError(
                    f"target has shape {tuple(target.shape)}; accepted for class indices: {tuple(with_last.shape[:-1])}"
                )
            kept = target != self.ignore_index
            index = torch.where(kept, target, 0)
            target_NK = one_hot(index, num_classes, prediction.dtype)
            counts = kept.to(prediction.dtype) if self.weight is None else kept * self.weight[index]
            # Examples that do not count must not reach the derivative either, whatever their predictions are.
            with_last = torch.where(kept.unsqueeze(-1), with_last, torch.zeros((), dtype=with_last.dtype))
        losses = self._losses(with_last, target_NK.to(prediction.dtype))
        return self._reduced(losses, counts)

    def _of_numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.ndim == target.ndim + 1 and prediction.shape[-1] == 1:
            target = target.unsqueeze(-1)
        if prediction.shape != target.shape:
            raise ValueError(f"target has shape {tuple(target.shape)}; accepted: {tuple(prediction.shape)}")
        target = target.to(prediction.dtype)
        if prediction.ndim < 2:
            return self._reduced(self._losses(prediction.unsqueeze(-1), target.unsqueeze(-1)), None)
        return self._reduced(self._losses(prediction, target), None)

    def _losses(self, prediction: Tensor, target: Tensor) -> Tensor:
        shape = -1, prediction.shape[-1]
        flat = self.per_example(prediction.reshape(shape), target.reshape(shape))
        return flat.reshape(prediction.shape[:-1])

    def _reduced(self, losses: Tensor, counts: Tensor | None) -> Tensor:
        """``counts``: the weight of each example in the mean, 0 for those that are left out; None for ones."""
        if counts is not None:
            losses = torch.where(counts.bool() | (self.weight is not None), losses, 0.0) * (counts != 0)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        if self.reduction == "sum":
            return total
        return total / (losses.numel() if counts is None else counts.sum())

    def options(self) -> dict[str, Any]:
        """The settings that a copy is built with."""
        return {"output": self.output, "reduction": self.reduction, "ignore_index": self.ignore_index}


def activate(prediction: Tensor, output: str) -> Tensor:
    """Softmax or sigmoid of raw outputs (..., K), or the outputs themselves."""
    if output == "softmax":
        return functional.softmax(prediction, -1)
    return torch.sigmoid(prediction) if output == "sigmoid" else prediction


def one_hot(index: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Probabilities (..., K) of class indices (...)."""
    zeros = torch.zeros((*index.shape, num_classes), dtype=dtype, device=index.device)
    return zeros.scatter(-1, index.unsqueeze(-1), 1.0)
