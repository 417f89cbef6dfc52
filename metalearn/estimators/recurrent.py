"""Online gradients for endless or long inner runs with tiny states: how the state depends on ``meta`` is carried along.

With s' = F(s, lambda) the inner step, J = d s/d lambda follows J' = (dF/ds) J + dF/dlambda from window to window, and every
step's loss is credited at once. Exact for a fixed lambda; where lambda changes between windows, J is of the changed past.
"""

import copy
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, MetaGradient, Params, StepOutput, Tree, require_range
from metalearn.estimators.directional import as_meta, basis, push, signs, through_start
from metalearn.estimators.windowed import Given, Outcome, Windowed, cotangent, gradients, tracked
from metalearn.random import fold
from metalearn.unroll import advance, differentiable_kernels, unroll

EPSILON = 1e-7


class Online(Windowed):
    """An estimator whose inner run goes on, with what it knows of the state's dependence on ``meta`` carried along."""

    carry: Tree = None

    def __init__(self) -> None:
        super().__init__(warm_start=True)

    @abstractmethod
    def begin_carry(self, problem: InnerProblem, meta: Params, start: InnerState, init_key: Tensor) -> Tree:
        """What is carried at an episode's start, ``problem.init(meta, init_key)``."""

    @abstractmethod
    def follow(
        self, problem: InnerProblem, meta: Params, start: InnerState, carry: Tree, batches: Batches, key: Tensor
    ) -> tuple[Outcome, Tree]:
        """The window's meta-gradient, and what is carried after it."""

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        state, meta = super().init(problem, meta, key), tree.detach(meta)
        with differentiable_kernels():
            carry = self.begin_carry(problem, meta, state["inner"], fold(key, "episode"))
        return {**state, "carry": carry}

    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        window = copy.copy(self)  # holds the carry of this one estimate, so that the estimator itself is not changed
        window.carry = state["carry"]
        found = super(Online, window).estimate(problem, meta, state, batches, key)
        return found._replace(state={**found.state, "carry": tree.detach(window.carry)})

    def differentiate(self, given: Given) -> Outcome:
        problem, meta, start, batches, key, init_key = given
        carry = self.carry if init_key is None else self.begin_carry(problem, meta, start, init_key)
        outcome, self.carry = self.follow(problem, meta, start, carry, batches, key)
        return outcome


class RealTimeRecurrent(Online):
    """RTRL: J is carried whole, N inner states, so that windows of any length add up to the gradient of the episode.

    J' = (dF/ds) J + dF/dlambda; gradient = sum over steps of (dl/ds) J + dl/dlambda, l a step's loss (``outer`` at the
    episode's end counts as one). Time N tangents a step.

    Args:
        chunk: columns of J taken through a window at once, >= 1; null all of them.

    Source: Williams and Zipser 1989, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks".
    """

    def __init__(self, chunk: int | None = None):
        super().__init__()
        if chunk is not None:
            require_range("chunk", chunk, 1)
        self.chunk = chunk

    def begin_carry(self, problem: InnerProblem, meta: Params, start: InnerState, init_key: Tensor) -> Tree:
        num_entries = len(tree.ravel(meta)[0])
        directions = as_meta(meta, basis(torch.arange(num_entries, device=start.step.device), num_entries))
        return through_start(problem, meta, start, init_key, directions)

    def follow(
        self, problem: InnerProblem, meta: Params, start: InnerState, carry: Tree, batches: Batches, key: Tensor
    ) -> tuple[Outcome, Tree]:
        num_entries = len(tree.ravel(meta)[0])
        pushed = []
        for indices_C in torch.arange(num_entries, device=start.step.device).split(self.chunk or num_entries):
            directions = as_meta(meta, basis(indices_C, num_entries))
            pushed.append(push(problem, meta, start, batches, key, directions, tree.index(carry, indices_C)))
        grad = as_meta(meta, torch.cat([along.slopes_C for along in pushed]))
        columns = [torch.cat(leaves) for leaves in zip(*(along.end for along in pushed), strict=True)]
        last = pushed[-1]
        return Outcome(grad, last.loss, last.state, last.done, {}), columns


class RankOne(NamedTuple):
    """J ~ (state) (meta)^T."""

    state: list[Tensor]  # by the floating-point leaves of the inner state
    meta: Params


