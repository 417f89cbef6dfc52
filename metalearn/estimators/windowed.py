"""What estimators share that look at one window of one inner run: where it starts, how it ends, who is refused."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn import tree
from metalearn.base import Batches, Estimator, InnerProblem, InnerState, MetaGradient, Params, Response, Tree
from metalearn.random import fold
from metalearn.unroll import Window, asks_outer, differentiable_kernels, unroll

OPAQUE = "its steps cannot be differentiated, which only zeroth-order estimators (ZerothOrder, the evolution family) do without"
NO_INNER_LOSS = "it has no inner_loss, the stationarity of which implicit estimators differentiate"
NOT_TERMINAL = "its steps have losses of their own, which an estimator that sees only the solution would leave out"


class Windowed(Estimator):
    """An estimator of one inner run, window by window.

    Args:
        warm_start: whether the inner run goes on from one estimate to the next, beginning anew only when its episode
            has ended; else every estimate begins an episode.
    """

    def __init__(self, warm_start: bool = False):
        self.warm_start = warm_start

    def refusal(self, problem: InnerProblem) -> str | None:
        return None if problem.differentiable else OPAQUE

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        if reason := self.refusal(problem):
            raise ValueError(f"{type(self).__name__} cannot be used on {type(problem).__name__}: {reason}")
        if not self.warm_start:
            return {}
        inner = tree.map(torch.clone, tree.detach(problem.init(meta, fold(key, "episode"))))  # may be meta itself
        return {"inner": inner, "done": torch.zeros((), dtype=torch.bool, device=inner.step.device)}

    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        meta = tree.detach(meta)
        fresh = not self.warm_start or bool(state["done"])
        start = self.begin(problem, meta, key) if fresh else state["inner"]
        _require_whole_windows(problem, start, batches.steps)
        with differentiable_kernels():
            init_key = fold(key, "episode") if fresh else None
            given = Given(problem, meta, start, batches, fold(key, "steps"), init_key)
            grad, loss, end, done, diagnostics = self.differentiate(given)
        after = {"inner": tree.detach(end), "done": torch.full_like(state["done"], done)} if self.warm_start else {}
        return MetaGradient(grad, loss.detach(), after, diagnostics)

    def begin(self, problem: InnerProblem, meta: Params, key: Tensor) -> InnerState:
        """The start of an episode of this estimate."""
        with torch.no_grad():
            return problem.init(meta, fold(key, "episode"))

    @abstractmethod
    def differentiate(self, given: "Given") -> "Outcome":
        """The window's meta-gradient. With ``init_key``, ``start`` is ``problem.init(meta, init_key)``, differentiable too."""


class Given(NamedTuple):
    """What ``Windowed.differentiate`` is given."""

    problem: InnerProblem
    meta: Params
    start: InnerState
    batches: Batches
    key: Tensor
    init_key: Tensor | None  # of the episode that the window begins; None where the inner run goes on


class Outcome(NamedTuple):
    """What ``Windowed.differentiate`` returns."""

    grad: Params
    loss: Tensor
    end: InnerState
    done: bool
    diagnostics: dict[str, Tensor]


class Cotangent(NamedTuple):
    """The gradient of ``outer`` by the state at the window's end and directly by the meta-parameters."""

    loss: Tensor  # the window's whole meta-objective
    state: list[Tensor]  # by the floating-point leaves of the state, in the order of ``tree.split``
    params: Params  # the part of ``state`` that is by the parameters
    meta: Params


def cotangent(problem: InnerProblem, window: Window) -> Cotangent:
    """Differentiate ``outer`` where the window asks for it; zeros where it does not."""
    floats, merge = tree.split(window.end)
    if not asks_outer(problem, window.done):
        zeros = [torch.zeros_like(leaf) for leaf in floats]
        return Cotangent(window.loss, zeros, merge(zeros).params, tree.zeros_like(window.meta))
    with torch.enable_grad():
        meta = tracked(window.meta)
        floats = [leaf.detach().requires_grad_() for leaf in floats]
        outer = problem.outer(meta, merge(floats), window.batches.outer)
    grads = gradients([outer], [*meta.values(), *floats])
    by_meta, by_state = grads[: len(meta)], grads[len(meta) :]
    loss = window.loss + outer.detach()
    return Cotangent(loss, by_state, merge(by_state).params, dict(zip(meta, by_meta, strict=True)))


