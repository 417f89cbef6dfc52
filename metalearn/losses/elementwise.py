"""Criteria that are a sum over outputs: what a drop-in for ``torch.nn``'s criteria has to take and to give.

Shape letters: N examples, K classes or outputs.
"""

import json
import math
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional

from metalearn.base import Loss, require_choice
from metalearn.files import write_whole

OUTPUTS = ("softmax", "sigmoid", "identity")
REDUCTIONS = ("mean", "sum", "none")
VERSION = 1  # of saved losses
MAX_BYTES = 2**20  # of a saved loss
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class ElementwiseLoss(Loss):
    """``loss_n = sum_k weight_k l(y_nk, z_n, k)``, reduced as ``torch.nn.CrossEntropyLoss`` does.

    Computed in float32 at least, whatever autocast says. With output "softmax" a prediction is (K,), (N, K) or
    (N, K, d1, ...) and a target class indices without the K axis, or probabilities of the prediction's shape. With
    "sigmoid" and "identity" both are of one shape, or the target lacks a last axis of size 1.

    Class indices out of range are refused on the CPU. On an accelerator, where a look at them would wait for it, and in
    compiled code and under ``torch.func`` nothing is checked beforehand; there it is torch that reports them.

    Args:
        output: "softmax", "sigmoid" or "identity": what is made of raw outputs.
        reduction: "mean", "sum" or "none". The mean is over examples; with ``weight`` and class indices it is the weighted mean.
        weight: factor of each output's term, (K,); null for ones.
        ignore_index: class index of examples that do not count; only for class indices.

    Raises:
        ValueError: for values out of range, shapes that do not fit, and class indices that are no integers.
    """

    kind: ClassVar[str]  # what ``load_loss`` and files know it by
    outputs: ClassVar[tuple[str, ...]] = OUTPUTS  # those it is defined for
    settings: ClassVar[tuple[str, ...]] = ("output", "reduction", "weight", "ignore_index")  # what a copy is built with

    def __init__(
        self,
        output: str = "softmax",
        reduction: str = "mean",
        weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
    ):
        super().__init__()
        require_choice("output", output, self.outputs)
        require_choice("reduction", reduction, REDUCTIONS)
        if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index is {str(ignore_index)[:40]}; accepted: an integer of 64 bits")
        self.output, self.reduction, self.ignore_index = output, reduction, ignore_index
        self.weight: Tensor | None
        self.register_buffer("weight", None if weight is None else finite_vector("weight", weight))

    @abstractmethod
    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        """``l``: (N, K) of raw outputs and targets."""

    def probabilities(self, prediction_NK: Tensor) -> Tensor:
        """What the loss sees of raw outputs."""
        return activate(prediction_NK, self.output)

    def per_example(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        terms_NK = self.terms(prediction_NK, target_NK)
        return (terms_NK if self.weight is None else terms_NK * self.weight.to(terms_NK)).sum(-1)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        precise = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        with torch.autocast(prediction.device.type, enabled=False):
            if self.output != "softmax":
                return self._of_numbers(precise, target)
            by_class = precise.movedim(1 if precise.ndim > 1 else 0, -1)
            if target.is_floating_point():
                return self._of_probabilities(by_class, precise.shape, target)
            return self._of_indices(by_class, target)

    def _of_numbers(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.ndim == target.ndim + 1 and prediction.shape[-1] == 1:
            target = target.unsqueeze(-1)
        if prediction.shape != target.shape:
            raise ValueError(f"target has shape {tuple(target.shape)}; accepted: {tuple(prediction.shape)}")
        if prediction.ndim < 2:
            prediction, target = prediction.unsqueeze(-1), target.unsqueeze(-1)
        return self._reduced(self._losses(prediction, target.to(prediction.dtype)))

    def _of_probabilities(self, by_class: Tensor, shape: torch.Size, target: Tensor) -> Tensor:
        if target.shape != shape:
            raise ValueError(f"target has shape {tuple(target.shape)}; accepted for probabilities: {tuple(shape)}")
        target = target.movedim(1 if target.ndim > 1 else 0, -1)
        return self._reduced(self._losses(by_class, target.to(by_class.dtype)))

    def _of_indices(self, by_class: Tensor, target: Tensor) -> Tensor:
        *shape, num_classes = by_class.shape
        if list(target.shape) != shape:
            raise ValueError(f"target has shape {tuple(target.shape)}; accepted for class indices: {tuple(shape)}")
        if target.dtype not in INTEGERS:
            raise ValueError(f"target has type {target.dtype}; accepted: integer class indices, or probabilities")
        kept = target != self.ignore_index
        index = torch.where(kept, target, 0).long()
        self._require_classes(index, num_classes)
        # Examples that do not count reach neither the value nor the derivative, whatever their predictions are.
        losses = self._losses(
            torch.where(kept.unsqueeze(-1), by_class, 0.0), one_hot(index, num_classes, by_class.dtype)
        )
        counted = kept if self.weight is None else kept * self.weight[index]
        return self._reduced(torch.where(kept, losses, 0.0), counted.to(losses.dtype).sum())

    def _require_classes(self, index: Tensor, num_classes: int) -> None:
        if torch.compiler.is_compiling() or index.device.type != "cpu" or is_functorch_wrapped_tensor(index):
            return
        strange = index[(index < 0) | (index >= num_classes)]
        if len(strange):
            wanted = f"class indices 0 to {num_classes - 1}, or ignore_index, {self.ignore_index}"
            raise ValueError(f"target has class index {strange[0].item()}; accepted: {wanted}")

    def _losses(self, prediction: Tensor, target: Tensor) -> Tensor:
        num_outputs = prediction.shape[-1]
        if self.weight is not None and self.weight.shape != (num_outputs,):
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}; accepted: ({num_outputs},)")
        flat = self.per_example(prediction.reshape(-1, num_outputs), target.reshape(-1, num_outputs))
        return flat.reshape(prediction.shape[:-1])

    def _reduced(self, losses: Tensor, counted: Tensor | None = None) -> Tensor:
        """``counted``: what the mean divides by; None for the number of losses."""
        if self.reduction == "none":
            return losses
        total = losses.sum()
        if self.reduction == "sum":
            return total
        return total / (losses.numel() if counted is None else counted)

    # -- saving ----------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The settings that a copy is built with, in builtins; ``ValueError`` for numbers that are not finite."""
        found = {name: getattr(self, name) for name in self.settings}
        return {name: finite_list(name, value) if isinstance(value, Tensor) else value for name, value in found.items()}

    def to_json(self) -> dict[str, Any]:
        """The whole loss in builtins, as ``loss_from_json`` reads it.

        Raises:
            ValueError: for weights that have ceased to be finite, which no copy could be built with.
        """
        return {"version": VERSION, "loss": self.kind} | self.options()

    def save(self, path: str | Path) -> None:
        """Write ``to_json`` to a file, whole or not at all.

        Raises:
            ValueError: as ``to_json``, and for what ``load_loss`` would refuse for its size, 1 MiB.
        """
        content = json.dumps(self.to_json(), indent=1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"the saved loss would have {len(content)} bytes; accepted: at most {MAX_BYTES}")
        write_whole(path, content)


class WeightedLoss(ElementwiseLoss):
    """An elementwise loss of one vector of parameters, which is saved with it and trained where ``trainable``."""

    weights: nn.Parameter

    def _set_weights(self, values: Sequence[float] | Tensor, count: int, trainable: bool) -> None:
        vector = finite_vector("weights", values, count)
        self.weights = nn.Parameter(vector.to(torch.get_default_dtype()), requires_grad=trainable)

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"weights": finite_list("weights", self.weights)}


