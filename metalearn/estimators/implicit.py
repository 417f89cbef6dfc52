"""Implicit differentiation: the end of the window counts as a minimum of ``inner_loss``, whatever the way there.

At a minimum theta* of g(theta, lambda), (d theta*/d lambda)^T v = -(d2 g/d lambda d theta) x with H x = v, H = d2 g/d theta2.
The estimators differ in their x. g is ``inner_loss`` with the batch and the draws of the window's last step; buffers and
the window's start are held fixed, so what reaches ``outer`` through them alone, or through the rule, is left out.

Formulas hold near a minimum only, which short windows reach when each goes on where the last one ended. That is why
``warm_start`` is on by default here: an endless run goes on from estimate to estimate, and an episode begins anew when its
horizon is over. Switch it off for an endless run whose every window has tasks of its own.

Runs of a ``Tasks`` have nothing to do with each other, and each is solved by itself: R runs of P parameters are rows.
"""

from abc import abstractmethod
from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor
from torch.func import vmap

from metalearn import tree
from metalearn.base import Batches, InnerProblem, InnerState, MetaGradient, Params, Response, Tree, require_range
from metalearn.estimators.hessian import Report, Rows, Slope, by_meta, conjugate_gradient, last_loss, scaled_start
from metalearn.estimators.windowed import Implicit, gradients, tracked
from metalearn.random import distinct, fold
from metalearn.unroll import Window, differentiable_kernels, inner_gradient, seeded, unroll

NO_RULE = "its step is no rule applied to a gradient, the derivative of which SAMA takes"

Solve = Callable[[Params], tuple[Params, Report]]


class Solver(Implicit):
    """An implicit estimator with an explicit x. Its reports, of the last x it found, are the diagnostics."""

    def __init__(self, warm_start: bool = True):
        super().__init__(warm_start)

    @abstractmethod
    def solver(self, slope: Slope) -> Solve:
        """The function from v to x and what there is to report of it; what all v share is computed here."""

    def response(self, problem: InnerProblem, window: Window) -> Response:
        slope = Slope(problem, window)
        return _Solved(slope, self.solver(slope))

    def diagnostics(self, response: Response) -> Report:
        assert isinstance(response, _Solved)
        return response.report


class _Solved(Response):
    def __init__(self, slope: Slope, solve: Solve):
        self.slope, self.solve = slope, solve
        self.report: Report = {}

    def vjp(self, cotangent: Params) -> Params:
        x, self.report = self.solve(cotangent)
        return tree.scale(self.slope.mixed(x), -1.0)


