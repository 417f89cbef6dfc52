"""Backpropagation through the inner run: exact for its K steps, in four ways that differ in memory and time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from metalearn import tree
from metalearn.base import (
    Batches,
    InnerProblem,
    InnerState,
    Params,
    Response,
    StepOutput,
    Tree,
    require_choice,
    require_range,
)
from metalearn.estimators.windowed import Given, Outcome, Responsive, cotangent, gradients, through_init, tracked
from metalearn.random import fold
from metalearn.unroll import (
    Step,
    Window,
    advance,
    asks_outer,
    differentiable_kernels,
    ended,
    inner_gradient,
    seeded,
    unroll,
    update,
)

MODES = ("graph", "store", "checkpoint", "mixed")


class Unrolled(Responsive):
    """Reverse mode through a window of K inner steps theta_{k+1} = Phi_k(theta_k, lambda).

    alpha_K = d outer/d theta_K; then for k = K-1 … 0: h += (d Phi_k/d lambda)^T alpha_{k+1} and
    alpha_k = (d Phi_k/d theta_k)^T alpha_{k+1}, with each step's own loss added where it has one. The states hold more
    than parameters, momenta for one; all of it is differentiated through but a module's buffers.

    With P floats in a state, A in a step's activations and F the time of the inner run:

    - "graph": one autograd graph of the whole window; time 2.4 F, memory K A.
    - "store": the states are kept, and each step is run again for its own vector-Jacobian product; F more, memory K P + A.
    - "checkpoint": every ceil(sqrt K)-th state is kept; F more again, memory 2 sqrt(K) P + A.
    - "mixed": as "store", but a step's products are one gradient of a directional derivative, reverse over forward:
      (d/d theta, d/d lambda) of ``jvp(inner_loss)`` along the cotangent of the step's own gradient, since the Hessian is
      symmetric. The rule's own Jacobian comes from that gradient, which is kept too; memory 2 K P and less than A.
      Needs a problem whose step is its rule on the gradient of ``inner_loss``, and a terminal objective.

    Args:
        mode: one of "graph", "store", "checkpoint", "mixed".
        truncate: T >= 1 differentiates through the last T steps of the window only (a bias of order (1 - eta mu)^T);
            null through all.
        warm_start: as in ``Windowed``; then differentiation stops at the window's start (truncated backpropagation
            where an episode has several windows).
        compile: whether ``torch.compile`` fuses a step and its products, in mode "mixed" only: a minute at the first
            estimate, and again for every new shape. What it cannot trace is an error, batch norm for one.

    Source: Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization", algorithm 1;
    "checkpoint" Griewank and Walther 2000; "mixed" Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode
    Differentiation". Differs from the last: reverse over forward, which spares the gradient itself, where theirs is
    forward over reverse.
    """

    def __init__(
        self, mode: str = "store", truncate: int | None = None, warm_start: bool = False, compile: bool = False
    ):
        super().__init__(warm_start)
        require_choice("mode", mode, MODES)
        if truncate is not None:
            require_range("truncate", truncate, 1)
        if compile:
            require_choice("mode with compile", mode, ("mixed",))
        self.mode, self.truncate, self.compile = mode, truncate, compile
        self._descend = torch.compile(_descend, fullgraph=True, dynamic=False) if compile else _descend
        self._pull = torch.compile(_pull_mixed, fullgraph=True, dynamic=False) if compile else _pull_mixed

    def refusal(self, problem: InnerProblem) -> str | None:
        if (reason := super().refusal(problem)) or self.mode != "mixed":
            return reason
        if problem.rule is None or not problem.has_inner_loss:
            return "mixed mode needs a step that is a rule applied to the gradient of an inner_loss"
        if problem.rule.needs_loss:
            return "mixed mode gives the rule no loss, which this one needs"
        if self.compile and problem.global_generator:
            return "its steps draw from torch's global generator (dropout does), and compiled code draws other numbers"
        return None if problem.terminal else "mixed mode differentiates inner_loss only, and its steps have losses too"

    def differentiate(self, given: Given) -> Outcome:
        if self.mode == "graph":
            return self._through_graph(given)
        problem, meta, start, batches, key, init_key = given
        window = self.run(problem, meta, start, batches, key)
        by_outer = cotangent(problem, window)
        by_steps, by_start = self.pull(problem, window, by_outer.state, 0.0 if problem.terminal else 1.0)
        total = tree.add(by_outer.meta, by_steps)
        if init_key is not None and 0 in window.states:
            total = tree.add(total, through_init(problem, meta, init_key, by_start))
        return Outcome(total, by_outer.loss, window.end, window.done, {})

    def _through_graph(self, given: Given) -> Outcome:
        problem, meta, start, batches, key, init_key = given
        with torch.enable_grad():
            meta = tracked(meta)
            start = start if init_key is None else problem.init(meta, init_key)
            window = unroll(problem, meta, start, batches, key, step=self._graph_step(batches.steps))
            loss = window.loss
            if asks_outer(problem, window.done):
                loss = loss + problem.outer(meta, window.end, batches.outer)
        grads = dict(zip(meta, gradients([loss], list(meta.values())), strict=True))
        return Outcome(grads, loss, window.end, window.done, {})

    def run(self, problem: InnerProblem, meta: Params, start: InnerState, batches: Batches, key: Tensor) -> Window:
        if self.mode == "graph":
            with torch.enable_grad():
                return unroll(problem, tracked(meta), start, batches, key, step=self._graph_step(batches.steps))
        first, grads = self._first(batches.steps), {}
        every = math.isqrt(batches.steps - 1) + 1 if self.mode == "checkpoint" else 1
        step = _recording(grads, self._descend) if self.mode == "mixed" else advance
        with torch.no_grad():
            window = unroll(problem, meta, start, batches, key, lambda k: k >= first and (k - first) % every == 0, step)
        return window._replace(grads=grads)

    def response(self, problem: InnerProblem, window: Window) -> Response:
        return _UnrolledResponse(self, problem, window)

    def pull(
        self, problem: InnerProblem, window: Window, by_end: list[Tensor], loss_weight: float
    ) -> tuple[Params, list[Tensor]]:
        """Take cotangents of the end, and of the steps' summed losses, back to ``meta`` and to the first state kept."""
        total, steps = tree.zeros_like(window.meta), window.batches.steps
        pull_step = self._pull_mixed if self.mode == "mixed" else _pull_stored
        with differentiable_kernels():
            for begin in sorted(window.states.keys() - {steps}, reverse=True):
                for k, state in reversed(_segment(problem, window, begin)):
                    grads, by_end = pull_step(problem, window, state, k, by_end, loss_weight)
                    total = tree.add(total, grads)
        return total, by_end

    def _pull_mixed(
        self,
        problem: InnerProblem,
        window: Window,
        state: InnerState,
        k: int,
        by_next: list[Tensor],
        loss_weight: float,
    ) -> tuple[Params, list[Tensor]]:
        assert loss_weight == 0, "mixed mode is refused where steps have losses"
        batch, step_key = window.batches.inner(k), fold(window.key, k)
        with seeded(problem, step_key), torch.no_grad():
            return self._pull(problem, window.meta, state, window.grads[k], batch, step_key, by_next)

    def _first(self, steps: int) -> int:
        """The first step that is differentiated."""
        return 0 if self.truncate is None else max(0, steps - self.truncate)

    def _graph_step(self, steps: int) -> Step:
        """A step that cuts the graph before the first step that is differentiated."""
        cut = self._first(steps)

        def step(
            problem: InnerProblem, meta: Params, state: InnerState, batches: Batches, key: Tensor, k: int
        ) -> tuple[InnerState, StepOutput]:
            if k < cut:
                return tree.detach(advance(problem, tree.detach(meta), tree.detach(state), batches, key, k))
            return advance(problem, meta, tree.detach(state) if 0 < k == cut else state, batches, key, k)

        return step


