"""A rule as what it does to one parameter: a dynamical system, driven by gradients.

The state ``h <- F(h, g)`` and the update ``delta = r(h, g)`` of a gradient g. Letters: N numbers of h, T updates, M systems
side by side.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from metalearn import random, tree
from metalearn.base import Params, Rule, Tree, require_range

SMALLEST = 5e-324  # the least positive number


class Coordinate:
    """One parameter under a rule, in float64, as a dynamical system of N numbers.

    h is what the state holds of this parameter and what it holds of the tensor as a whole, one after the other. Integers of
    the state count updates and are no part of h: every call says how many there were. The parameter stands still.

    Rules that look at the whole tensor are given ``others`` more parameters, of normal gradients. Their share of the state
    is that after 100 updates and stands still, as it does to the first order in a large tensor.

    Args:
        rule: any rule that is not for matrices alone.
        meta: its meta-parameters; null for its own.
        param: value of all parameters.
        others: further parameters of the tensor, at least 0.
        spread: standard deviation of their gradients, above 0.
        loss: what a rule that asks for the loss is told.
        seed: of the others' gradients.

    Raises:
        ValueError: for values out of range, or a state with more than one axis of parameters.
    """

    def __init__(
        self,
        rule: Rule,
        meta: Params | None = None,
        param: float = 0.0,
        others: int = 0,
        spread: float = 1.0,
        loss: float = 1.0,
        seed: int = 0,
    ):
        require_range("others", others, 0)
        require_range("spread", spread, SMALLEST)
        self.rule, self.others = rule, others
        self.meta = {name: value.detach().double() for name, value in (meta or {}).items()}
        self._params = {"p": torch.full((1 + others,), param, dtype=torch.float64)}
        self._loss = torch.tensor(loss, dtype=torch.float64)
        state = self.rule.init(self.meta, self._params)
        wider = self.rule.init(self.meta, {"p": torch.full((2 + others,), param, dtype=torch.float64)})
        self._leaves, self._structure = tree.pack(state), pytree.tree_structure(state)
        self._axes = {path: _axis(path, leaf, tree.pack(wider)[path]) for path, leaf in self._leaves.items()}
        self.start = self._split(state)
        self._grads = torch.zeros(others, dtype=torch.float64)
        if others:
            self._settle(state, spread, random.key(seed, "others"))

    def __call__(self, h_N: Tensor, grad: Tensor | float, step: int = 0) -> tuple[Tensor, Tensor]:
        """The change of the parameter () and the state after (N,), where ``step`` updates were made before."""
        grads = torch.cat([torch.as_tensor(grad, dtype=torch.float64).reshape(1), self._grads])
        loss = self._loss if self.rule.needs_loss else None
        after, state = self.rule.update(self.meta, {"p": grads}, self._merge(h_N, step), self._params, loss=loss)
        return after["p"][0] - self._params["p"][0], self._split(state)

    def together(self, h_MN: Tensor, grad_M: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
        """``__call__`` for M systems: changes (M,) and states (M, N)."""
        with torch.no_grad():
            if len(grad_M) > 1:
                return vmap(self, (0, 0, None))(h_MN, grad_M, step)
            delta, h_N = self(h_MN[0], grad_M[0], step)  # vmap takes several times as long as a small rule
            return delta.unsqueeze(0), h_N.unsqueeze(0)

    def run(self, grads_MT: Tensor, steps: Iterable[int], h_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Changes (M, T) and states (M, N) after M sequences of gradients, from ``h_N`` or the start.

        ``steps`` is the number of updates before each: ``range(T)``, or ``repeat(t)`` for a clock that stands still.
        """
        h_MN = (self.start if h_N is None else h_N).expand(len(grads_MT), -1)
        found = []
        for grad_M, step in zip(grads_MT.unbind(1), steps, strict=False):
            delta_M, h_MN = self.together(h_MN, grad_M, step)
            found.append(delta_M)
        return torch.stack(found, 1), h_MN

    def _settle(self, state: Tree, spread: float, key: Tensor) -> None:
        drawn = spread * random.normal(key, (101, self.others)).double()
        loss = self._loss if self.rule.needs_loss else None
        for grads in drawn[:-1]:
            own = {"p": torch.cat([torch.zeros(1, dtype=torch.float64), grads])}
            with torch.no_grad():
                _, state = self.rule.update(self.meta, own, state, self._params, loss=loss)
        self._leaves, self._grads = tree.pack(state), drawn[-1]

    def _split(self, state: Tree) -> Tensor:
        leaves, pieces = tree.pack(state), [torch.zeros(0, dtype=torch.float64)]
        for path, axis in self._axes.items():  # not in the state's order, which an update may change
            if leaves[path].is_floating_point():
                pieces.append((leaves[path] if axis is None else leaves[path].select(axis, 0)).double().reshape(-1))
        return torch.cat(pieces)

    def _merge(self, h_N: Tensor, step: int) -> Tree:
        leaves, taken = [], 0
        for path, axis in self._axes.items():
            leaf = self._leaves[path]
            if not leaf.is_floating_point():
                leaves.append(leaf if leaf.dtype == torch.bool else torch.full_like(leaf, step))
                continue
            own = leaf if axis is None else leaf.narrow(axis, 0, 1)
            piece = h_N[taken : taken + own.numel()].reshape(own.shape).to(leaf.dtype)
            taken += own.numel()
            leaves.append(piece if axis is None else torch.cat([piece, leaf.narrow(axis, 1, self.others)], axis))
        return pytree.tree_unflatten(leaves, self._structure)


def _axis(path: str, leaf: Tensor, wider: Tensor) -> int | None:
    """The axis of a leaf that grows with the number of parameters; None where there is none."""
    found = [axis for axis, sizes in enumerate(zip(leaf.shape, wider.shape, strict=True)) if sizes[0] != sizes[1]]
    if len(found) > 1:
        raise ValueError(f"{path!r} of the state is {tuple(leaf.shape)}; accepted: one axis of parameters")
    return found[0] if found else None