class ConjugateGradient(Solver):
    """x ~ (H + damping I)^{-1} v by conjugate gradients, exact after as many iterations as H has distinct eigenvalues.

    A direction p with p^T (H + damping I) p <= 0 shows that there is no minimum: the iteration stops before it. From x = 0
    every iterate has v^T x > 0. Where v^T x <= 0 nevertheless, because v itself is such a direction, x is
    v |v| / |(H + damping I) v|, as long as a solution would be if the curvature along v were positive. So x never points
    away from v, and ``negative_curvature`` says when it is not a solution.

    Diagnostics, over the runs of a ``Tasks`` the worst: ``residual`` |v - (H + damping I) x| / |v|; ``iterations`` used;
    ``negative_curvature`` 1 or 0; ``smallest_curvature``, of p^T H p / p^T p: a damping above minus that would have
    gone on (inf where nothing was to be solved). Iterations do not wait for a GPU, which therefore computes all of them.

    Args:
        iterations: most Hessian-vector products of a solve, >= 1.
        damping: added to H's diagonal, >= 0. It biases x by up to damping/mu relative, mu the least curvature.
        tolerance: residual at which to stop, 0 ... 0.5.
        reuse_solution: whether an estimate begins its iteration at the last estimate's x, scaled as well as may be, which costs
            one more product and pays when v and H change slowly; kept in the state.
        warm_start: see the module.

    Source: Hestenes and Stiefel 1952; implicit differentiation by it, Rajeswaran et al. 2019, "Meta-Learning with Implicit
    Gradients", algorithm 2; the stop, Nocedal and Wright 2006, "Numerical Optimization", algorithm 7.1.
    Differs from the last: v is scaled where it replaces x.
    """

    def __init__(
        self,
        iterations: int = 10,
        damping: float = 1e-3,
        tolerance: float = 1e-6,
        reuse_solution: bool = False,
        warm_start: bool = True,
    ):
        super().__init__(warm_start)
        require_range("iterations", iterations, 1)
        require_range("damping", damping, 0)
        require_range("tolerance", tolerance, 0, 0.5)
        self.iterations, self.damping, self.tolerance = iterations, damping, tolerance
        self.reuse_solution = reuse_solution
        self.last_solution: Params | None = None

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        state = super().init(problem, meta, key)
        if not self.reuse_solution:
            return state
        inner = state["inner"] if self.warm_start else self.begin(problem, meta, key)
        return state | {"solution": tree.zeros_like(inner.params)}

    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        if not self.reuse_solution:
            return super().estimate(problem, meta, state, batches, key)
        remembering = copy(self)  # so that nothing of one run is left in this object
        remembering.last_solution = state["solution"]
        found = super(ConjugateGradient, remembering).estimate(problem, meta, state, batches, key)
        return found._replace(state=found.state | {"solution": remembering.last_solution})

    def solver(self, slope: Slope) -> Solve:
        rows = Rows(slope)

        def damped(x_RP: Tensor) -> Tensor:
            return rows.hessian(x_RP) + self.damping * x_RP

        def solve(v: Params) -> tuple[Params, Report]:
            v_RP = rows.join(v)
            start = torch.zeros_like(v_RP), v_RP
            if self.last_solution is not None:
                start = scaled_start(damped, v_RP, rows.join(self.last_solution))
            x_RP, report = conjugate_gradient(damped, v_RP, *start, self.iterations, self.tolerance)
            report["smallest_curvature"] -= self.damping
            x = rows.part(x_RP)
            if self.last_solution is not None:
                self.last_solution = x
            return x, report

        return solve


class Neumann(Solver):
    """x = a sum_{j<=J} (I - a H)^j v, a the step size and J the terms; |x - H^{-1} v| <= (1 - a mu)^{J+1} |v| / mu.

    At a minimum this is backpropagation through the last J + 1 steps of gradient descent at rate a. It converges where
    0 < a H < 2 throughout: ``ratio``, of the norms of the last two terms, is the diagnostic, and says no from 1 on.

    Args:
        terms: J >= 1, each a Hessian-vector product.
        step_size: a > 0, at best a little below 1 over H's largest eigenvalue.
        warm_start: see the module.

    Source: Lorraine et al. 2020, "Optimizing Millions of Hyperparameters by Implicit Differentiation", algorithm 3.
    Differs from the paper: the factor a is kept, so that x is an inverse and not a multiple of it.
    """

    def __init__(self, terms: int = 10, step_size: float = 0.1, warm_start: bool = True):
        super().__init__(warm_start)
        require_range("terms", terms, 1)
        _require_positive("step_size", step_size)
        self.terms, self.step_size = terms, step_size

    def solver(self, slope: Slope) -> Solve:
        def solve(v: Params) -> tuple[Params, Report]:
            total = term = before = v
            for _ in range(self.terms):
                term, before = tree.add(term, slope.hessian(term), -self.step_size), term
                total = tree.add(total, term)
            old, new = tree.norm(before), tree.norm(term)
            return tree.scale(total, self.step_size), {"ratio": torch.where(old > 0, new / old, 0.0)}

        return solve


