"""Where an optimizer diverges: spectral radii of rules on quadratics, and runs that must agree with them.

On ``L(x) = (x - mu)' H (x - mu) / 2``, where the minimum mu is drawn anew for every gradient, a rule that is linear in its
gradients is a linear system driven by noise. Its mean and its covariance stay bounded exactly where its spectral radius
is below 1, whatever the noise.

Letters: R runs, T steps, D dimensions, N numbers of a rule's state per parameter.

Source: Harrison et al. 2022, "A Closer Look at Learned Optimization: Stability, Robustness, and Inductive Biases".
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metalearn import random
from metalearn.analysis.optimizers import Linearised
from metalearn.base import InnerState, Params, Rule, StepOutput, require_range
from metalearn.optim.first_order import SGD
from metalearn.problems.baselines import curves
from metalearn.unroll import Descent


def spectral_radius(hessian_DD: Tensor, alpha: float, preconditioner_DD: Tensor | None = None) -> float:
    """``rho(I - (alpha I + P) H)`` of the rule ``x <- x - (alpha I + P) g``: it diverges exactly where this is above 1.

    Args:
        hessian_DD: H, symmetric.
        alpha: the nominal learning rate.
        preconditioner_DD: P; null for 0.
    """
    eye = torch.eye(len(hessian_DD), dtype=hessian_DD.dtype)
    matrix = alpha * eye if preconditioner_DD is None else alpha * eye + preconditioner_DD
    return float(torch.linalg.eigvals(eye - matrix @ hessian_DD).abs().max())


def stability(linear: Linearised, curvatures: Sequence[float]) -> pd.DataFrame:
    """The spectral radius of parameter and state together, for each curvature k: ``[[1 + direct k, c], [b k, A]]``.

    With ``g = k x`` this is the matrix of ``(x, h)``. A rule that does the same to every coordinate has on a whole H the
    radius of the worst of its eigenvalues. Modes of the state that no gradient moves and no update shows are left in: a
    state that grows by itself is unstable.

    Args:
        linear: the rule, from ``linearise``; exact for rules that are linear in their gradients.
        curvatures: of the quadratic.

    Returns:
        Columns curvature, radius.
    """
    size, radii = len(linear.b_N), []
    for curvature in curvatures:
        matrix = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        matrix[0, 0], matrix[0, 1:] = 1 + linear.direct * curvature, linear.c_N
        matrix[1:, 0], matrix[1:, 1:] = linear.b_N * curvature, linear.a_NN
        radii.append(float(torch.linalg.eigvals(matrix).abs().max()))
    return pd.DataFrame({"curvature": np.asarray(curvatures, dtype=float), "radius": radii})


class NoisyQuadratic(Descent):
    """Descent on ``(x - mu_t)' H (x - mu_t) / 2`` from ``x = (1, ..., 1)``, mu_t normal; the loss of a step is ``x' H x / 2``.

    Args:
        hessian_DD: H, symmetric and positive definite, in the precision of the run.
        noise: standard deviation of the entries of mu_t, at least 0.

    Raises:
        ValueError: for negative noise, or an H that is not symmetric and positive definite.
    """

    terminal = False

    def __init__(self, hessian_DD: Tensor, noise: float = 0.0):
        super().__init__(SGD())
        require_range("noise", noise, 0.0)
        if not torch.equal(hessian_DD, hessian_DD.T) or torch.linalg.eigvalsh(hessian_DD).min() <= 0:
            raise ValueError("hessian is not symmetric and positive definite; accepted: one that is")
        self.hessian_DD, self.noise = hessian_DD, noise

    def init_meta(self, key: Tensor) -> Params:
        return {}

    def rule_meta(self, meta: Params) -> Params:
        return meta

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, {"x": self.hessian_DD.new_ones(len(self.hessian_DD))}, {})

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        away = state.params["x"] - self.noise * random.normal(key, (len(self.hessian_DD),)).to(self.hessian_DD)
        return (away @ self.hessian_DD @ away) / 2, state.buffers

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        state, output = super().step(meta, state, batch, key)
        x = state.params["x"]
        return state, output._replace(loss=(x @ self.hessian_DD @ x) / 2)


def simulate(
    rule: Rule, hessian_DD: Tensor, metas: Params | None = None, steps: int = 400, noise: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """Runs of a rule on a noisy quadratic, one for each index of the leaves of ``metas``, all on the same noise.

    Args:
        rule: any rule.
        hessian_DD: H of ``NoisyQuadratic``.
        metas: meta-parameters with a first axis of runs, such as learning rates (R,); null for one run of the rule's own.
        steps: T, at least 1.
        noise: as in ``NoisyQuadratic``.
        seed: of the noise.

    Returns:
        Columns run, step (1 ... T), loss.

    Raises:
        ValueError: for values out of range.
    """
    runs = len(next(iter(metas.values()))) if metas else 1
    keys_R = random.key(seed, "simulate").expand(runs)
    losses_RT = curves(NoisyQuadratic(hessian_DD, noise), rule, metas or {}, keys_R, steps, per_run=bool(metas))
    run, step = np.indices(losses_RT.shape)
    return pd.DataFrame({"run": run.ravel(), "step": step.ravel() + 1, "loss": losses_RT.numpy().ravel()})


def growth(losses: Sequence[float]) -> float:
    """The factor by which a run's distance from the minimum grows per step: ``exp`` of half the slope of its log loss.

    The slope is the least-squares one over the second half of the steps before the loss overflows or vanishes. Without noise
    it tends to the spectral radius; with noise it is about 1 where the run is stable.

    Args:
        losses: of one run, step by step, at least 4 of them positive and finite.

    Raises:
        ValueError: for fewer.
    """
    values = np.asarray(losses, dtype=float)
    usable = np.isfinite(values) & (values > np.finfo(float).tiny)
    length = len(values) if usable.all() else int(np.argmin(usable))
    require_range("number of losses before one overflows or vanishes", length, 4)
    steps = np.arange(length // 2, length)
    return math.exp(float(np.polyfit(steps, np.log(values[length // 2 : length]), 1)[0]) / 2)
