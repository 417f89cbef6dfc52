"""Local search: the weights of candidates, tuned by the gradient of what a model has learned after a few steps under them.

Shape letters: P candidates, N examples, K classes or outputs, M weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from metalearn import tree
from metalearn.base import (
    Batches,
    Estimator,
    InnerProblem,
    InnerState,
    Loss,
    Params,
    Rule,
    StepOutput,
    require_range,
)
from metalearn.estimators.unrolled import Unrolled
from metalearn.estimators.windowed import gradients
from metalearn.losses.compiled import Elementwise, compile_gradient
from metalearn.losses.elementwise import activate
from metalearn.losses.learned import load_loss
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold, integers, normal
from metalearn.search.candidates import Candidate
from metalearn.unroll import differentiable_kernels, seeded


class Tuned(NamedTuple):
    """What local search made of a candidate."""

    weights: tuple[float, ...]  # in the program's order
    finite: bool  # whether every meta-gradient was; where one was not, the weights are those before it


class LocalSearch:
    """Meta-gradient descent on the weights of losses, through ``inner_steps`` steps of a model that begins anew each time.

    phi <- Adam(phi, d M(theta_K(phi)) / d phi), where theta_0 is drawn anew for every meta-step, theta_{k+1} takes a step
    under the loss on a training batch, and M is the task's own objective on a fresh validation batch; batch sizes are the
    task's. Weights begin at those of the candidate, or at N(1, weight_std^2) drawn from its canonical name: equal
    candidates come to equal weights, in whatever company.

    With one step and no ``estimator`` all candidates go together, sharing theta_0 and batches. With g = d loss / d z at the
    raw outputs z(theta_0), J = dz/d theta_0, v = d M / d theta_1 and the rule's derivative R = d theta_1 / d gradient,
    d M / d phi = d/d phi <g(phi), J R^T v>: one product J u forwards instead of a second pass backwards through the model.

    Args:
        steps: meta-steps, at least 0.
        inner_steps: K of a meta-step, at least 1.
        lr: learning rate of Adam on the weights, >= 0.
        inner_lr: learning rate of plain descent in inner steps, >= 0; null for the task's own rule.
        estimator: of meta-gradients, candidate by candidate; null for the product above, or with more than one inner step
            for ``Unrolled()``, which is exact too.
        horizon: inner steps of an episode, a multiple of ``inner_steps``, for an estimator that goes on from one meta-step
            to the next, as ``PersistentES`` does; null for ``inner_steps``, so that each meta-step is an episode.
        start_steps: theta_0 is taken from a run under the task's own loss and rule, after a number of steps drawn
            uniformly from 0 to this for every meta-step, so that not only the first steps of training count.
        weight_std: deviation of initial weights, >= 0.
        chunk: candidates that go together, at least 1, which bounds memory.

    Raises:
        ValueError: for values out of range.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", section 3.3; Bechtle et
    al. 2021, "Meta-Learning via Learned Loss". Differs from the papers: ``start_steps``, more than one step, and the way in
    which the derivative of one step is computed.
    """

    def __init__(
        self,
        steps: int = 250,
        inner_steps: int = 1,
        lr: float = 1e-3,
        inner_lr: float | None = 0.01,
        estimator: Estimator | None = None,
        horizon: int | None = None,
        start_steps: int = 0,
        weight_std: float = 1e-3,
        chunk: int = 64,
    ):
        require_range("steps", steps, 0)
        require_range("start_steps", start_steps, 0)
        require_range("inner_steps", inner_steps, 1)
        require_range("weight_std", weight_std, 0.0)
        require_range("chunk", chunk, 1)
        horizon = inner_steps if horizon is None else horizon
        if horizon < 1 or horizon % inner_steps:
            raise ValueError(f"horizon is {horizon}; accepted: a multiple of inner_steps, {inner_steps}")
        self.steps, self.inner_steps, self.horizon = steps, inner_steps, horizon
        self.inner_rule = None if inner_lr is None else SGD(inner_lr)
        self.estimator = Unrolled() if estimator is None and inner_steps > 1 else estimator
        self.start_steps, self.weight_std, self.chunk = start_steps, weight_std, chunk
        self.rule = Adam(lr)

    def tune(self, task: LossTask, candidates: Sequence[Candidate], key: Tensor) -> list[tuple[float, ...]]:
        """The weights of each candidate after local search, in its program's order; see ``run``."""
        return [tuned.weights for tuned in self.run(task, candidates, key)]

    def run(self, task: LossTask, candidates: Sequence[Candidate], key: Tensor) -> list[Tuned]:
        """Local search of every candidate.

        Args:
            task: an open task.
            candidates: losses that are programs.
            key: of initial weights, models and batches. Results are functions of it and the candidate, up to rounding.

        Raises:
            ValueError: for a candidate that is no program, or a problem that the estimator cannot work on.
        """
        if unsuited := [one.text for one in candidates if one.program is None]:
            raise ValueError(f"candidates has a {unsuited[0]!r}; accepted: programs, whose edges have weights")
        canonical = [one.canonical for one in candidates]
        dtype = next(task.module.parameters()).dtype
        with torch.autocast(key.device.type, enabled=False), differentiable_kernels():
            weights = [self._initial(one, fold(key, "weights")).to(key.device, dtype) for one in canonical]
            if self.estimator is None:
                tuned = self._together(task, canonical, weights, fold(key, "steps"))
            else:
                pairs = zip(canonical, weights, strict=True)
                tuned = [self._alone(task, one, own, self.estimator, fold(key, "steps")) for one, own in pairs]
        return [Tuned(_in_place(one, own), finite) for one, (own, finite) in zip(candidates, tuned, strict=True)]

    def _initial(self, canonical: Candidate, key: Tensor) -> Tensor:
        """Weights (M,) in canonical order."""
        assert canonical.program is not None
        if canonical.weights:
            return torch.tensor(canonical.weights, dtype=torch.float64)
        drawn = normal(fold(key, canonical.name), (canonical.program.num_weights,))
        return 1 + self.weight_std * drawn.double()

    # -- one step, all candidates together -----------------------------------------------------------------------------

    def _together(
        self, task: LossTask, canonical: Sequence[Candidate], weights: Sequence[Tensor], key: Tensor
    ) -> list[tuple[Tensor, bool]]:
        """Weights after, and whether all was finite; candidates that are proven dead stay where they are."""
        tuned = [(own, True) for own in weights]
        slopes = {place: found for place, one in enumerate(canonical) if (found := _slope(one)) and len(weights[place])}
        window = Episode(task, self.inner_rule, self.horizon, self.start_steps)
        if window.rule.needs_loss:
            raise ValueError(
                f"the task's rule is {type(task.rule).__name__}, which needs a loss; accepted: an estimator, or inner_lr"
            )
        live = list(slopes)
        for first in range(0, len(live), self.chunk):
            places = live[first : first + self.chunk]
            found = self._descend(window, [slopes[place] for place in places], [weights[p] for p in places], key)
            for place, one in zip(places, found, strict=True):
                tuned[place] = one
        return tuned

    def _descend(
        self, window: Episode, slopes: Sequence[Elementwise], weights: Sequence[Tensor], key: Tensor
    ) -> list[tuple[Tensor, bool]]:
        sizes = [len(own) for own in weights]
        # One vector of all weights: Adam, entry by entry, is every candidate's own.
        meta = {"weights": torch.cat(list(weights))}
        state, finite_P = self.rule.init({}, meta), torch.ones(len(sizes), dtype=torch.bool, device=key.device)
        rows = torch.arange(len(sizes), device=key.device).repeat_interleave(torch.tensor(sizes, device=key.device))
        for step in range(self.steps):
            found = torch.cat(one_step_gradients(window, slopes, meta["weights"].split(sizes), fold(key, step)))
            broken = torch.zeros_like(finite_P, dtype=found.dtype).index_add_(0, rows, (~found.isfinite()).to(found))
            finite_P = finite_P & (broken == 0)
            kept = finite_P[rows]
            after, state = self.rule.update({}, {"weights": torch.where(kept, found, 0.0)}, state, meta)
            meta = {"weights": torch.where(kept, after["weights"], meta["weights"])}
        return list(zip(meta["weights"].split(sizes), finite_P.tolist(), strict=True))

    # -- by an estimator, one candidate after the other --------------------------------------------------------------------

    def _alone(
        self, task: LossTask, canonical: Candidate, weights: Tensor, estimator: Estimator, key: Tensor
    ) -> tuple[Tensor, bool]:
        """Weights after, and whether all was finite."""
        if not len(weights):
            return weights, True
        loss = canonical._replace(weights=()).loss(task.output, trainable=True)
        problem = Episode(task, self.inner_rule, self.horizon, self.start_steps, loss)
        meta = {"weights": weights}
        state, own = self.rule.init({}, meta), estimator.init(problem, meta, fold(key, "estimator"))
        for step in range(self.steps):
            step_key = fold(key, step)
            found = estimator.estimate(problem, meta, own, problem.batches(step_key, self.inner_steps), step_key)
            if not tree.norm(found.grad).isfinite():
                return meta["weights"], False
            own = found.state
            meta, state = self.rule.update({}, found.grad, state, meta)
        return meta["weights"], True