class Nystrom(Solver):
    """x = (B B^T + damping I)^{-1} v with B B^T = C W^+ C^T, C columns of H drawn at random and W their own rows.

    With S = damping I + B^T B, x = (v - B S^{-1} B^T v) / damping (Woodbury), in float64. The columns are computed once
    for all v. At full rank and positive H this is the damped inverse; of W, only positive eigenvalues are used, so that
    x never points away from v. ``smallest_curvature`` (W's least eigenvalue) tells when there were others.

    Args:
        rank: number of columns, from 1 to the parameters of a run.
        damping: > 0. What the columns do not span is taken for flat: it enters x as v / damping.
        chunk: columns that are computed together, >= 1: memory for speed.
        warm_start: see the module.

    Raises:
        ValueError: by ``estimate``, there are fewer parameters than ``rank``.

    Source: Hataya and Yamada 2023, "Nyström Method for Accurate and Scalable Implicit Differentiation", eqs. 6-8.
    Differs from the paper: W is cut to its positive part; a system in B, better conditioned than that in C.
    """

    def __init__(self, rank: int = 10, damping: float = 1e-2, chunk: int = 8, warm_start: bool = True):
        super().__init__(warm_start)
        require_range("rank", rank, 1)
        _require_positive("damping", damping)
        require_range("chunk", chunk, 1)
        self.rank, self.damping, self.chunk = rank, damping, chunk

    def solver(self, slope: Slope) -> Solve:
        rows = Rows(slope)
        b_RPk, smallest = self._factor(slope, rows)
        gram_Rkk = b_RPk.mT @ b_RPk
        factor_Rkk = torch.linalg.cholesky(gram_Rkk + self.damping * torch.eye(self.rank).to(gram_Rkk))

        def solve(v: Params) -> tuple[Params, Report]:
            v_RP1 = rows.join(v).double().unsqueeze(-1)
            x_RP1 = (v_RP1 - b_RPk @ torch.cholesky_solve(b_RPk.mT @ v_RP1, factor_Rkk)) / self.damping
            return rows.part(x_RP1.squeeze(-1)), {"smallest_curvature": smallest}

        return solve

    def _factor(self, slope: Slope, rows: Rows) -> tuple[Tensor, Tensor]:
        """B (R, P, k) in float64, and the smallest eigenvalue of W."""
        if self.rank > rows.size:
            raise ValueError(f"rank is {self.rank}; accepted: 1 <= rank <= {rows.size}, the parameters of a run")
        chosen_k = distinct(fold(slope.key, "nystrom"), self.rank, rows.size)
        places_P = torch.arange(rows.size, device=chosen_k.device)

        def column(place: Tensor) -> Tensor:
            unit_P = (places_P == place).to(rows.dtype)
            return rows.hessian(unit_P.expand(rows.runs, rows.size))

        c_RPk = vmap(column, chunk_size=self.chunk)(chosen_k).double().movedim(0, -1)
        w_Rkk = c_RPk[:, chosen_k]
        values_Rk, vectors_Rkk = torch.linalg.eigh((w_Rkk + w_Rkk.mT) / 2)
        noise = self.rank * torch.finfo(rows.dtype).eps * values_Rk.abs().amax(-1, keepdim=True)
        inverse_roots_Rk = torch.where(values_Rk > noise, values_Rk.clamp(min=noise).rsqrt(), 0.0)
        return c_RPk @ (vectors_Rkk * inverse_roots_Rk.unsqueeze(-2)), values_Rk.min().to(rows.dtype)


class Identity(Solver):
    """x = scale v: the curvature is taken for 1/scale in every direction.

    With the inner learning rate as ``scale`` this is the derivative of the last step of gradient descent alone.

    Args:
        scale: > 0. Peers leave the step size out, which is 1.
        warm_start: see the module.

    Source: Luketina et al. 2016, "Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters" (T1-T2).
    """

    def __init__(self, scale: float = 1.0, warm_start: bool = True):
        super().__init__(warm_start)
        _require_positive("scale", scale)
        self.scale = scale

    def solver(self, slope: Slope) -> Solve:
        return lambda v: (tree.scale(v, self.scale), {})