def activate(prediction: Tensor, output: str) -> Tensor:
    """Softmax or sigmoid of raw outputs (..., K), or the outputs themselves."""
    if output == "softmax":
        return functional.softmax(prediction, -1)
    return torch.sigmoid(prediction) if output == "sigmoid" else prediction


def one_hot(index: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Probabilities (..., K) of class indices (...)."""
    zeros = torch.zeros((*index.shape, num_classes), dtype=dtype, device=index.device)
    return zeros.scatter(-1, index.unsqueeze(-1), 1.0)


def finite_vector(name: str, values: Any, count: int | None = None) -> Tensor:
    """A copy of ``values`` as a floating-point vector; ``ValueError`` unless they are numbers, finite and ``count`` of them."""
    wanted = f"{name} is {{}}; accepted: {'' if count is None else f'{count} '}finite numbers"
    if isinstance(values, Tensor):
        vector = values.detach().clone().to(torch.promote_types(values.dtype, torch.float32))
    else:
        if not isinstance(values, list | tuple) or not all(map(is_number, values)):
            raise ValueError(wanted.format(shown(values)))
        vector = torch.tensor(values, dtype=torch.float64).to(torch.get_default_dtype())
    if vector.ndim != 1 or (count is not None and len(vector) != count) or not vector.isfinite().all():
        raise ValueError(wanted.format(f"{shown(values)} of shape {tuple(vector.shape)}"))
    return vector


def finite_list(name: str, vector: Tensor) -> list[float]:
    """The numbers of a vector; ``ValueError`` naming the first that is not finite."""
    numbers: list[float] = vector.tolist()
    for place, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{name}[{place}] is {number}; accepted: finite numbers")
    return numbers


def require_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """The number as a float; ``ValueError`` unless it is one, finite and ``low <= value <= high``."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}; accepted: a number, {low} <= {name} <= {high}")
    return float(value)


def is_number(value: object) -> bool:
    """Whether it is an int or a float, no bool, that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def shown(value: object) -> str:
    """A short ASCII text of anything, however large or deep, for messages."""
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
