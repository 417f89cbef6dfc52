"""Derivatives of a window's meta-objective along directions in meta-space, at a memory free of the number of steps.

Letters: N entries of the meta-parameters, C directions taken at once, b directions in all.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, Params, require_choice, require_range
from metalearn.estimators.windowed import Given, Outcome, Windowed, tracked
from metalearn.random import bits, fold, normal
from metalearn.unroll import Window, asks_outer, unroll

DISTRIBUTIONS = ("rademacher", "gaussian")


class Along(NamedTuple):
    """A window and its derivatives along C directions."""

    slopes_C: Tensor  # of the window's meta-objective
    end: list[Tensor]  # of the end's floating-point leaves, (C, ...) each, where they are known
    loss: Tensor
    state: InnerState  # the end itself
    done: bool


class Directional(Windowed):
    """An estimator that sums derivatives along directions, times those directions.

    Args:
        chunk: directions taken at once, by ``vmap``, >= 1; null all of them. Memory is that of as many inner states, and
            1 goes without ``vmap``, for problems that it cannot batch.
        warm_start: as in ``Windowed``; then the window's start is taken as a constant (truncation), while a fresh
            episode is differentiated through ``problem.init``, too.
    """

    def __init__(self, chunk: int | None = None, warm_start: bool = False):
        super().__init__(warm_start)
        if chunk is not None:
            require_range("chunk", chunk, 1)
        self.chunk = chunk

    @abstractmethod
    def indices(self, num_entries: int) -> Tensor:
        """Which directions this process takes: int64 (b,)."""

    @abstractmethod
    def draw(self, key: Tensor, indices_C: Tensor, num_entries: int) -> Tensor:
        """The directions of these indices, (C, N)."""

    def slope(self, given: Given) -> Callable[[Params], Along]:
        """The function that takes derivatives along directions, (C, ...) each: here forward mode."""
        problem, meta, start, batches, key, init_key = given

        def along(directions: Params) -> Along:
            by_start = through_start(problem, meta, start, init_key, directions)
            return push(problem, meta, start, batches, key, directions, by_start)

        return along

    def differentiate(self, given: Given) -> Outcome:
        meta, key, slope = given.meta, given.key, self.slope(given)
        total = torch.zeros_like(tree.ravel(meta)[0])
        indices = self.indices(len(total)).to(total.device)
        slopes = []
        for indices_C in indices.split(self.chunk or len(indices)):
            directions_CN = self.draw(fold(key, "direction"), indices_C, len(total)).to(total.dtype)
            along = slope(as_meta(meta, directions_CN))
            slopes_C1 = along.slopes_C.to(total.dtype).unsqueeze(-1)
            total = total + (slopes_C1 * directions_CN).sum(0)  # a matrix product would be autocast
            slopes.append(along.slopes_C)
        grad = as_meta(meta, total * self.weight(len(indices)))
        return Outcome(grad, along.loss, along.state, along.done, self.diagnostics(torch.cat(slopes)))

    def weight(self, num_directions: int) -> float:
        """What the sum over directions is multiplied by."""
        return 1.0

    def diagnostics(self, slopes: Tensor) -> dict[str, Tensor]:
        """What the slopes (b,) tell beside the gradient."""
        return {}


class RandomDirections(Directional):
    """An unbiased estimate from b random directions: the mean over i of (derivative along v_i) v_i, E v v^T = 1.

    Relative root-mean-square error sqrt((N - 1)/b) for Rademacher directions, sqrt((N + 1)/b) for Gaussian ones.
    Direction i depends on the key and i alone; the ranks of a distributed run take equal shares of the indices.
    """

    shards: ClassVar[str] = "directions"

    def __init__(self, directions: int, distribution: str, chunk: int | None, warm_start: bool):
        super().__init__(chunk, warm_start)
        require_range("directions", directions, 1)
        require_choice("distribution", distribution, DISTRIBUTIONS)
        self.directions, self.distribution = directions, distribution

    def indices(self, num_entries: int) -> Tensor:
        share, rest = divmod(self.directions, self.world)
        if rest:
            raise ValueError(f"directions is {self.directions}; accepted: a multiple of the {self.world} ranks")
        return torch.arange(share) + share * self.rank

    def draw(self, key: Tensor, indices_C: Tensor, num_entries: int) -> Tensor:
        keys_C = fold(key, indices_C)
        return normal(keys_C, (num_entries,)) if self.distribution == "gaussian" else signs(keys_C, num_entries)

    def weight(self, num_directions: int) -> float:
        return 1 / num_directions

    def diagnostics(self, slopes: Tensor) -> dict[str, Tensor]:
        """The root of the slopes' mean square, which is unbiased for |gradient|^2, while the estimate's own norm is too large."""
        return {"gradient_norm": slopes.square().mean().sqrt()}


def objective(problem: InnerProblem, window: Window) -> Tensor:
    """The window's meta-objective: its steps' losses, and ``outer`` where the window asks for it."""
    if not asks_outer(problem, window.done):
        return window.loss
    return window.loss + problem.outer(window.meta, window.end, window.batches.outer)


def push(
    problem: InnerProblem,
    meta: Params,
    start: InnerState,
    batches: Batches,
    key: Tensor,
    directions: Params,
    by_start: list[Tensor],
) -> Along:
    """Forward mode through a window: along C directions of ``meta``, with the tangents of the start that go with them.

    Args:
        problem: whose steps can be differentiated.
        meta: the meta-parameters.
        start: the state before the first step.
        batches: the window's data.
        key: of the window's steps.
        directions: in the shape of ``meta``, (C, ...) each. A single one needs no batching rules.
        by_start: tangents of the start's floating-point leaves, (C, ...) each.
    """
    floats, merge = tree.split(start)

    def run(
        meta: Params, floats: list[Tensor]
    ) -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, InnerState, Tensor]]:
        window = unroll(problem, meta, merge(floats), batches, key)
        loss = objective(problem, window)
        return (loss, tree.split(window.end)[0]), (loss, window.end, torch.full((), window.done))

    def along(directions: Params, by_start: list[Tensor]) -> tuple[tuple[Tensor, list[Tensor]], tuple]:
        found = jvp(run, (meta, floats), (directions, by_start), has_aux=True)
        return found[1], found[-1]

    with torch.no_grad():
        if len(next(iter(directions.values()))) == 1:
            tangents, values = along(*tree.index((directions, by_start), 0))
            slopes_C, by_end = tree.map(lambda leaf: leaf.unsqueeze(0), tangents)
        else:
            batched = vmap(along, out_dims=(0, None), randomness=randomness(problem))  # pyright: ignore[reportArgumentType]
            (slopes_C, by_end), values = batched(directions, by_start)
    loss, end, done = values
    return Along(slopes_C, by_end, loss, end, bool(done))


def through_start(
    problem: InnerProblem, meta: Params, start: InnerState, init_key: Tensor | None, directions: Params
) -> list[Tensor]:
    """Tangents of the start's floating-point leaves, (C, ...) each; zeros unless ``init`` made the start from ``meta``."""
    num_directions = len(next(iter(directions.values())))
    if init_key is None or not _depends(problem, meta, init_key):
        return [leaf.new_zeros(num_directions, *leaf.shape) for leaf in tree.split(start)[0]]

    def floats(meta: Params) -> list[Tensor]:
        return tree.split(problem.init(meta, init_key))[0]

    # One by one: ``init`` need not have batching rules.
    with torch.no_grad():
        return tree.stack([jvp(floats, (meta,), (tree.index(directions, c),))[1] for c in range(num_directions)])


def _depends(problem: InnerProblem, meta: Params, init_key: Tensor) -> bool:
    """Whether any floating-point leaf of the first state is computed from the meta-parameters."""
    with torch.enable_grad():
        floats, _ = tree.split(problem.init(tracked(meta), init_key))
    return any(leaf.requires_grad for leaf in floats)


def randomness(problem: InnerProblem) -> str:
    """How ``vmap`` treats draws from torch's global generator: equal for all, or an error where none are declared."""
    return "same" if problem.global_generator else "error"


def basis(indices_C: Tensor, num_entries: int) -> Tensor:
    """Rows of the unit matrix: int64 (C, N)."""
    return torch.nn.functional.one_hot(indices_C, num_entries)


def signs(key: Tensor, count: int) -> Tensor:
    """``count`` random signs for each key, float32 -1 or 1: (*key.shape, count)."""
    return 1.0 - 2.0 * (bits(key, count) < 0)


def as_meta(meta: Params, vectors: Tensor) -> Params:
    """Vectors (..., N) in the shapes and precisions of the meta-parameters."""
    return {name: part.to(meta[name].dtype) for name, part in tree.ravel(meta)[1](vectors).items()}
