"""Gradients from derivatives along directions: exact forward mode, (FG)2U, its zeroth-order variant, the two-phase recipe."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from metalearn import tree
from metalearn.base import (
    Batches,
    Estimator,
    InnerProblem,
    InnerState,
    MetaGradient,
    Params,
    Tree,
    require_choice,
    require_range,
)
from metalearn.estimators.directional import Along, Directional, RandomDirections, basis, objective, randomness
from metalearn.estimators.windowed import Given, cotangent, tracked
from metalearn.unroll import Window, asks_outer, unroll

METHODS = ("forward", "central")


class ForwardMode(Directional):
    """The exact gradient, entry by entry: forward mode over the standard basis, for few meta-parameters.

    Z_{k+1} = A_k Z_k + B_k with A = d Phi/d theta, B = d Phi/d lambda; gradient = d outer/d lambda + Z_K^T d outer/d theta.
    Time N tangents, memory ``chunk`` inner states, whatever the number of steps.

    Args:
        chunk: entries taken at once, as in ``Directional``.
        warm_start: as in ``Directional``.

    Source: Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization", algorithm 2.
    """

    def indices(self, num_entries: int) -> Tensor:
        return torch.arange(num_entries)

    def draw(self, key: Tensor, indices_C: Tensor, num_entries: int) -> Tensor:
        return basis(indices_C, num_entries)


class ForwardGradient(RandomDirections):
    """(FG)2U: forward mode along b random directions, unbiased for any number of meta-parameters.

    gradient = (1/b) sum_i (d objective . v_i) v_i, each derivative one tangent pushed through the whole inner run. Relative
    error sqrt((N - 1)/b); time b tangents; memory ``chunk`` inner states, whatever the number of steps.

    Args:
        directions: b >= 1, over all ranks, and a multiple of them.
        distribution: of v, "rademacher" (entries -1 and 1: the least variance) or "gaussian".
        chunk: directions taken at once, as in ``Directional``.
        warm_start: as in ``Directional``.

    Source: Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization", section 3.
    """

    def __init__(
        self,
        directions: int = 8,
        distribution: str = "rademacher",
        chunk: int | None = None,
        warm_start: bool = False,
    ):
        super().__init__(directions, distribution, chunk, warm_start)


class ZerothOrder(RandomDirections):
    """(FG)2U without derivatives of the inner run: along each direction, a difference of whole runs with equal keys.

    "forward": (F(lambda + mu v) - F(lambda))/mu, b + 1 runs, error O(mu); "central": (F(lambda + mu v) - F(lambda - mu v))/(2 mu),
    2 b + 1 runs, error O(mu^2). Every estimate begins an episode.

    Args:
        directions: b >= 1, over all ranks, and a multiple of them.
        smoothing: mu > 0. Rounding adds an error of about (the precision of F)/mu.
        method: "forward" or "central".
        distribution: of v, "rademacher" or "gaussian".
        chain: whether only what is opaque is differenced: the end of the run (and the steps' losses), with the exact
            gradient of ``outer``, which must be differentiable, applied to it.
        chunk: directions taken at once, by ``vmap`` over the perturbed runs, >= 1; null all of them. 1 goes without
            ``vmap``, for inner solvers that it cannot batch, such as those outside torch.

    Source: Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization", section on
    zeroth-order (FG)2U. Differs from the paper: directions need not be Gaussian.
    """

    def __init__(
        self,
        directions: int = 8,
        smoothing: float = 1e-3,
        method: str = "forward",
        distribution: str = "rademacher",
        chain: bool = False,
        chunk: int | None = None,
    ):
        super().__init__(directions, distribution, chunk, warm_start=False)
        if not smoothing > 0:
            raise ValueError(f"smoothing is {smoothing!r}; accepted: smoothing > 0")
        require_choice("method", method, METHODS)
        self.smoothing, self.method, self.chain = smoothing, method, chain

    def refusal(self, problem: InnerProblem) -> str | None:
        return None

    def slope(self, given: Given) -> Callable[[Params], Along]:
        problem, meta, start, batches, key, init_key = given
        assert init_key is not None, "every estimate begins an episode"
        with torch.no_grad():
            window = unroll(problem, meta, start, batches, key)
            loss = objective(problem, window)
            measure = _linear_around(problem, window) if self.chain else functools.partial(objective, problem)
            middle = measure(window)

        def values(directions: Params, distance: float) -> Tensor:
            metas = {name: meta[name] + distance * v for name, v in directions.items()}
            return _values(problem, metas, batches, key, init_key, measure)

        def along(directions: Params) -> Along:
            central = self.method == "central"
            with torch.no_grad():
                ahead = values(directions, self.smoothing)
                behind = values(directions, -self.smoothing) if central else middle
            slopes_C = (ahead - behind) / (self.smoothing * (2 if central else 1))
            return Along(slopes_C, [], loss, window.end, window.done)

        return along


Measure = Callable[[Window], Tensor]


def _linear_around(problem: InnerProblem, window: Window) -> Measure:
    """The objective with ``outer`` replaced by its linear part around this window's end.

    Raises:
        ValueError: ``outer`` is all of the objective, and cannot be differentiated.
    """
    if problem.terminal and asks_outer(problem, window.done) and not _outer_is_differentiable(problem, window):
        raise ValueError(
            f"chain is True, but the outer of {type(problem).__name__} cannot be differentiated; accepted: chain=False"
        )
    by_outer = cotangent(problem, window)

    def measure(window: Window) -> Tensor:
        ends, _ = tree.split(window.end)
        by_end = sum((by * end).sum() for by, end in zip(by_outer.state, ends, strict=True))
        return window.loss + by_end + tree.dot(by_outer.meta, window.meta)

    return measure


def _outer_is_differentiable(problem: InnerProblem, window: Window) -> bool:
    floats, merge = tree.split(window.end)
    with torch.enable_grad():
        end = merge(leaf.detach().requires_grad_() for leaf in floats)
        return problem.outer(tracked(window.meta), end, window.batches.outer).requires_grad


def _values(
    problem: InnerProblem, metas: Params, batches: Batches, key: Tensor, init_key: Tensor, measure: Measure
) -> Tensor:
    """What is measured of one run from the start for each of C meta-parameters, with the same keys: (C,)."""

    def run(meta: Params, start: InnerState) -> Tensor:
        return measure(unroll(problem, meta, start, batches, key))

    each = [tree.index(metas, c) for c in range(len(next(iter(metas.values()))))]
    starts = [problem.init(meta, init_key) for meta in each]
    if len(each) == 1:
        return run(each[0], starts[0]).unsqueeze(0)
    # The step count is left unbatched: it is the same for all, and the inner loop asks whether the episode has ended.
    stacked = tree.stack(starts)._replace(step=starts[0].step)
    in_dims: Any = (0, InnerState(0, 0, 0, None, 0))  # pyright: ignore[reportArgumentType]
    return vmap(run, in_dims=in_dims, randomness=randomness(problem))(metas, stacked)


class TwoPhase(Estimator):
    """A cheap, biased estimator at first, an accurate one after: the biased one is good enough far from the solution.

    An inner run that goes on from one estimate to the next is handed on where both estimators warm-start and the second's
    state is that run and no more (not with ``RealTimeRecurrent`` or a reused solution). Gradients may differ in size
    between the phases, which an outer optimizer with a memory does not know. Where one
    divides "outer" examples among ranks and the other directions or pairs, only the latter is divided: the former does
    the same on every rank.

    Args:
        first: of the first ``switch`` estimates.
        second: of all others.
        switch: >= 0.

    Source: Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization", the two-phase
    paradigm.
    """

    def __init__(self, first: Estimator, second: Estimator, switch: int):
        require_range("switch", switch, 0)
        self.first, self.second, self.switch = first, second, switch

    @property
    def shards(self) -> str:
        """As ``Estimator.shards``: "outer" only where both divide outer examples."""
        return self.first.shards if self.second.shards == "outer" else self.second.shards

    def refusal(self, problem: InnerProblem) -> str | None:
        return self.first.refusal(problem) or self.second.refusal(problem)

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        self._place()
        states = {"first": self.first.init(problem, meta, key), "second": self.second.init(problem, meta, key)}
        return {"count": torch.zeros((), dtype=torch.int64), **states}

    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        self._place()
        early = int(state["count"]) < self.switch
        phase, estimator = ("first", self.first) if early else ("second", self.second)
        found = estimator.estimate(problem, meta, state[phase], batches, key)
        after = {**state, "count": state["count"] + 1, phase: found.state}
        if early:
            after["second"] = _handed_on(found.state, state["second"])
        return found._replace(state=after)

    def _place(self) -> None:
        for estimator in (self.first, self.second):
            estimator.rank, estimator.world = self.rank, self.world
            estimator.reduce = self.reduce if estimator.shards == "outer" else None


def _handed_on(giver: Tree, taker: Tree) -> Tree:
    """The giver's inner run, where the taker's state is an inner run and no more: what goes with another one would be wrong."""
    run = ("inner", "done")
    return {name: giver[name] for name in run} if giver.keys() >= set(run) == taker.keys() else taker
