"""Running statistics of gradients: means, mean squares, and mean squares by rows and by columns as Adafactor keeps them.

Letters: P parameters of all tensors together, n of one tensor; ``…`` leading axes, of tasks and of particles. Statistics of
several decays lie along the axis before the parameters: (…, decays, P).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.base import State
from metalearn.optim.layout import Layout

FIRST, SECOND = -4, -2  # the axes of the two largest dimensions in the five that a tensor is seen with
AXES = (-5, -4, -3, -2, -1)
SHARPNESS = 10.0  # how fast a learned offset moves a decay: that of the logarithm of 1 - decay
FLOOR = 1e-9  # of what a root is taken of
_TINY = 1e-30  # added to squares


class Planes(NamedTuple):
    """A tensor seen with five axes, (A, R, B, C, E), where R and C are its two largest dimensions.

    Rows are means over the largest of the two, columns over the other, as Adafactor has them; of equal ones the last
    counts as the largest. Tensors of fewer than two dimensions have each element for a row, and no columns.
    """

    shape: tuple[int, ...]
    row_axis: int | None  # what a row is the mean over
    column_axis: int | None

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Planes":
        """How a tensor of this shape is seen."""
        if len(shape) < 2:
            return cls((1, math.prod(shape), 1, 1, 1), None, None)
        second, largest = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
        i, j = min(second, largest), max(second, largest)
        seen = (math.prod(shape[:i]), shape[i], math.prod(shape[i + 1 : j]), shape[j], math.prod(shape[j + 1 :]))
        return cls(seen, FIRST, SECOND) if largest == i else cls(seen, SECOND, FIRST)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return _without(self.shape, self.row_axis)

    @property
    def column_shape(self) -> tuple[int, ...]:
        """(0,) where there are none."""
        return (0,) if self.column_axis is None else _without(self.shape, self.column_axis)

    def see(self, x: Tensor) -> Tensor:
        """(…, n) as (…, A, R, B, C, E), a view."""
        return x.unflatten(-1, self.shape)


class Decays(NamedTuple):
    """The share of the old that a mean keeps, by statistic: (…, decays) each, one number of ``square``."""

    momentum: Tensor
    square: Tensor
    factored: Tensor


def learned_decay(start: Sequence[float], offset: Tensor) -> Tensor:
    """``1 - exp(10 (log(1 - start) / 10 + offset))``: ``start`` (0 … 1, excluded) where ``offset`` (…, decays) is 0."""
    # Numbers instead of a tensor of starts, which would be copied to a GPU that waits for it.
    moved = [d + math.log1p(-decay) / SHARPNESS for decay, d in zip(start, offset.unbind(-1), strict=True)]
    return 1 - (SHARPNESS * torch.stack(moved, -1)).exp()


def start(layout: Layout, params_P: Tensor, momenta: int, factored: int) -> State:
    """Zeros for ``momenta`` and ``factored`` decays: ``momentum`` (…, momenta, P), ``square`` (…, P), ``row`` and ``column``."""
    leading, planes = params_P.shape[:-1], [Planes.of(shape) for shape in layout.shapes]
    rows, columns = (sum(math.prod(getattr(plane, name)) for plane in planes) for name in ("row_shape", "column_shape"))
    return {
        "momentum": params_P.new_zeros(*leading, momenta, params_P.shape[-1]),
        "square": torch.zeros_like(params_P),
        "row": params_P.new_zeros(*leading, factored, rows),
        "column": params_P.new_zeros(*leading, factored, columns),
    }


def accumulate(decays: Decays, layout: Layout, grads_P: Tensor, state: State) -> State:
    """The statistics after one more gradient: ``s <- d s + (1 - d) x``, x the gradient or, but for momenta, its square."""
    squares_P = grads_P * grads_P
    rows, columns = [], []
    for shape, squares_n in zip(layout.shapes, layout.split(squares_P), strict=True):
        planes, squares = Planes.of(shape), squares_n + _TINY
        rows.append(_mean(planes, squares, planes.row_axis))
        if planes.column_axis is not None:
            columns.append(_mean(planes, squares, planes.column_axis))
    new = {"momentum": _mix(state["momentum"], grads_P.unsqueeze(-2), decays.momentum)}
    new["square"] = _mix(state["square"].unsqueeze(-2), squares_P.unsqueeze(-2), decays.square.clamp(0, 1)).squeeze(-2)
    factored = decays.factored.clamp(0, 1)
    new["row"] = _mix(state["row"], torch.cat(rows, -1).unsqueeze(-2), factored)
    new["column"] = (
        _mix(state["column"], torch.cat(columns, -1).unsqueeze(-2), factored) if columns else state["column"]
    )
    return new


def rates(row: Tensor, column: Tensor, column_axis: int) -> tuple[Tensor, Tensor]:
    """What Adafactor multiplies gradients by: ``1 / sqrt(row / (mean(row) + 1e-9))`` and ``1 / sqrt(column)``.

    Args:
        row: mean squares (…, decays, *row_shape).
        column: mean squares (…, decays, *column_shape).
        column_axis: of ``Planes``, along which rows follow each other.

    Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018, algorithm 4.
    """
    return root_rate(row / (row.mean(column_axis, keepdim=True) + FLOOR)), root_rate(column)


def root_rate(square: Tensor) -> Tensor:
    """``1 / sqrt(max(square, 1e-9))``."""
    return square.clamp(min=FLOOR).rsqrt()


def _mix(old: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """``kept old + (1 - kept) new`` for (…, decays or 1, P)."""
    kept = kept.unsqueeze(-1)
    return torch.lerp(old, new, 1 - kept)


def _mean(planes: Planes, squares: Tensor, axis: int | None) -> Tensor:
    """The mean (…, rest) over one of the five axes of (…, n), 0 over one without entries."""
    if axis is None:
        return squares
    seen = planes.see(squares)
    return (seen.mean(axis) if planes.shape[axis] else seen.sum(axis)).flatten(-4)


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else tuple(1 if k == axis else n for k, n in zip(AXES, shape, strict=True))