class UnbiasedOnlineRecurrent(Online):
    """UORO: J is replaced by a product of two vectors whose expectation it is; as cheap as the inner run, and noisy.

    With J ~ s t^T and random signs nu: s' = rho_0 (dF/ds) s + rho_1 nu and t' = t / rho_0 + (nu^T dF/dlambda) / rho_1, where
    rho_0 = sqrt(|t| / |(dF/ds) s|) and rho_1 = sqrt(|nu^T dF/dlambda| / |nu|) keep the noise small. Each step adds
    (dl/ds . s) t + dl/dlambda. Unbiased, but the variance grows with the number of entries of the state, and the noise is
    as large in every entry: a state with entries that the next step is very sensitive to, such as the second moments
    of Adam, drowns in it.

    Source: Tallec and Ollivier 2017, "Unbiased Online Recurrent Optimization", algorithm 1, with its epsilon of 1e-7.
    Differs from the paper: what a run is given and never changes (``extra``) takes no noise, its own derivative being 0.
    """

    def begin_carry(self, problem: InnerProblem, meta: Params, start: InnerState, init_key: Tensor) -> Tree:
        noise = draw_signs(fold(init_key, "signs"), tree.split(start)[0])
        with torch.enable_grad():
            leaves = tracked(meta)
            floats, _ = tree.split(problem.init(leaves, init_key))
        by_meta = _by(leaves, floats, noise)
        nothing = RankOne([torch.zeros_like(leaf) for leaf in noise], tree.zeros_like(meta))
        return _mix(nothing, noise, by_meta)

    def follow(
        self, problem: InnerProblem, meta: Params, start: InnerState, carry: Tree, batches: Batches, key: Tensor
    ) -> tuple[Outcome, Tree]:
        factors, total = carry, tree.zeros_like(meta)

        def step(
            problem: InnerProblem, meta: Params, state: InnerState, batches: Batches, key: Tensor, k: int
        ) -> tuple[InnerState, StepOutput]:
            nonlocal factors, total
            noise = _step_noise(fold(key, "signs", k), state)
            moved, slope = _tangent(problem, meta, state, batches, key, k, factors.state)
            with torch.enable_grad():
                leaves = tracked(meta)
                following, output = advance(problem, leaves, state, batches, key, k)
                floats, _ = tree.split(following)
            total = tree.add(tree.add(total, factors.meta, slope), _by(leaves, [output.loss]))
            factors = _mix(RankOne(moved, factors.meta), noise, _by(leaves, floats, noise))
            return tree.detach(following), tree.detach(output)

        with torch.no_grad():
            window = unroll(problem, meta, start, batches, key, step=step)
        by_outer = cotangent(problem, window)
        slope = _inner(by_outer.state, factors.state)
        total = tree.add(tree.add(total, factors.meta, slope), by_outer.meta)
        return Outcome(total, by_outer.loss, window.end, window.done, {}), factors


def draw_signs(key: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """A random sign for every entry of the leaves."""
    drawn = signs(key, sum(leaf.numel() for leaf in leaves)).split([leaf.numel() for leaf in leaves])
    return [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(drawn, leaves, strict=True)]


def _step_noise(key: Tensor, state: InnerState) -> list[Tensor]:
    floats, merge = tree.split(state)
    noise = merge(draw_signs(key, floats))
    return tree.split(noise._replace(extra=tree.map(torch.zeros_like, noise.extra)))[0]


def _tangent(
    problem: InnerProblem,
    meta: Params,
    state: InnerState,
    batches: Batches,
    key: Tensor,
    k: int,
    along: list[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Derivatives of the k-th step's floating-point leaves, and of its loss, along a direction of the state."""
    floats, merge = tree.split(state)

    def run(floats: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        following, output = advance(problem, meta, merge(floats), batches, key, k)
        return tree.split(following)[0], output.loss

    return jvp(run, (floats,), (along,))[1]


def _by(meta: Params, outputs: list[Tensor], cotangents: list[Tensor] | None = None) -> Params:
    pulled = gradients(outputs, list(meta.values()), cotangents, keep_graph=True)
    return dict(zip(meta, pulled, strict=True))


def _mix(moved: RankOne, noise: list[Tensor], by_meta: Params) -> RankOne:
    """Two products of two vectors as one, in expectation over the signs of ``noise``, on which ``by_meta`` depends linearly."""
    rho_0 = (tree.norm(moved.meta) / (_norm(moved.state) + EPSILON)).sqrt() + EPSILON
    rho_1 = (tree.norm(by_meta) / (_norm(noise) + EPSILON)).sqrt() + EPSILON
    by_state = [rho_0 * along + rho_1 * sign for along, sign in zip(moved.state, noise, strict=True)]
    return RankOne(by_state, tree.add(tree.scale(moved.meta, 1 / rho_0), by_meta, 1 / rho_1))


def _norm(leaves: list[Tensor]) -> Tensor:
    return _inner(leaves, leaves).sqrt()


def _inner(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