class _UnrolledResponse(Response):
    def __init__(self, estimator: Unrolled, problem: InnerProblem, window: Window):
        self.estimator, self.problem, self.window = estimator, problem, window

    def vjp(self, cotangent: Params) -> Params:
        window, meta = self.window, self.window.meta
        if self.estimator.mode == "graph":
            ends = [window.end.params[name] for name in cotangent]
            pulled = gradients(ends, list(meta.values()), list(cotangent.values()), keep_graph=True)
            return dict(zip(meta, pulled, strict=True))
        zeros = tree.map(torch.zeros_like, window.end)
        by_end, _ = tree.split(zeros._replace(params=cotangent))
        return self.estimator.pull(self.problem, window, by_end, loss_weight=0.0)[0]


def _recording(grads: dict[int, Params], descend: Callable) -> Step:
    """A step of descent that keeps its gradient in ``grads``."""

    def step(
        problem: InnerProblem, meta: Params, state: InnerState, batches: Batches, key: Tensor, k: int
    ) -> tuple[InnerState, StepOutput]:
        step_key = fold(key, k)
        with seeded(problem, step_key):
            state, grads[k], loss = descend(problem, meta, state, batches.inner(k), step_key)
        return state, StepOutput(loss.new_zeros(()), ended(problem, state))

    return step