def gradients(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor] | None = None, keep_graph: bool = False
) -> list[Tensor]:
    """``autograd.grad`` with zeros where an input is not used, or no output depends on any."""
    pairs = list(zip(outputs, cotangents or [torch.ones_like(output) for output in outputs], strict=True))
    pairs = [(output, weight) for output, weight in pairs if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in inputs]
    used, weights = zip(*pairs, strict=True)
    found = torch.autograd.grad(used, inputs, weights, retain_graph=keep_graph, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, inputs, strict=True)]


def tracked(params: Params) -> Params:
    """The same values as leaves of a new graph."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}


def through_init(problem: InnerProblem, meta: Params, init_key: Tensor, cotangents: list[Tensor]) -> Params:
    """``(d init / d meta)^T cotangents``, the cotangents by the floating-point leaves of the first state."""
    with torch.enable_grad():
        leaves = tracked(meta)
        floats, _ = tree.split(problem.init(leaves, init_key))
    return dict(zip(meta, gradients(floats, list(leaves.values()), cotangents), strict=True))


class Responsive(Windowed):
    """An estimator that knows how the end of a window responds to the meta-parameters: usable below the top of a graph."""

    @abstractmethod
    def run(self, problem: InnerProblem, meta: Params, start: InnerState, batches: Batches, key: Tensor) -> Window:
        """The window, with as many states as ``response`` needs."""

    @abstractmethod
    def response(self, problem: InnerProblem, window: Window) -> Response:
        """d(parameters at the window's end)/d(meta), the window's start held fixed."""


class Implicit(Responsive):
    """An estimator that takes the end of the window for a solution, whatever the way there.

    h = d outer/d meta + (d theta*/d meta)^T v with v = d outer/d theta at the end.
    """

    def refusal(self, problem: InnerProblem) -> str | None:
        if reason := super().refusal(problem):
            return reason
        return NO_INNER_LOSS if not problem.has_inner_loss else None if problem.terminal else NOT_TERMINAL

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        if acting := _through_the_rule(problem, meta):
            raise ValueError(
                f"{type(self).__name__} cannot be used on {type(problem).__name__}: {', '.join(acting)} act through the "
                "rule, on which a solution does not depend"
            )
        return super().init(problem, meta, key)

    def run(self, problem: InnerProblem, meta: Params, start: InnerState, batches: Batches, key: Tensor) -> Window:
        with torch.no_grad():
            return unroll(problem, meta, start, batches, key)

    def differentiate(self, given: Given) -> Outcome:
        problem, meta, start, batches, key, _ = given
        window = self.run(problem, meta, start, batches, key)
        by_outer = cotangent(problem, window)
        response = self.response(problem, window)
        v = by_outer.params if self.reduce is None else self.reduce(by_outer.params)  # a cut solve is not linear in v
        grad = tree.add(by_outer.meta, response.vjp(v))
        return Outcome(grad, by_outer.loss, window.end, window.done, self.diagnostics(response))

    def diagnostics(self, response: Response) -> dict[str, Tensor]:
        """What the last ``vjp`` of a response has to report."""
        return {}


def _through_the_rule(problem: InnerProblem, meta: Params) -> list[str]:
    """The meta-parameters that the rule is given."""
    with torch.enable_grad():
        leaves = tracked(meta)
        given = [value for value in problem.rule_meta(leaves).values() if value.requires_grad]
    if not given:
        return []
    found = torch.autograd.grad([value.sum() for value in given], list(leaves.values()), allow_unused=True)
    return [name for name, grad in zip(leaves, found, strict=True) if grad is not None]


def _require_whole_windows(problem: InnerProblem, start: InnerState, steps: int) -> None:
    """Raise ``ValueError`` where an episode would end inside the window."""
    if problem.horizon is not None and (left := problem.horizon - int(start.step.max())) < steps:
        raise ValueError(
            f"steps is {steps}, but the episode of {problem.horizon} steps has {left} left; accepted: a divisor of "
            f"{problem.horizon}"
        )