def one_step_gradients(
    window: Episode, slopes: Sequence[Elementwise], weights: Sequence[Tensor], key: Tensor
) -> list[Tensor]:
    """d M / d phi (M,) of every candidate after one inner step: what ``Unrolled`` gives each, without a second backward pass.

    Args:
        window: of one inner step.
        slopes: ``dl/dp`` of each candidate, as ``compile_gradient`` makes it.
        weights: of each.
        key: of initial parameters and batches.
    """
    task, rule = window.task, window.rule
    batches, start = window.batches(key, 1), window.init({}, fold(key, "episode"))
    inputs, targets = batches.inner(0)
    step_key = fold(fold(key, "steps"), 0)

    def outputs(params: Params) -> tuple[Tensor, Params]:
        return tree.call(task.module, params, start.buffers, inputs)

    def moved(params: Params) -> Tensor:
        end = InnerState(params, buffers, start.rule, start.step + 1, start.extra)
        return window.outer({}, end, batches.outer)

    def pushed(tangent: Params) -> Tensor:
        return jvp(lambda params: outputs(params)[0], (start.params,), (tangent,))[1]

    with seeded(window, step_key):
        taken: Any = vjp(outputs, start.params, has_aux=True)
    z_NK, pull, buffers = taken
    p_NK, y_NK = activate(z_NK, task.output), task.target_matrix(targets)
    with torch.enable_grad():
        leaves = [own.detach().requires_grad_() for own in weights]
        slope_PNK = torch.stack([function(y_NK, p_NK, own) for function, own in zip(slopes, leaves, strict=True)])
        by_raw_PNK = through_output(slope_PNK.detach(), p_NK, task.output) / len(targets)
        grads = {name: value.detach().requires_grad_() for name, value in vmap(pull)(by_raw_PNK)[0].items()}
        params = vmap(lambda one: rule.update({}, one, start.rule, start.params)[0])(grads)
        by_params = vmap(grad(moved))(tree.detach(params))
        by_grads = gradients(list(params.values()), list(grads.values()), list(by_params.values()))
    with seeded(window, step_key):
        change_PNK = vmap(pushed, randomness="same")(dict(zip(grads, by_grads, strict=True)))
    with torch.enable_grad():
        # The derivative of an output function is a symmetric matrix, so that it is its own transpose.
        total = (slope_PNK * through_output(change_PNK, p_NK, task.output)).sum() / len(targets)
        return gradients([total], leaves)