def _descend(
    problem: InnerProblem, meta: Params, state: InnerState, batch: Any, key: Tensor
) -> tuple[InnerState, Params, Tensor]:
    """A step of descent, with its gradient and its loss."""
    grads, loss, buffers = inner_gradient(problem, meta, state, batch, key)
    return update(problem, meta, state, grads, loss, buffers), grads, loss


def _segment(problem: InnerProblem, window: Window, begin: int) -> list[tuple[int, InnerState]]:
    """The states before each step from the kept one ``begin`` up to the next kept one, run again where they were not kept."""
    end = min(k for k in window.states if k > begin)
    states = [(begin, window.states[begin])]
    with torch.no_grad():
        for k in range(begin, end - 1):
            state, _ = advance(problem, window.meta, states[-1][1], window.batches, window.key, k)
            states.append((k + 1, state))
    return states


def _pull_stored(
    problem: InnerProblem, window: Window, state: InnerState, k: int, by_next: list[Tensor], loss_weight: float
) -> tuple[Params, list[Tensor]]:
    """One step's vector-Jacobian product, through the step run again."""
    with torch.enable_grad():
        meta = tracked(window.meta)
        floats, merge = tree.split(state)
        floats = [leaf.detach().requires_grad_() for leaf in floats]
        following, output = advance(problem, meta, merge(floats), window.batches, window.key, k)
        outputs, cotangents = tree.split(following)[0], by_next
        if loss_weight:
            outputs, cotangents = [*outputs, output.loss], [*by_next, torch.full_like(output.loss, loss_weight)]
    pulled = gradients(outputs, [*meta.values(), *floats], cotangents)
    return dict(zip(meta, pulled, strict=False)), pulled[len(meta) :]


def _pull_mixed(
    problem: InnerProblem,
    meta: Params,
    state: InnerState,
    grads: Params,
    batch: Any,
    key: Tensor,
    by_next: list[Tensor],
) -> tuple[Params, list[Tensor]]:
    """One step's vector-Jacobian product: first through the rule, then through the gradient it was given."""
    by_state = _filled(state, by_next)
    by_grads, by_rule = _pull_rule(problem, meta, state, grads, by_state)

    def slope(params: Params, meta: Params, extra: list[Tensor]) -> Tensor:
        def loss(params: Params) -> Tensor:
            inner = state._replace(params=params, extra=_filled(state.extra, extra))
            return problem.inner_loss(meta, inner, batch, key)[0]

        return jvp(loss, (params,), (by_grads,))[1]

    arguments = state.params, meta, _floats(state.extra)
    along_params, along_meta, along_extra = _gradient(slope, arguments)
    by_extra = [leaf + more for leaf, more in zip(_floats(by_state.extra), along_extra, strict=True)]
    by_params = tree.add(by_rule.params, along_params)
    pulled = by_state._replace(params=by_params, rule=by_rule.rule, extra=_filled(state.extra, by_extra))
    return tree.add(by_rule.meta, along_meta), _floats(pulled)


def _gradient(function: Callable[..., Tensor], arguments: tuple[Params, Params, list[Tensor]]) -> Any:
    """By all three arguments, in their shape."""
    if torch.compiler.is_compiling():
        return grad(function, argnums=(0, 1, 2))(*arguments)
    # ``torch.func.grad`` would keep the graph until the end, where it is freed here as it is walked.
    with torch.enable_grad():
        floats, merge = tree.split(arguments)
        floats = [leaf.detach().requires_grad_() for leaf in floats]
        value = function(*merge(floats))
    return merge(gradients([value], floats))


class _ByRule(NamedTuple):
    meta: Params
    params: Params
    rule: Tree


def _pull_rule(
    problem: InnerProblem, meta: Params, state: InnerState, grads: Params, by_state: InnerState
) -> tuple[Params, _ByRule]:
    """Cotangents of what the rule was given: the gradient, and meta-parameters, parameters and its own state."""
    rule = problem.rule
    assert rule is not None
    arguments = _ByRule(meta, state.params, state.rule)

    def apply(grads: Params, floats: list[Tensor]) -> list[Tensor]:
        given = _filled(arguments, floats)
        return _floats(rule.update(problem.rule_meta(given.meta), grads, given.rule, given.params))

    by_after = _floats((by_state.params, by_state.rule))
    by_grads, by_given = vjp(apply, grads, _floats(arguments))[1](by_after)
    return by_grads, _filled(arguments, by_given)


# What ``tree.split`` does, in a form that ``torch.compile`` can follow.


def _floats(of: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(of) if tree.is_floating(leaf)]


def _filled(like: Tree, floats: list[Tensor]) -> Tree:
    """``like`` with other floating-point leaves."""
    others = iter(floats)
    return tree.map(lambda leaf: next(others) if tree.is_floating(leaf) else leaf, like)
