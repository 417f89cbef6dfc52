"""Arithmetic on trees of tensors (nested dictionaries, named tuples) and calls of a module as a pure function."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from metalearn.base import Params, Tree

leaves = pytree.tree_leaves
map = pytree.tree_map


def is_floating(leaf: Any) -> bool:
    """Whether a leaf can carry a gradient."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def split(tree: Tree) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Tree]]:
    """The floating-point leaves in order, and the function that puts others in their place."""
    parts, structure = pytree.tree_flatten(tree)
    places = [place for place, leaf in enumerate(parts) if is_floating(leaf)]

    def merge(floats: Iterable[Tensor]) -> Tree:
        filled = list(parts)
        for place, leaf in zip(places, floats, strict=True):
            filled[place] = leaf
        return pytree.tree_unflatten(filled, structure)

    return [parts[place] for place in places], merge


def detach(tree: Tree) -> Tree:
    """The same values, cut from every graph."""
    return map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def zeros_like(params: Params) -> Params:
    """Zeros of the same shapes."""
    return {name: torch.zeros_like(value) for name, value in params.items()}


def add(left: Params, right: Params, factor: float | Tensor = 1.0) -> Params:
    """``left + factor right``."""
    return {name: value + factor * right[name] for name, value in left.items()}


def scale(params: Params, factor: float | Tensor) -> Params:
    """``factor params``."""
    return {name: factor * value for name, value in params.items()}


def dot(left: Params, right: Params) -> Tensor:
    """The inner product, in the parameters' precision."""
    products = [(value * right[name]).sum() for name, value in left.items()]
    return torch.stack(products).sum() if products else torch.zeros(())


def norm(params: Params) -> Tensor:
    """The Euclidean norm over all entries."""
    return dot(params, params).sqrt()


def ravel(params: Params) -> tuple[Tensor, Callable[[Tensor], Params]]:
    """All entries as one vector (P,), and the way back, which takes any leading axes: (..., P)."""
    shapes = {name: value.shape for name, value in params.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def unravel(vector: Tensor) -> Params:
        pieces = vector.split(sizes, -1)
        return {
            name: piece.reshape(vector.shape[:-1] + shape)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    return torch.cat([value.reshape(-1) for value in params.values()]), unravel


def stack(trees: list[Tree]) -> Tree:
    """One tree whose leaves have a new first axis."""
    return map(lambda *same: torch.stack(same), *trees)


def index(tree: Tree, chosen: Any) -> Tree:
    """``leaf[chosen]`` of every leaf."""
    return map(lambda leaf: leaf[chosen], tree)


def pack(tree: Tree) -> dict[str, Tensor]:
    """The leaves by path ("inner/params/0.weight"), as checkpoints hold them."""
    return {_path(place): leaf for place, leaf in pytree.tree_flatten_with_path(tree)[0]}


def unpack(like: Tree, packed: dict[str, Tensor]) -> Tree:
    """The tree of ``like``'s structure with the leaves that ``pack`` made; ``ValueError`` where names or shapes differ."""
    named, structure = pytree.tree_flatten_with_path(like)
    wanted = {_path(place): leaf for place, leaf in named}
    if differing := wanted.keys() ^ packed.keys():
        raise ValueError(
            f"the saved state has other parts: {', '.join(sorted(differing))}; accepted: the same problem and estimator"
        )
    for name, leaf in wanted.items():
        if leaf.shape != packed[name].shape:
            raise ValueError(f"{name} is saved as {tuple(packed[name].shape)}; accepted: {tuple(leaf.shape)}")
    return pytree.tree_unflatten([packed[name].to(leaf.device) for name, leaf in wanted.items()], structure)


def _path(place: tuple) -> str:
    return "/".join(str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", None)))) for step in place)


def devices(tensor: Tensor) -> list[torch.device]:
    """The GPU that a tensor is on, if any, as ``fork_rng`` wants it."""
    return [tensor.device] if tensor.is_cuda else []


@contextmanager
def seeded(key: Tensor) -> Iterator[None]:
    """torch's global generators, of the CPU and of the key's device, set by the key, and put back afterwards."""
    with torch.random.fork_rng(devices(key)):
        seed = int(key)
        # torch.manual_seed would write down for every device that is not in use from where it was called.
        torch.default_generator.manual_seed(seed)
        if key.is_cuda:
            torch.cuda.default_generators[key.device.index].manual_seed(seed)
        yield


def draws(module: nn.Module) -> bool:
    """Whether a module in training mode draws from torch's global generator.

    What draws is dropout, by itself or within attention, transformer layers and recurrent cells, and RReLU; in parts that
    are in evaluation mode nothing does. A module of one's own is known by its submodules, or by a rate called ``dropout``.
    """
    return any(_draws(part) for part in module.modules() if part.training)


def _draws(part: nn.Module) -> bool:
    rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
    return isinstance(part, nn.RReLU) or (isinstance(rate, float | int) and rate > 0)


_borrowed = threading.RLock()  # one thread at a time puts another batch norm into torch


def call(module: nn.Module, params: Params, buffers: Params, *inputs: Any) -> tuple[Any, Params]:
    """The module's output with these parameters and buffers, and the buffers after; nothing that is passed is changed.

    Buffers are taken as constants: torch's batch norm refuses statistics that carry a gradient.
    """
    after = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    if not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return torch.func.functional_call(module, params | after, inputs), after
    with _borrowed, patch.object(functional, "batch_norm", _batch_norm):
        return torch.func.functional_call(module, params | after, inputs), after


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``functional.batch_norm`` in elementary operations.

    torch 2.13's own has a wrong second derivative under ``vmap``, without saying so, and no forward mode of its gradient.

    Raises:
        ValueError: in training, one value per channel, which has no variance.
    """
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean, var = running_mean, running_var
    if training or mean is None or var is None:
        mean, var = x.mean(axes), x.var(axes, correction=0)
        if training and running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            running_mean.mul_(1 - momentum).add_(momentum * mean.detach())
            running_var.mul_(1 - momentum).add_(momentum * count / (count - 1) * var.detach())
    normal = (x - mean.reshape(shape)) * (var.reshape(shape) + eps).rsqrt()
    normal = normal if weight is None else normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def initialise(module: nn.Module, key: Tensor) -> tuple[Params, Params]:
    """Parameters and buffers drawn anew by every submodule's own ``reset_parameters``, from the key alone.

    Parameters that no ``reset_parameters`` sets are those that the module was built with.
    """
    own = [value.detach() for value in (*module.parameters(), *module.buffers())]
    saved = [value.clone() for value in own]
    with seeded(key), torch.no_grad():
        for part in module.modules():
            for name in ("reset_parameters", "_reset_parameters"):  # the latter is that of torch's attention
                if callable(reset := getattr(part, name, None)):
                    reset()
        params = {name: value.detach().clone() for name, value in module.named_parameters()}
        buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
        for value, before in zip(own, saved, strict=True):
            value.copy_(before)
    return params, buffers
