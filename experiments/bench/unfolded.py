"""The 39-feature rule as it was published: each tensor's features side by side in one array, then the network.

It is what the folded form is timed against and must agree with. For one run: no leading axes.
Letters: … a tensor's own axes, which features and decays follow.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from metalearn.base import Params, Tree
from metalearn.optim.accumulators import learned_decay
from metalearn.optim.factored_mlp import FACTORED_DECAYS, MOMENTUM_DECAYS, SQUARE_DECAYS, FactoredMLP
from metalearn.optim.features import TIME_SCALES, time_features
from metalearn.optim.layout import Layout


class Unfolded(FactoredMLP):
    """``FactoredMLP`` with all 39 features written out for every parameter."""

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        tensors = {name: _zeros(tuple(p.shape), p) for name, p in layout.unpack(params_P).items()}
        return {"step": torch.zeros((), dtype=torch.int64), **tensors}

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        momentum = learned_decay(MOMENTUM_DECAYS, meta["momentum_decay"])
        square = learned_decay(SQUARE_DECAYS, meta["square_decay"]).clamp(0, 1)
        factored = learned_decay(FACTORED_DECAYS, meta["factored_decay"]).clamp(0, 1)
        time = time_features(state["step"], TIME_SCALES, grads_P.dtype)
        later, steps = {"step": state["step"] + 1}, []
        params = layout.unpack(params_P)
        for name, g in layout.unpack(grads_P).items():
            # A scalar is given an axis: it has none to take means over.
            own = later[name] = _accumulated(state[name], g.reshape(g.shape or (1,)), momentum, square, factored)
            p, g = (x.reshape(x.shape or (1,)) for x in (params[name], g))
            features = self._features(g, p, own, time)
            direction, magnitude = self._network(meta, features).unbind(-1)
            steps.append((direction * (magnitude * self.exp_mult).exp() * self.step_mult).flatten())
        return torch.cat(steps), later

    def _features(self, g: Tensor, p: Tensor, own: Tree, time: Tensor) -> Tensor:
        """(…, 39)."""
        m, v = own["momentum"], own["square"]
        root = (v + 1e-6).rsqrt()
        features = [g.unsqueeze(-1), p.unsqueeze(-1), m, v, m * root, root]
        if g.dim() < 2:
            s = own["diagonal"]
            inverse = (s + 1e-8).rsqrt()
            adafactor = g.unsqueeze(-1) * (s + 1e-9).clamp(min=1e-9).rsqrt()
            features += [adafactor, s, s, inverse, inverse, m * (s + 1e-6).rsqrt()]
        else:
            d1, d0 = _factored_axes(tuple(g.shape))
            row, column = own["row"].unsqueeze(d0), own["column"].unsqueeze(d1)
            row_factor = (row / (row.mean(d1, keepdim=True) + 1e-9)).clamp(min=1e-9).rsqrt()
            column_factor = column.clamp(min=1e-9).rsqrt()
            rows, columns = row.expand_as(m).contiguous(), column.expand_as(m).contiguous()
            inverse = (rows + 1e-8).rsqrt(), (columns + 1e-8).rsqrt()
            adafactor = g.unsqueeze(-1) * row_factor * column_factor
            features += [adafactor, rows, columns, *inverse, m * row_factor * column_factor]
        raw = torch.cat(features, -1)
        normal = raw * (raw.square().mean(tuple(range(g.dim())), keepdim=True) + 1e-5).rsqrt()
        return torch.cat([normal, time.expand(*g.shape, len(TIME_SCALES)).contiguous()], -1)

    def _network(self, meta: Params, x: Tensor) -> Tensor:
        """(…, 2)."""
        last = len(self.hidden_sizes)
        for k in range(last + 1):
            x = functional.linear(x, meta[f"weight_{k}"].T, meta[f"bias_{k}"])
            x = x.relu() if k < last else x
        return x


def _factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The second largest axis and the largest one, of equal ones the last."""
    order = np.argsort(shape, kind="stable")
    return int(order[-2]), int(order[-1])


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tree:
    """The statistics of one tensor before the first gradient."""
    shape = shape or (1,)
    state = {"momentum": like.new_zeros(*shape, len(MOMENTUM_DECAYS)), "square": like.new_zeros(*shape, 1)}
    if len(shape) < 2:
        return {**state, "diagonal": like.new_zeros(*shape, len(FACTORED_DECAYS))}
    for name, axis in zip(("column", "row"), _factored_axes(shape), strict=True):
        rest = [size for k, size in enumerate(shape) if k != axis]
        state[name] = like.new_zeros(*rest, len(FACTORED_DECAYS))
    return state


def _accumulated(state: Tree, g: Tensor, momentum: Tensor, square: Tensor, factored: Tensor) -> Tree:
    """The statistics after one more gradient."""
    squares = g.square()
    later = {
        "momentum": torch.lerp(state["momentum"], g.unsqueeze(-1), 1 - momentum),
        "square": torch.lerp(state["square"], squares.unsqueeze(-1), 1 - square),
    }
    squares = squares + 1e-30
    if g.dim() < 2:
        return {**later, "diagonal": torch.lerp(state["diagonal"], squares.unsqueeze(-1), 1 - factored)}
    for name, axis in zip(("column", "row"), _factored_axes(tuple(g.shape)), strict=True):
        later[name] = torch.lerp(state[name], squares.mean(axis).unsqueeze(-1), 1 - factored)
    return later
