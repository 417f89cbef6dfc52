"""Learned optimizers: rules whose meta-parameters are weights.

Letters: P parameters of all tensors together; ``…`` leading axes, of tasks and of particles.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import Params, Rule, Tree
from metalearn.optim.layout import Layout


class LearnedRule(Rule):
    """An update computed by a learned function, on one flat vector of all parameters.

    ``params <- params - direction``. Residents give ``init_meta``, ``start`` and ``direction``, which take flat tensors
    (…, P) with any leading axes, where each leaf of ``meta`` has either none of these axes or all of them. No argument is
    changed, nothing is drawn, and tensors see of one another what the resident's docstring says and no more.

    Every constructor argument is kept as an attribute of the same name, so that a file can say how to rebuild the rule;
    ``version`` goes up whenever the same weights would make another update. ``meta`` is ``{}`` or all of the weights:
    ``{}`` stands for ``weights``, which are those before meta-training until others are put there.
    """

    version: ClassVar[int] = 1

    def __init__(self) -> None:
        self._weights: Params | None = None

    @property
    def weights(self) -> Params:
        """What ``{}`` stands for."""
        if self._weights is None:
            with torch.inference_mode(False):  # they may be differentiated later
                self._weights = self.init_meta(random.key(0, "weights"))
        return self._weights

    @weights.setter
    def weights(self, weights: Params) -> None:
        own = {name: tuple(value.shape) for name, value in self.init_meta(random.key(0, "weights")).items()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        if given != own:
            wrong = {name: given.get(name) for name in own | given if given.get(name) != own.get(name)}
            accepted = {name: own.get(name) for name in wrong}
            raise ValueError(f"weights of {type(self).__name__} have shapes {wrong}; accepted: {accepted}")
        self._weights = {name: weights[name].detach().clone() for name in own}

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as builtins."""
        names = list(type(self).__init__.__annotations__)
        return {name: getattr(self, name) for name in names if name != "return"}

    @abstractmethod
    def init_meta(self, key: Tensor) -> Params:
        """The weights before meta-training, each a function of the key."""

    @abstractmethod
    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        """The state before the first update: nested dictionaries of tensors.

        A leaf is one for all parameters, or has along one axis what belongs to each tensor, in the layout's order: (…, P)
        where that is a number for each parameter.
        """

    @abstractmethod
    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        """What is subtracted from the parameters (…, P), and the state after; ``loss`` (…) where ``needs_loss``."""

    def init(self, meta: Params, params: Params) -> Tree:
        layout = Layout.of(params)
        flat = _working(layout.pack(params))
        return self.start(self._like(meta, flat), layout, flat)

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        return self._updated(Layout.of(params), meta, grads, state, params, loss)

    def update_runs(
        self, metas_R: Params, grads_R: Params, state_R: Tree, params_R: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        """``update`` of R runs, each with weights of its own: every leaf, and ``loss``, has a first axis of runs."""
        return self._updated(Layout.of(params_R, 1), metas_R, grads_R, state_R, params_R, loss)

    def _updated(
        self, layout: Layout, meta: Params, grads: Params, state: Tree, params: Params, loss: Tensor | None
    ) -> tuple[Params, Tree]:
        given, grads_P = layout.pack(params), _working(layout.pack(grads))
        flat = _working(given)
        with torch.autocast(flat.device.type, enabled=False):
            direction_P, state = self.direction(self._like(meta, flat), layout, grads_P, state, flat, loss)
        return layout.unpack((flat - direction_P).to(given.dtype)), state

    def _like(self, meta: Params, flat: Tensor) -> Params:
        return {name: value.to(flat.device, flat.dtype) for name, value in (meta or self.weights).items()}


def _working(flat: Tensor) -> Tensor:
    """Half precision as float32, in which rules work and keep their state."""
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def weight(meta: Params, name: str, axes: int) -> Tensor:
    """``meta[name]`` with ``axes`` axes of its own, laid out against values (…, P, features), or a number against (…, P).

    A number (axes 0) becomes (…, 1), a vector (…, 1, features), a matrix stays (…, in, out).
    """
    value = meta[name]
    return value.unsqueeze(-1) if axes == 0 else value.unsqueeze(-2) if axes == 1 else value


def count(params_P: Tensor) -> Tensor:
    """0 as int64 for every leading index: the updates taken so far, (…)."""
    return torch.zeros(params_P.shape[:-1], dtype=torch.int64, device=params_P.device)
