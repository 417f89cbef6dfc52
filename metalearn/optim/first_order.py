"""First-order optimizers as differentiable functions, and rules around rules: clipped gradients, scheduled learning rates.

Letters of the formulas: p a parameter, g its gradient, t = 1, 2, ... the update. Defaults and the order of operations are
those of ``torch.optim``, so that a rule and its torch twin take the same steps.

Every hyper-parameter is a name in ``rule.settings``, and a tensor of that name in ``meta`` takes its place: of no dimension,
or of any shape that broadcasts to every parameter's. ``meta["lr/<parameter>"]`` is the learning rate of one parameter.
``init`` and ``update`` must be given the same names: a state holds only what the names and the settings at hand make use of.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from metalearn.base import Params, Rule, Tree, require_range
from metalearn.optim.schedules import Schedule

BELOW_ONE = math.nextafter(1.0, 0.0)
PER_PARAMETER = "lr/"


class Tunable(Rule):
    """A rule with hyper-parameters that ``meta`` can replace: ``settings`` has their names and the values it falls back on."""

    def __init__(self, **settings: float) -> None:
        self.settings = settings

    def _value(self, meta: Params, name: str) -> float | Tensor:
        return meta.get(name, self.settings[name])

    def _uses(self, meta: Params, name: str) -> bool:
        return name in meta or self.settings[name] != 0

    def _rates(self, meta: Params, factor: Tensor | None = None) -> dict[str, Any]:
        """All learning rates, times ``factor``, by their names in ``meta``; "lr" is always among them."""
        own = {name: value for name, value in meta.items() if name.startswith(PER_PARAMETER)}
        rates = {"lr": self._value(meta, "lr"), **own}
        return rates if factor is None else {name: factor * rate for name, rate in rates.items()}


class FirstOrder(Tunable):
    """A rule that makes its update of gradients and their running statistics."""

    def __init__(self, **settings: float) -> None:
        super().__init__(**settings)
        for name in ("lr", "eps", "weight_decay"):
            require_range(name, settings.get(name, 0.0), 0.0)

    def init(self, meta: Params, params: Params) -> Tree:
        """The state before the first update.

        Raises:
            ValueError: ``meta`` has a name that is no hyper-parameter, or a shape that would enlarge a parameter.
        """
        for name, value in meta.items():
            own = name.removeprefix(PER_PARAMETER)
            if name in self.settings:
                targets = params
            elif own != name and own in params:
                targets = {own: params[own]}
            else:
                accepted = ", ".join([*self.settings, *(PER_PARAMETER + target for target in params)])
                raise ValueError(f"meta has {name!r}; accepted: {accepted}")
            for target, p in targets.items():
                _require_broadcast(name, value, target, p)
        return self._start(meta, params)

    @abstractmethod
    def _start(self, meta: Params, params: Params) -> Tree:
        """The state for a ``meta`` that was found good."""


class SGD(FirstOrder):
    """Gradient descent, plain, with momentum or with Nesterov's momentum.

    ``g' = g + weight_decay p``; without momentum ``p <- p - lr g'``; with it ``b <- momentum b + (1 - dampening) g'``,
    where the first b is g' itself, and ``p <- p - lr b``, or ``p <- p - lr (g' + momentum b)`` with ``nesterov``.

    Args:
        lr: Learning rate, >= 0.
        momentum: Share of the buffer that is kept, 0 ... 1.
        nesterov: Look ahead along the buffer; needs momentum > 0 and no dampening.
        weight_decay: Weight of ``|p|^2 / 2`` in the loss, >= 0.
        dampening: Share of the gradient that the buffer does not take in, 0 ... 1; used with momentum only.

    Raises:
        ValueError: A value is out of range, or ``nesterov`` has no momentum; by ``init``, dampening has none.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, eqs. 1-4.
    Differs from the paper: as in torch, the learning rate multiplies the buffer instead of what goes into it.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
    ) -> None:
        super().__init__(lr=lr, momentum=momentum, weight_decay=weight_decay, dampening=dampening)
        require_range("momentum", momentum, 0.0, 1.0)
        require_range("dampening", dampening, 0.0, 1.0)
        if nesterov:
            require_range("momentum of nesterov", momentum, math.ulp(0.0), 1.0)
            require_range("dampening of nesterov", dampening, 0.0, 0.0)
        self.nesterov = nesterov

    def _start(self, meta: Params, params: Params) -> Tree:
        momentum, dampening = self._uses(meta, "momentum"), self._uses(meta, "dampening")
        if dampening and (self.nesterov or not momentum):
            raise ValueError("dampening is given; accepted: with momentum and without nesterov only")
        count = {"step": _count(params)} if dampening else {}
        return {**count, "momentum": _zeros(params)} if momentum else {}

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        rates = self._rates(meta)
        if self._uses(meta, "weight_decay"):
            decay = self._value(meta, "weight_decay")
            grads = {name: _add(grads[name], decay, p) for name, p in params.items()}
        if self._uses(meta, "momentum"):
            grads, state = self._accumulate(meta, grads, state)
        return {name: _descend(p, _rate(rates, name), grads[name]) for name, p in params.items()}, state

    def _accumulate(self, meta: Params, grads: Params, state: Tree) -> tuple[Params, Tree]:
        """The directions of descent and the state with the gradients in its buffers."""
        momentum = self._value(meta, "momentum")
        taken = grads
        later: dict[str, Any] = {}  # not dict[str, Any](), which the compiler cannot trace
        if self._uses(meta, "dampening"):
            dampening = self._value(meta, "dampening")
            later = {"step": state["step"] + 1}
            # A product, not a branch: the count may be batched, and the first gradient is taken in whole.
            taken = {n: _descend(g, dampening * (state["step"] > 0).to(g.dtype), g) for n, g in grads.items()}
        buffers = later["momentum"] = {n: _add(g, momentum, state["momentum"][n]) for n, g in taken.items()}
        return {n: _add(grads[n], momentum, b) for n, b in buffers.items()} if self.nesterov else buffers, later