def through_output(values: Tensor, p: Tensor, output: str) -> Tensor:
    """``dp/dz`` applied to values (..., K) at outputs p (..., K): its own transpose, so of tangents and of cotangents."""
    if output == "softmax":
        return p * (values - (p * values).sum(-1, keepdim=True))
    return values * p * (1 - p) if output == "sigmoid" else values


def _slope(canonical: Candidate) -> Elementwise | None:
    assert canonical.program is not None
    return compile_gradient(canonical.program)


def _in_place(candidate: Candidate, weights: Tensor) -> tuple[float, ...]:
    """Weights in canonical order as the candidate's program has them."""
    assert candidate.program is not None
    placed = [1.0] * candidate.program.num_weights
    for place, weight in zip(candidate.program.canonical_order[1:], weights.tolist(), strict=True):
        placed[place - 1] = weight
    return tuple(placed)


class Episode(InnerProblem):
    """A few steps of a task's run, from a model that may be partly trained.

    Args:
        task: an open task.
        rule: of these steps; null for the task's own, which goes on with the state that it has.
        horizon: steps of an episode, at least 1.
        start_steps: before it, a number drawn uniformly from 0 to this is taken under the task's own loss and rule.
        loss: what the model is trained under; null for the task's own.
    """

    def __init__(self, task: LossTask, rule: Rule | None, horizon: int, start_steps: int = 0, loss: Loss | None = None):
        self.task = copy.copy(task) if loss is None else task.with_loss(loss)
        self.rule: Rule = rule or task.rule
        self.task.rule, self.task.horizon = self.rule, horizon
        self.horizon, self.global_generator = horizon, task.global_generator
        self.start_steps, self._keeps_rule = start_steps, rule is None
        self._before = task.with_loss(load_loss(task.own_loss, output=task.output))
        self._before.horizon = None
        self._last: tuple[int, InnerState] | None = None

    def init_meta(self, key: Tensor) -> Params:
        return self.task.init_meta(key)

    def init(self, meta: Params, key: Tensor) -> InnerState:
        steps = int(integers(fold(key, "start steps"), (), self.start_steps + 1)) if self.start_steps else 0
        if not steps:
            return self.task.init(meta, key)
        if self._last is None or self._last[0] != int(key):  # estimators ask for one start more than once
            self._last = int(key), self._trained(key, steps)
        return self._last[1]

    def _trained(self, key: Tensor, steps: int) -> InnerState:
        before = self._before
        end = before.trained({}, key, before.batches(fold(key, "start"), steps)).end
        rule = end.rule if self._keeps_rule else self.rule.init({}, end.params)
        return end._replace(rule=rule, step=torch.zeros_like(end.step))

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        return self.task.step(meta, state, batch, key)

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return self.task.outer(meta, state, batch)

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        return self.task.inner_loss(meta, state, batch, key)

    def batches(self, key: Tensor, steps: int) -> Batches:
        return self.task.batches(key, steps)