class FiniteDifference(Implicit):
    """x = v, and the second derivative a central difference: two gradients of g by lambda, and no second-order graph.

    h = -(d g/d lambda (theta + e v) - d g/d lambda (theta - e v)) / (2 e), e = radius / |v|, the norm over all parameters
    (of all runs together). The error is of order radius^2, and in float32 rounding adds some 1e-7 |d g/d lambda| |v| / radius.

    Args:
        radius: length of the displacement of theta, > 0.
        warm_start: see the module.

    Source: Liu, Simonyan and Yang 2019, "DARTS: Differentiable Architecture Search", eq. 8.
    """

    def __init__(self, radius: float = 0.01, warm_start: bool = True):
        super().__init__(warm_start)
        _require_positive("radius", radius)
        self.radius = radius

    def response(self, problem: InnerProblem, window: Window) -> Response:
        return _Difference(self, problem, window)

    def direction(self, problem: InnerProblem, window: Window, v: Params) -> Params:
        """The x that v is replaced by."""
        return v


class SAMA(FiniteDifference):
    """The finite difference along x = D v, D = -d theta'/d g of the rule's last update: the rule's own idea of H^{-1}.

    D is the learning rate for plain descent, and for Adam the derivative of lr m^/(sqrt(v^) + eps) by the gradient,
    bias correction included.

    Args:
        radius: as in ``FiniteDifference``, with x for v.
        warm_start: see the module.

    Source: Choe et al. 2023, "Making Scalable Meta Learning Practical", eqs. 4-5 and appendix.
    Differs from the paper: D^T v is a vector-Jacobian product of the rule itself, at the last step's gradient and the state
    before it, where the paper has a formula for Adam without bias correction and without decay; so every rule will do,
    and those that mix entries (clipped gradients) get their whole Jacobian and not its diagonal.
    """

    def refusal(self, problem: InnerProblem) -> str | None:
        return super().refusal(problem) or (NO_RULE if problem.rule is None else None)

    def run(self, problem: InnerProblem, meta: Params, start: InnerState, batches: Batches, key: Tensor) -> Window:
        with torch.no_grad():
            return unroll(problem, meta, start, batches, key, keep=lambda k: k == batches.steps - 1)

    def direction(self, problem: InnerProblem, window: Window, v: Params) -> Params:
        assert problem.rule is not None
        k, meta = window.batches.steps - 1, window.meta
        state, step_key = window.states[k], fold(window.key, k)
        with torch.no_grad(), seeded(problem, step_key):
            found, loss, _ = inner_gradient(problem, meta, state, window.batches.inner(k), step_key)
        with torch.enable_grad():
            grads = tracked(found)
            after, _ = problem.rule.update(problem.rule_meta(meta), grads, state.rule, state.params, loss=loss)
        moved = gradients([after[name] for name in v], list(grads.values()), [-value for value in v.values()])
        return dict(zip(grads, moved, strict=True))


class _Difference(Response):
    def __init__(self, estimator: FiniteDifference, problem: InnerProblem, window: Window):
        self.estimator, self.problem, self.window = estimator, problem, window

    def vjp(self, cotangent: Params) -> Params:
        with differentiable_kernels():
            x = self.estimator.direction(self.problem, self.window, cotangent)
            norm = tree.norm(x)
            step = tree.scale(x, torch.where(norm > 0, self.estimator.radius / norm, 0.0))
            difference = tree.add(self._by_meta(step, 1.0), self._by_meta(step, -1.0), -1.0)
        return tree.scale(difference, -norm / (2 * self.estimator.radius))

    def _by_meta(self, step: Params, sign: float) -> Params:
        """d g/d lambda at theta + sign step."""
        with torch.enable_grad():
            meta = tracked(self.window.meta)
            moved = tree.add(tree.detach(self.window.end.params), step, sign)
            loss = last_loss(self.problem, self.window, meta, moved)
        return by_meta([loss], meta, [torch.ones_like(loss)])


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value!r}; accepted: {name} > 0")