class RMSProp(FirstOrder):
    """Gradients divided by a running root mean square.

    ``g' = g + weight_decay p``; ``v <- alpha v + (1 - alpha) g'^2``; ``d = g' / (sqrt(v) + eps)``; ``p <- p - lr d``.
    Centred: ``a <- alpha a + (1 - alpha) g'``, and ``v - a^2`` under the root. With momentum: ``b <- momentum b + d``, and b
    instead of d.

    Args:
        lr: Learning rate, >= 0.
        alpha: Share of the mean square that is kept, 0 ... 1.
        eps: Added to the root, >= 0.
        weight_decay: Weight of ``|p|^2 / 2`` in the loss, >= 0.
        momentum: Share of the buffer that is kept, 0 ... 1.
        centered: Divide by the running standard deviation instead.

    Raises:
        ValueError: A value is out of range.

    Source: Tieleman and Hinton, "Neural networks for machine learning", lecture 6.5, 2012; centred: Graves, "Generating
    sequences with recurrent neural networks", 2013, eqs. 38-45.
    Differs from torch: where rounding makes a centred ``v - a^2`` negative it counts as 0, not as a NaN.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        require_range("alpha", alpha, 0.0, 1.0)
        require_range("momentum", momentum, 0.0, 1.0)
        self.centered = centered

    def _start(self, meta: Params, params: Params) -> Tree:
        used = {"square": True, "mean": self.centered, "momentum": self._uses(meta, "momentum")}
        return {name: _zeros(params) for name, wanted in used.items() if wanted}

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        rates, eps, alpha = self._rates(meta), self._value(meta, "eps"), self._value(meta, "alpha")
        if self._uses(meta, "weight_decay"):
            decay = self._value(meta, "weight_decay")
            grads = {name: _add(grads[name], decay, p) for name, p in params.items()}
        later: Tree = {"square": {n: _mix(v, grads[n] * grads[n], alpha) for n, v in state["square"].items()}}
        variance = later["square"]
        if self.centered:
            later["mean"] = {n: _mix(a, grads[n], alpha) for n, a in state["mean"].items()}
            variance = {n: v - later["mean"][n] * later["mean"][n] for n, v in variance.items()}
        steps = {n: grads[n] / (_root(v) + _like(eps, v)) for n, v in variance.items()}
        if self._uses(meta, "momentum"):
            momentum = self._value(meta, "momentum")
            steps = later["momentum"] = {n: _add(d, momentum, state["momentum"][n]) for n, d in steps.items()}
        return {name: _descend(p, _rate(rates, name), steps[name]) for name, p in params.items()}, later


class Adam(FirstOrder):
    """Running mean of the gradients over a running root mean square, both corrected for their start at 0.

    ``g' = g + weight_decay p``; ``m <- beta1 m + (1 - beta1) g'``; ``v <- beta2 v + (1 - beta2) g'^2``;
    ``p <- p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        lr: Learning rate, >= 0.
        beta1: Share of the mean that is kept, 0 <= beta1 < 1.
        beta2: Share of the mean square that is kept, 0 <= beta2 < 1.
        eps: Added to the root, >= 0.
        weight_decay: Weight of ``|p|^2 / 2`` in the loss, >= 0.

    Raises:
        ValueError: A value is out of range.

    Source: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
    """

    decoupled: ClassVar[bool] = False

    def __init__(
        self, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        require_range("beta1", beta1, 0.0, BELOW_ONE)
        require_range("beta2", beta2, 0.0, BELOW_ONE)

    def _start(self, meta: Params, params: Params) -> Tree:
        return {"step": _count(params), "mean": _zeros(params), "square": _zeros(params)}

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        beta1, beta2 = self._value(meta, "beta1"), self._value(meta, "beta2")
        step = state["step"] + 1
        if self._uses(meta, "weight_decay"):
            params, grads = self._decay(meta, grads, params)
        mean = {n: _mix(m, grads[n], beta1) for n, m in state["mean"].items()}
        square = {n: _mix(v, grads[n] * grads[n], beta2) for n, v in state["square"].items()}
        # In float32, 1 - 0.999^t would have no more than four digits. Both corrections are numbers; v stays as it is.
        root = (1 - beta2 ** step.double()).sqrt()
        dtype = next(iter(params.values())).dtype
        rates = self._rates(meta, (root / (1 - beta1 ** step.double())).to(dtype))
        eps = (root * self._value(meta, "eps")).to(dtype)
        new = {n: _descend(p, _rate(rates, n), mean[n] / (_root(square[n]) + _like(eps, p))) for n, p in params.items()}
        return new, {"step": step, "mean": mean, "square": square}

    def _decay(self, meta: Params, grads: Params, params: Params) -> tuple[Params, Params]:
        """The parameters and the gradients after weight decay."""
        decay = self._value(meta, "weight_decay")
        if not self.decoupled:
            return params, {name: _add(grads[name], decay, p) for name, p in params.items()}
        rates = self._rates(meta)
        return {name: _descend(p, _rate(rates, name) * decay, p) for name, p in params.items()}, grads


class AdamW(Adam):
    """Adam with decoupled weight decay: ``p <- (1 - lr weight_decay) p``, then Adam's update for the gradient alone.

    Args:
        lr: Learning rate, >= 0.
        beta1: Share of the mean that is kept, 0 <= beta1 < 1.
        beta2: Share of the mean square that is kept, 0 <= beta2 < 1.
        eps: Added to the root, >= 0.
        weight_decay: Share of a parameter that an update removes, in units of the learning rate, >= 0.

    Raises:
        ValueError: A value is out of range.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
    Differs from the paper: as in torch, the learning rate multiplies the decay.
    """

    decoupled = True

    def __init__(
        self, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-2
    ) -> None:
        super().__init__(lr, beta1, beta2, eps, weight_decay)


class Clipped(Tunable):
    """A rule whose gradients have a global norm of at most ``max_norm``: ``g <- g min(1, max_norm / (|g| + 1e-6))``.

    |g| is the Euclidean norm over all tensors of one run; under ``vmap`` each run has its own. The state is ``rule``'s.

    Args:
        rule: What the clipped gradients are given to.
        max_norm: Largest norm, >= 0.

    Raises:
        ValueError: ``max_norm`` is negative.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1.
    Differs from the paper: the 1e-6, as in torch's ``clip_grad_norm_``.
    """

    def __init__(self, rule: Rule, max_norm: float) -> None:
        require_range("max_norm", max_norm, 0.0)
        super().__init__(**_settings(rule), max_norm=max_norm)
        self.rule = rule

    def init(self, meta: Params, params: Params) -> Tree:
        return self.rule.init(_without(meta, "max_norm"), params)

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        norm = _root(torch.stack([(g * g).sum() for g in grads.values()]).sum())
        scale = (self._value(meta, "max_norm") / (norm + 1e-6)).clamp(max=1.0)
        grads = {name: g * _like(scale, g) for name, g in grads.items()}
        return self.rule.update(_without(meta, "max_norm"), grads, state, params, loss=loss)


class Scheduled(Tunable):
    """A rule whose learning rates, all of them, are multiplied by a function of the updates taken so far: 0, 1, 2, ...

    Args:
        rule: A rule with a learning rate.
        schedule: The factor of an update, from an int64 tensor () to a tensor ().

    Raises:
        ValueError: ``rule`` has no learning rate among its settings.
    """

    def __init__(self, rule: Rule, schedule: Schedule) -> None:
        super().__init__(**_settings(rule))
        if "lr" not in self.settings:
            raise ValueError(f"rule is {type(rule).__name__}, without 'lr'; accepted: a rule with a learning rate")
        self.rule = rule
        self.schedule = schedule

    def init(self, meta: Params, params: Params) -> Tree:
        return {"step": _count(params), "rule": self.rule.init(meta, params)}

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        meta = {**meta, **self._rates(meta, self.schedule(state["step"]))}
        params, inner = self.rule.update(meta, grads, state["rule"], params, loss=loss)
        return params, {"step": state["step"] + 1, "rule": inner}


def _root(square: Tensor) -> Tensor:
    """A square root with a derivative of 0 at 0, to every order, that is still a NaN for a NaN."""
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def _like(value: Any, p: Tensor) -> Any:
    """A hyper-parameter in the type of ``p``, so that it cannot change what it is combined with."""
    return value.to(p.dtype) if isinstance(value, Tensor) and value.dtype != p.dtype else value


def _add(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """``x + factor y``."""
    return torch.addcmul(x, y, _like(factor, x)) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _descend(p: Tensor, rate: float | Tensor, direction: Tensor) -> Tensor:
    """``p - rate direction``."""
    if isinstance(rate, Tensor):
        return torch.addcmul(p, direction, _like(rate, p), value=-1)
    return torch.sub(p, direction, alpha=rate)


def _mix(x: Tensor, y: Tensor, kept: float | Tensor) -> Tensor:
    """``kept x + (1 - kept) y``."""
    # Not torch.lerp: in forward mode torch makes float64 tangents of float32 numbers (), and lerp alone refuses them.
    return _add(x * _like(kept, x), 1 - kept, y)


def _rate(rates: dict[str, Any], name: str) -> float | Tensor:
    return rates.get(PER_PARAMETER + name, rates["lr"])


def _zeros(params: Params) -> Params:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def _count(params: Params) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)


def _settings(rule: Rule) -> dict[str, float]:
    return rule.settings if isinstance(rule, Tunable) else {}


def _without(meta: Params, name: str) -> Params:
    return {other: value for other, value in meta.items() if other != name}


def _require_broadcast(name: str, value: Tensor, target: str, p: Tensor) -> None:
    shape = (1,) * (p.dim() - value.dim()) + tuple(value.shape)
    if len(shape) > p.dim() or any(n not in (1, m) for n, m in zip(shape, p.shape, strict=True)):
        accepted = f"what broadcasts to the {tuple(p.shape)} of {target!r}"
        raise ValueError(f"meta {name!r} has shape {tuple(value.shape)}; accepted: {accepted}")
