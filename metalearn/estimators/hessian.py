"""The Hessian of an inner loss at the end of a window: products with it, and systems solved by them."""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from metalearn.base import InnerProblem, Params
from metalearn.estimators.windowed import gradients, tracked
from metalearn.random import fold
from metalearn.unroll import Tasks, Window, differentiable_kernels, seeded

ACCEPTED = "accepted: an estimator that differentiates the steps themselves (Unrolled, forward mode, evolution)"

Report = dict[str, Tensor]


class Slope:
    """s = d g/d theta at the end of a window, for products with its derivatives.

    A single graph of s is built and kept, so that a product is one backward pass through it. On an MLP (64-128-128-10, 1000
    rows, one CPU thread) ten products take 65 ms with the graph, 74 ms by ``torch.func.vjp(grad(g))`` and 174 ms by
    ``jvp(grad(g))``, which runs g anew for each. The memory is that of g's forward and backward pass until the slope is dropped.
    """

    def __init__(self, problem: InnerProblem, window: Window):
        self.problem, self.key = problem, window.key
        with differentiable_kernels(), torch.enable_grad():
            self.meta, self.params = tracked(window.meta), tracked(window.end.params)
            loss = last_loss(problem, window, self.meta, self.params)
            leaves = list(self.params.values())
            self.grads = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)

    def hessian(self, x: Params) -> Params:
        """H x."""
        found = gradients(list(self.grads), list(self.params.values()), self._ordered(x), keep_graph=True)
        return dict(zip(self.params, found, strict=True))

    def mixed(self, x: Params) -> Params:
        """(d2 g/d lambda d theta) x, in the shape of lambda."""
        return by_meta(self.grads, self.meta, self._ordered(x))

    def _ordered(self, x: Params) -> list[Tensor]:
        return [x[name] for name in self.params]


