"""Where the tensors of a model lie in one flat vector.

Letters: P parameters of all tensors together; ``…`` leading axes, of tasks and of particles.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.base import Params


class Layout(NamedTuple):
    """Names, shapes and sizes of tensors, in the order in which they follow each other in a flat vector (…, P)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, params: Params, leading: int = 0) -> "Layout":
        """The layout of these tensors, the first ``leading`` axes of each left out."""
        return _layout(tuple(params), tuple(tuple(value.shape[leading:]) for value in params.values()))

    def pack(self, params: Params) -> Tensor:
        """The tensors as one vector (…, P)."""
        values = [params[name] for name in self.names]
        leading = values[0].shape[: values[0].ndim - len(self.shapes[0])]
        return torch.cat([value.reshape(*leading, size) for value, size in zip(values, self.sizes, strict=True)], -1)

    def unpack(self, flat: Tensor) -> Params:
        """The tensors (…, *shape) of a vector, as views of it."""
        parts = zip(self.names, self.shapes, self.split(flat), strict=True)
        return {name: part.unflatten(-1, shape) if shape else part.squeeze(-1) for name, shape, part in parts}

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The pieces (…, size) of a vector, tensor by tensor, as views of it."""
        return flat.split(self.sizes, -1)


@functools.lru_cache(maxsize=64)
def _layout(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Layout:
    return Layout(names, shapes, tuple(math.prod(shape) for shape in shapes))
