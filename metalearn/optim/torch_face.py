"""A learned optimizer as an optimizer of ``torch.optim``'s kind.

Letters: P parameters of all tensors of a part together.
"""

# pyright: reportPrivateImportUsage=false
# (torch's own optimizers are made of its _foreach functions, which it does not export.)

import functools
import math
import types
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from metalearn import tree
from metalearn.base import Params, Tree
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule
from metalearn.optim.saving import describe, load_rule, with_weights

Part = dict[str, Any]  # "members": positions of tensors among all parameters; "tree": what the rule keeps of them


class LearnedOptimizer(Optimizer):
    """Any learned rule, in the place of ``torch.optim.Adam``: ``p <- p - lr (direction + weight_decay p)``.

    The direction is the rule's, bit for bit: with ``lr`` 1 and no decay the parameters go the way of ``rule.update``. The
    rule works in float32, or in float64 on parameters of that type; half-precision parameters are rounded at the end of each
    step, and what the rule keeps of them is never rounded.

    Parameters that are always given gradients together are one vector for the rule, a *part*, on each device and in each
    of the two precisions. Where one of them has no gradient, it is left alone and its state does not advance: its part falls
    apart into two, for good. Rules in which tensors see of one another (dynamic modes) see within a part only.

    Groups may change their order between steps. What is kept of parameters that are taken out, or replaced by other objects,
    is dropped.

    The state dictionary holds class, version, settings and weights of the rule: one of another rule is refused, and one of
    the same rule brings its weights along. Processes of ``torch.distributed`` agree as long as their gradients do;
    of a rule that asks for the loss, they take the mean over all processes, which must all step. Its state is of parts, which
    ``torch.distributed.checkpoint`` cannot divide: it knows one state for each parameter.

    Args:
        params: Parameters, pairs of name and parameter, or groups of either with an ``lr`` and a ``weight_decay`` of their own.
        rule: A file written by ``fit`` or ``save_rule``, the name of a rule that comes with the package, or a rule itself.
        lr: Factor of the rule's own step, >= 0; what schedulers change.
        weight_decay: Decoupled, in units of ``lr``, >= 0.
        compile: Run the rule through ``torch.compile``: once for each part, about a minute, not bit for bit the same.

    Raises:
        ValueError: A value is out of range, parameters are complex or integers, or there is no such rule; by ``step``, for
            sparse gradients, and where a rule that asks for the loss is given none.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | Path | LearnedRule = "digits_mlp",
        lr: float = 1.0,
        weight_decay: float = 0.0,
        compile: bool = False,
    ):
        if not isinstance(rule, str | Path | LearnedRule):
            raise ValueError(f"rule is {rule!r}; accepted: a file, the name of a rule of the package, or a LearnedRule")
        given = rule if isinstance(rule, LearnedRule) else load_rule(rule)
        self.rule = with_weights(given, given.weights)  # whatever becomes of the one that was given
        self.compile = compile
        self._known: list[Tensor] = []  # the parameters that positions in parts are of
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = self.defaults | param_group
        for name in ("lr", "weight_decay"):
            value = settings[name]
            number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
            if not number or not 0 <= float(value) < math.inf:
                raise ValueError(f"{name} is {value!r}; accepted: 0 <= {name} < inf")
        if settings.get("maximize"):
            raise ValueError("maximize is True, which rules do not know; accepted: False (and the negative loss)")
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"a parameter is of {p.dtype}; accepted: real floating-point parameters")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """One update of the parameters that have gradients.

        Args:
            closure: Computes these gradients, and returns the loss.
            loss: The loss, for rules that ask for it, where there is no closure.

        Returns:
            What ``closure`` returns.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = loss = closure()
        params = self._followed()
        present = [place for place, p in enumerate(params) if p.grad is not None]
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise ValueError("a gradient is sparse; accepted: dense gradients (sparse=False in an Embedding)")
        if present and self.rule.needs_loss:
            loss = self._agreed(loss, params[present[0]].device)
        for part in self._parts(params, present):
            self._update(params, part, loss if self.rule.needs_loss else None)
        return returned

    def __repr__(self) -> str:
        size = sum(value.numel() for value in self.rule.weights.values())
        return super().__repr__().replace(" (", f" ({type(self.rule).__name__} of {size} weights", 1)

    # -- parts -------------------------------------------------------------------------------------------------------

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _followed(self) -> list[Tensor]:
        """All parameters, after positions have followed them, where groups were put in another order or lost some."""
        # Positions and not the parameters themselves: trainers move what is in ``state`` to other devices.
        known, params = self._known, self._params
        if len(known) > len(params) or any(p is not before for p, before in zip(params, known, strict=False)):
            now, followed = {id(p): place for place, p in enumerate(params)}, {}
            for name, part in self.state.items():
                if left := [place for place in part["members"] if id(known[place]) in now]:
                    rest = part if len(left) == len(part["members"]) else self._piece(known, part, left)
                    followed[name] = {**rest, "members": [now[id(known[place])] for place in left]}
            self.state.clear()
            self.state.update(followed)
        self._known = params
        return params

    def _parts(self, params: Sequence[Tensor], present: Sequence[int]) -> list[Part]:
        """The parts of all parameters that have gradients, and of no others."""
        found, left = [], set(present)
        for name, part in list(self.state.items()):
            if here := [place for place in part["members"] if place in left]:
                if len(here) < len(part["members"]):
                    rest = [place for place in part["members"] if place not in left]
                    self._put(self._piece(params, part, rest))
                    part = self.state[name] = self._piece(params, part, here)
                found.append(part)
                left.difference_update(here)
        kinds: dict[Any, list[int]] = {}
        for place in sorted(left):
            kinds.setdefault((params[place].device, _precision(params[place])), []).append(place)
        return found + [self._put(self._begin(params, members)) for members in kinds.values()]

    def _put(self, part: Part) -> Part:
        # Not under a number, nor under a parameter, whose precision torch would give the state when it is loaded.
        name = next(name for name in (f"part {k}" for k in range(len(self.state) + 1)) if name not in self.state)
        self.state[name] = part  # type: ignore[index]
        return part

    def _begin(self, params: Sequence[Tensor], members: list[int]) -> Part:
        values = _values(params, members)
        layout = Layout.of(values)
        return {
            "members": members,
            "tree": self.rule.start(self._weights(params[members[0]]), layout, layout.pack(values)),
        }

    def _piece(self, params: Sequence[Tensor], part: Part, chosen: list[int]) -> Part:
        """What the rule keeps of the ``chosen`` members of a part."""
        singles = [tree.pack(self._begin(params, [place])["tree"]) for place in part["members"]]
        own = [place in chosen for place in part["members"]]
        leaves = {
            name: _chosen(name, leaf, [single[name].shape for single in singles], own)
            for name, leaf in tree.pack(part["tree"]).items()
        }
        return {"members": chosen, "tree": tree.unpack(self._begin(params, chosen)["tree"], leaves)}

    # -- the step of a part ------------------------------------------------------------------------------------------

    def _update(self, params: Sequence[Tensor], part: Part, loss: Tensor | None) -> None:
        members = part["members"]
        values, layout = _values(params, members), _layout(params, members)
        grads = {str(place): _precise(params[place].grad, params[place]) for place in members}
        like = params[members[0]]
        if loss is not None:
            loss = loss.to(like.device, _precision(like))
        packed = layout.pack(grads), part["tree"], layout.pack(values)
        with torch.autocast(like.device.type, enabled=False):
            direction_P, part["tree"] = self._direction(layout, like)(self._weights(like), layout, *packed, loss)
        moves = layout.unpack(direction_P)
        first = 0
        for group in self.param_groups:
            here = [place for place in members if first <= place < first + len(group["params"])]
            first += len(group["params"])
            if here:  # torch refuses to work on empty lists
                _descend([params[place] for place in here], [moves[str(place)] for place in here], group)

    def _direction(self, layout: Layout, like: Tensor) -> Callable[..., tuple[Tensor, Tree]]:
        if not self.compile:
            return self.rule.direction
        kind = layout, like.device, _precision(like)
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(_of_its_own(self.rule.direction), dynamic=False)
        return self._compiled[kind]

    @functools.cached_property
    def _compiled(self) -> dict[Any, Callable[..., tuple[Tensor, Tree]]]:
        return {}

    @functools.cached_property
    def _cast(self) -> dict[Any, Params]:
        return {}

    def _weights(self, like: Tensor) -> Params:
        """The rule's weights where a parameter is, in its precision."""
        kind = like.device, _precision(like)
        if kind not in self._cast:
            self._cast[kind] = {name: value.to(*kind) for name, value in self.rule.weights.items()}
        return self._cast[kind]

    def _agreed(self, loss: Any, device: torch.device) -> Tensor:
        """The loss as a tensor, the mean over all processes."""
        if loss is None:
            name = type(self.rule).__name__
            raise ValueError(
                f"{name} needs the loss, which is None; accepted: a closure that returns it, or step(loss=...)"
            )
        return mean_over_processes(torch.as_tensor(loss, device=device).detach())

    # -- copies ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "rule" the rule: class, version, settings and weights."""
        self._followed()

        def completed(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            parts = {name: dict(part) for name, part in saved["state"].items()}  # which later steps do not change
            return {**saved, "state": parts, "rule": {**describe(self.rule), "weights": dict(self.rule.weights)}}

        with self.register_state_dict_post_hook(completed, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the optimizer that ``state_dict`` is of was, bit for bit, with the weights of its rule.

        Raises:
            ValueError: It is of another optimizer or rule, of another version or other settings of it, or of other parameters.
        """
        found = []

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            state, rule = self._checked(given)
            found.append(rule)
            return {**given, "state": state}

        def take(_: Optimizer) -> None:
            self.rule, self._known = found[0], self._params
            self._forget()

        # After the hooks of others that come before it, and before those that come after.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(take, prepend=True)
        with before, after:
            super().load_state_dict(state_dict)

    def _checked(self, state_dict: dict[str, Any]) -> tuple[dict[str, Part], LearnedRule]:
        """The parts of a state dictionary on the devices of their parameters, and its rule."""
        saved, own = dict(state_dict.get("rule", {})), describe(self.rule)
        weights = saved.pop("weights", {})
        if saved != own:
            wrong = [name for name in own if saved.get(name) != own[name]]
            found, accepted = ({name: rule.get(name) for name in wrong} for rule in (saved, own))
            raise ValueError(f"the state is of a rule with {found}; accepted: {accepted}")
        state = {name: self._fitted(part) for name, part in state_dict["state"].items()}
        members = [place for part in state.values() for place in part["members"]]
        if len(members) != len(set(members)):
            raise ValueError(f"the state is of parameters {members}; accepted: none of them twice")
        return state, with_weights(self.rule, weights)

    def _fitted(self, part: Part) -> Part:
        """A part as it was saved, on the device of its parameters."""
        params, members = self._params, list(part["members"])
        if not all(0 <= place < len(params) for place in members):
            raise ValueError(f"the state is of parameters {members}; accepted: 0 ... {len(params) - 1}")
        like = self._begin(params, members)["tree"]
        try:
            kept = tree.unpack(like, tree.pack(part["tree"]))
        except ValueError as error:
            raise ValueError(f"the state is of parameters of other shapes: {error}") from error
        return {"members": members, "tree": tree.map(lambda leaf, own: leaf.to(own.dtype), kept, like)}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule, "compile": self.compile, "_known": self._followed()}

    def _forget(self) -> None:
        for name in ("_cast", "_compiled"):
            self.__dict__.pop(name, None)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean over the processes of ``torch.distributed``, which must all ask; the values themselves where there is one."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values / torch.distributed.get_world_size()
    return values


def _of_its_own(method: types.MethodType) -> types.MethodType:
    """The method with a code object of its own: what shares one is compiled eight times at most, and then not any more."""
    function = method.__func__
    assert isinstance(function, types.FunctionType)
    parts = function.__globals__, function.__name__, function.__defaults__, function.__closure__
    return types.MethodType(types.FunctionType(function.__code__.replace(), *parts), method.__self__)


def _precision(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _precise(x: Tensor | None, p: Tensor) -> Tensor:
    assert x is not None
    return x.detach().to(_precision(p))


def _values(params: Sequence[Tensor], members: Sequence[int]) -> Params:
    return {str(place): _precise(params[place], params[place]) for place in members}


def _layout(params: Sequence[Tensor], members: Sequence[int]) -> Layout:
    return Layout.of({str(place): params[place] for place in members})


def _descend(params: list[Tensor], moves: list[Tensor], group: dict[str, Any]) -> None:
    exact = [p.to(move.dtype) for p, move in zip(params, moves, strict=True)]  # half precision is rounded once
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if weight_decay:
        torch._foreach_mul_(exact, 1 - lr * weight_decay)
    torch._foreach_add_(exact, moves, alpha=-lr)
    for p, value in zip(params, exact, strict=True):
        if p is not value:
            p.copy_(value)


def _chosen(name: str, leaf: Tensor, shapes: Sequence[torch.Size], own: Sequence[bool]) -> Tensor:
    """What chosen tensors have of a leaf that all share, or whose pieces (of these ``shapes``) follow each other along one axis."""
    if all(shape == leaf.shape for shape in shapes):
        return leaf
    for axis in range(leaf.ndim):
        sizes = [shape[axis] for shape in shapes if len(shape) == leaf.ndim]
        others = leaf.shape[:axis] + leaf.shape[axis + 1 :]
        if sum(sizes) == leaf.shape[axis] and all(s[:axis] + s[axis + 1 :] == others for s in shapes):
            pieces = leaf.split(sizes, axis)
            return torch.cat([piece for piece, mine in zip(pieces, own, strict=True) if mine], axis)
    raise ValueError(
        f"{name} of the rule's state belongs to several tensors, of which some have no gradient; accepted: gradients for all"
    )
