"""Two optimizers over the same parameters that are one optimizer to everything else."""

import contextlib
from abc import abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from metalearn import tree

LEARNED, GUARD = "learned", "guard"
Closure = Callable[[], Any]
Grads = list[Tensor | None]


class Guarded(Optimizer):
    """What the guards have in common.

    ``param_groups`` are those of ``learned`` and after them those of ``guard``, which there have no parameters: schedulers
    change the rates of both, and clipping meets each gradient once.

    What a closure changes besides gradients, such as running statistics of batch norm, sees both points. Gradients that are
    added up over several batches before a step would mix the points, and are refused. ``GradScaler`` passes no closure on, so
    that float16 cannot be guarded. Optimizers that keep more than gradients
    need at a step outside their ``state`` and their groups cannot be guarded; what they keep in groups follows their own steps
    alone.
    """

    counters: ClassVar[tuple[str, ...]]  # names of attributes that are numbers, texts or dictionaries of these

    def __init__(self, learned: Optimizer, guard: Optimizer):
        for name, optimizer in (("learned", learned), ("guard", guard)):
            if not isinstance(optimizer, Optimizer):
                raise ValueError(f"{name} is {optimizer!r}; accepted: a torch.optim.Optimizer")
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("an optimizer is LBFGS; accepted: those that need one gradient a step")
        if learned is guard:
            raise ValueError("learned and guard are the same object; accepted: two optimizers over the same tensors")
        if {id(p) for p in params_of(learned)} != {id(p) for p in params_of(guard)}:
            raise ValueError("learned and guard have other parameters; accepted: two optimizers over the same tensors")
        self.learned, self.guard = learned, guard
        super().__init__(learned.param_groups, {})
        self._share_groups()
        self._left: list[tuple[Tensor | None, int]] = [(None, 0)] * len(params_of(learned))

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Both, by the names of their branches."""
        return {LEARNED: self.learned, GUARD: self.guard}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if len(self.param_groups) >= len(self.learned.param_groups):
            raise ValueError(
                "a group is added to a guard; accepted: groups that both optimizers have before they are guarded"
            )
        super().add_param_group(param_group)

    def step(self, closure: Closure | None = None) -> Any:
        """One step; what the closure raises is raised again, with the parameters and both states as they were before.

        Args:
            closure: Computes the gradients, and returns the loss.

        Returns:
            What ``closure`` returned at the point that the parameters had.

        Raises:
            ValueError: There is no closure, or it returns no number, or there are gradients from before.
        """
        evaluate = self._evaluation(closure)
        if self._accumulated():
            raise ValueError(
                "there are gradients from before the step, as accumulation over batches leaves them; accepted: a closure that "
                "computes the whole gradient, and zero_grad after any other backward"
            )
        with self._cleared(), torch.no_grad():
            return self._step(evaluate)

    @contextlib.contextmanager
    def _cleared(self) -> Iterator[None]:
        """Without gradients afterwards where something is raised: what there is may be of either point."""
        try:
            yield
        except BaseException:
            self.zero_grad()
            raise
        finally:
            self._remember()

    def _evaluation(self, closure: Closure | None) -> Closure:
        """The closure, which begins without gradients, turns them on for itself and must return a loss."""
        if closure is None:
            raise ValueError("closure is None; accepted: a function that computes the gradients and returns the loss")

        def evaluate() -> Any:
            for p in params_of(self.learned):  # one that does not zero them would add to those of the other point
                p.grad = None
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Real) and not (isinstance(loss, Tensor) and loss.numel() == 1):
                raise ValueError(f"closure returns {loss!r}; accepted: the loss, a number or a tensor of one")
            return loss

        return evaluate

    def _remember(self) -> None:
        """The gradients that a step leaves behind, and their versions, which go up when they are written into."""
        self._left = [(p.grad, 0 if p.grad is None else p.grad._version) for p in params_of(self.learned)]

    def _accumulated(self) -> bool:
        """Whether gradients have come since the last step that nobody has zeroed."""
        pairs = zip(params_of(self.learned), self._left, strict=True)
        new = [
            p.grad
            for p, (grad, version) in pairs
            if p.grad is not grad or (grad is not None and grad._version != version)
        ]
        return any(grad is not None and bool(grad.any()) for grad in new)

    @abstractmethod
    def _step(self, closure: Closure) -> Any:
        """A step, with a closure that turns gradients on for itself."""

    # -- points ------------------------------------------------------------------------------------------------------

    def _point(self) -> list[Tensor]:
        return [p.detach().clone() for p in params_of(self.learned)]

    def _move(self, point: Sequence[Tensor]) -> None:
        for p, value in zip(params_of(self.learned), point, strict=True):
            p.copy_(value)

    def _grads(self) -> Grads:
        # Copies: the next closure may zero these tensors, or write into them, as buckets of DistributedDataParallel do.
        params = params_of(self.learned)
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise ValueError("a gradient is sparse; accepted: dense gradients (sparse=False in an Embedding)")
        return [None if p.grad is None else p.grad.clone() for p in params]

    def _set_grads(self, grads: Grads) -> None:
        # Before every step, since some optimizers write into gradients, as torch's SGD with nesterov does on a GPU.
        for p, grad in zip(params_of(self.learned), grads, strict=True):
            if grad is None or p.grad is None:
                p.grad = None if grad is None else grad.clone()
            else:
                p.grad.copy_(grad)

    @contextlib.contextmanager
    def _draws_to_repeat(self) -> Iterator[None]:
        """Afterwards, torch's generators are where they were before."""
        devices = {p.device for p in params_of(self.learned) if p.is_cuda}
        with torch.random.fork_rng(sorted(devices, key=str)):
            yield

    # -- copies ------------------------------------------------------------------------------------------------------

    def _share_groups(self) -> None:
        self.param_groups = [*self.learned.param_groups, *(_Settings(group) for group in self.guard.param_groups)]  # type: ignore

    def state_dict(self) -> dict[str, Any]:
        """All there is, in the middle of a period, too, in tensors and builtins."""
        with self.register_state_dict_post_hook(lambda _, saved: {**saved, "state": self._saved()}, prepend=True):
            return super().state_dict()

    def _saved(self) -> dict[str, Any]:
        inner = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        own = {name: tree.map(lambda leaf: leaf, getattr(self, name)) for name in self.counters}
        return {**inner, **own, "shapes": self._shapes()}

    def _shapes(self) -> list[list[int]]:
        return [list(p.shape) for p in params_of(self.learned)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the guard that ``state_dict`` is of was, bit for bit, with the parameters that it had.

        Raises:
            ValueError: It is of another kind, or of other optimizers.
        """
        state = {}

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check(given["state"])
            state.update(given["state"])
            return {**given, "state": {}}

        def load(_: Optimizer) -> None:
            try:
                self._load(state)
            finally:
                self._share_groups()

        # After the hooks of others that come before it, and before those that come after.
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(load, prepend=True)
        with before, after:
            super().load_state_dict(state_dict)

    def _check(self, state: dict[str, Any]) -> None:
        if lacking := {LEARNED, GUARD, "shapes", *self.counters} - state.keys():
            raise ValueError(f"the state lacks {sorted(lacking)}; accepted: that of a {type(self).__name__}")
        if state["shapes"] != self._shapes():
            raise ValueError(f"the state is of parameters of shapes {state['shapes']}; accepted: {self._shapes()}")

    def _load(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        for name in self.counters:
            setattr(self, name, tree.map(lambda leaf: leaf, state[name]))

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a step of its own into the object, and torch's hooks are not copied, as in torch's optimizers.
        return {name: value for name, value in self.__dict__.items() if name != "step" and not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remember()


class _Settings(UserDict):
    """A group of the guard's, the same dictionary, without its parameters."""

    def __init__(self, group: dict[str, Any]):
        self.data = group

    def __getitem__(self, key: str) -> Any:
        return [] if key == "params" else self.data[key]


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def copied_state(state: dict[Any, Any]) -> dict[Any, Any]:
    """An optimizer's state, which it will change in place."""
    return {
        key: tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
        for key, value in state.items()
    }


def copied_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What an optimizer's groups have besides parameters: settings, and what some keep there."""
    # Lists and the like stay what they are: they may hold views of a tensor beside them.
    return [
        {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def set_settings(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    """Give an optimizer's groups these settings; tensors stay the same objects."""
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        for name in group.keys() - before.keys() - {"params"}:
            del group[name]
        for name, value in before.items():
            if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                group[name].copy_(value)
            else:
                group[name] = value


def set_state(optimizer: Optimizer, state: dict[Any, Any]) -> None:
    """Give an optimizer the state of each parameter, in the dictionary that it has."""
    optimizer.state.clear()
    optimizer.state.update(state)