class Rows:
    """Parameters as rows (R, P) of independent runs, in float32 at least."""

    def __init__(self, slope: Slope):
        self.slope, self.like = slope, slope.params
        first = next(iter(self.like.values()))
        self.runs = first.shape[0] if isinstance(slope.problem, Tasks) else 1
        self.sizes = [value.numel() // self.runs for value in self.like.values()]
        dtypes = [value.dtype for value in self.like.values()]
        self.size, self.dtype = sum(self.sizes), reduce(torch.promote_types, dtypes, torch.float32)

    def join(self, params: Params) -> Tensor:
        return torch.cat([params[name].reshape(self.runs, -1).to(self.dtype) for name in self.like], -1)

    def part(self, rows_RP: Tensor) -> Params:
        pieces = zip(self.like.items(), rows_RP.split(self.sizes, -1), strict=True)
        return {name: piece.reshape(value.shape).to(value.dtype) for (name, value), piece in pieces}

    def hessian(self, x_RP: Tensor) -> Tensor:
        return self.join(self.slope.hessian(self.part(x_RP)))


def last_loss(problem: InnerProblem, window: Window, meta: Params, params: Params) -> Tensor:
    """g at the end of the window, with the batch and the draws of its last step."""
    k = window.batches.steps - 1
    key = fold(window.key, k)
    with seeded(problem, key):
        return problem.inner_loss(meta, window.end._replace(params=params), window.batches.inner(k), key)[0]


def by_meta(outputs: Sequence[Tensor], meta: Params, cotangents: Sequence[Tensor]) -> Params:
    """The gradient by lambda, with zeros for parts that have none. Where no part has one, the minimum cannot respond."""
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    found: Sequence[Tensor | None] = [None] * len(meta)
    if pairs:
        used, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(used, list(meta.values()), weights, retain_graph=True, allow_unused=True)
    if all(grad is None for grad in found):
        raise ValueError(
            f"inner_loss has no part that depends on both the parameters and {', '.join(meta)}; {ACCEPTED}"
        )
    named = zip(meta.items(), found, strict=True)
    return {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in named}


def scaled_start(product: Callable[[Tensor], Tensor], v_RP: Tensor, start_RP: Tensor) -> tuple[Tensor, Tensor]:
    """c start and its residual, with the c that minimises x^T A x / 2 - v^T x; 0 where there is no minimum along it."""
    image_RP = product(start_RP)
    curvature_R1 = _dot(start_RP, image_RP)
    c_R1 = torch.where(curvature_R1 > 0, _dot(v_RP, start_RP) / curvature_R1, 0.0)
    return c_R1 * start_RP, v_RP - c_R1 * image_RP


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    v_RP: Tensor,
    x_RP: Tensor,
    residual_RP: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Report]:
    """Each row of A x = v from a first x with its residual v - A x: the last x, and a report of all rows."""
    direction_RP, square_R1 = residual_RP, _dot(residual_RP, residual_RP)
    goal_R1 = tolerance**2 * _dot(v_RP, v_RP)
    stopped_R1, negative_R1 = square_R1 <= goal_R1, torch.zeros_like(square_R1, dtype=torch.bool)
    used_R1, smallest_R1 = torch.zeros_like(square_R1), torch.full_like(square_R1, math.inf)
    for _ in range(iterations):
        if stopped_R1.device.type == "cpu" and bool(stopped_R1.all()):
            break
        image_RP = product(direction_RP)
        curvature_R1 = _dot(direction_RP, image_RP)
        quotient_R1 = curvature_R1 / _dot(direction_RP, direction_RP)
        smallest_R1 = torch.where(stopped_R1, smallest_R1, smallest_R1.minimum(quotient_R1))
        negative_R1 = negative_R1 | (~stopped_R1 & (curvature_R1 <= 0))
        stopped_R1 = stopped_R1 | negative_R1
        length_R1 = torch.where(stopped_R1, 0.0, square_R1 / curvature_R1)
        x_RP, residual_RP = x_RP + length_R1 * direction_RP, residual_RP - length_R1 * image_RP
        used_R1 = used_R1 + ~stopped_R1
        before_R1, square_R1 = square_R1, _dot(residual_RP, residual_RP)
        direction_RP = residual_RP + torch.where(stopped_R1, 0.0, square_R1 / before_R1) * direction_RP
        stopped_R1 = stopped_R1 | (square_R1 <= goal_R1)
    x_RP, residual_RP, replaced_R1 = _ascending(product, v_RP, x_RP, residual_RP)
    size_R1 = _dot(v_RP, v_RP).sqrt()
    left_R1 = torch.where(size_R1 > 0, _dot(residual_RP, residual_RP).sqrt() / size_R1, 0.0)
    worst = {"residual": left_R1.max(), "iterations": used_R1.max(), "smallest_curvature": smallest_R1.min()}
    return x_RP, worst | {"negative_curvature": (negative_R1 | replaced_R1).any().to(v_RP.dtype)}


def _ascending(
    product: Callable[[Tensor], Tensor], v_RP: Tensor, x_RP: Tensor, residual_RP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x and its residual, and where v^T x <= 0 those of v |v| / |A v|, or of 0 if even A v is 0; which those are (R, 1)."""
    square_R1 = _dot(v_RP, v_RP)
    lost_R1 = (_dot(v_RP, x_RP) <= 0) & (square_R1 > 0)
    if not bool(lost_R1.any()):
        return x_RP, residual_RP, lost_R1
    image_RP = product(v_RP)
    image_square_R1 = _dot(image_RP, image_RP)
    scale_R1 = torch.where(image_square_R1 > 0, (square_R1 / image_square_R1).sqrt(), 0.0)
    x_RP = torch.where(lost_R1, scale_R1 * v_RP, x_RP)
    return x_RP, torch.where(lost_R1, v_RP - scale_R1 * image_RP, residual_RP), lost_R1


def _dot(left_RP: Tensor, right_RP: Tensor) -> Tensor:
    """The inner product of each row (R, 1)."""
    return (left_RP * right_RP).sum(-1, keepdim=True)
