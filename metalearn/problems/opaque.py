"""An inner solver that autograd cannot see into: a partial differential equation stepped in numpy.

Letters: N grid points, u_N a velocity at each.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metalearn.base import Batches, InnerProblem, InnerState, Params, StepOutput, require_range
from metalearn.random import key as random_key
from metalearn.random import normal
from metalearn.unroll import ended


class Burgers(InnerProblem):
    """The velocity with which a viscous flow began, sought from the velocity in which it ended.

    Inner: u_t + (u^2 / 2)_x = viscosity u_xx on a circle of length 1 from u_0 = S lambda, by Euler's method in time and central
    differences in space. Outer: (1/N) |u_horizon - observed|^2 / 2. Meta-parameters: "velocity" lambda (N,), float64, which
    begin as what was observed. S shrinks waves of number k by exp(-2 pi^2 k^2 smoothness^2), so that short waves, which
    viscosity hides from the observer, stay out of u_0.

    A step is numpy's, so that only zeroth-order estimators apply, one run at a time (``chunk`` 1). What is observed is the
    same solver's end from a velocity that is drawn from ``seed``, plus noise.

    Args:
        num_points: N, at least 4.
        viscosity: of the fluid, > 0. Waves of number k shrink by exp(-4 pi^2 k^2 viscosity duration) and cannot be found
            again once they are below the noise.
        duration: of the flow, > 0. Velocities are of order 1, and times in units of once around.
        smoothness: length over which the velocity that is sought changes, >= 0; at 0, S is the identity.
        horizon: inner steps that the duration is divided into, at least 1.
        substeps: Euler steps of an inner step, at least 1.
        num_waves: wave numbers 1 ... num_waves of the velocity that is sought, from 1 to (N - 1) / 2.
        noise: standard deviation of the observations' error, >= 0.
        seed: of the velocity that is sought and of the noise.

    Raises:
        ValueError: for values out of range, or an Euler step so long that it would blow up: above dx^2 / (2 viscosity), or
            above viscosity / 2, which lets velocities reach 2.

    Source: the setting of Shen et al. 2024, "Memory-Efficient Gradient Unrolling for Large-Scale Bi-level Optimization",
    section on black-box optimization: meta-parameters of a differential equation behind a solver that is not differentiable.
    Differs from the paper: one field is sought, by its own values, instead of a network over many.
    """

    differentiable = False

    def __init__(
        self,
        num_points: int = 64,
        viscosity: float = 0.01,
        duration: float = 0.2,
        smoothness: float = 0.04,
        horizon: int = 5,
        substeps: int = 8,
        num_waves: int = 3,
        noise: float = 0.0,
        seed: int = 0,
    ):
        require_range("num_points", num_points, 4)
        require_range("horizon", horizon, 1)
        require_range("substeps", substeps, 1)
        require_range("num_waves", num_waves, 1, (num_points - 1) // 2)
        require_range("smoothness", smoothness, 0)
        require_range("noise", noise, 0)
        for name, value in (("viscosity", viscosity), ("duration", duration)):
            if not value > 0:
                raise ValueError(f"{name} is {value!r}; accepted: {name} > 0")
        self.num_points, self.viscosity, self.horizon, self.substeps = num_points, viscosity, horizon, substeps
        self.substep = duration / (horizon * substeps)
        require_range("duration / (horizon substeps)", self.substep, 0, self._longest_substep())
        self.smoother_NN = _smoother(num_points, smoothness)
        self.sought_N = self._sought(num_waves, random_key(seed, "velocity"))
        self.observed_N = self._observe(noise, random_key(seed, "noise"))

    def _longest_substep(self) -> float:
        return min(1 / (2 * self.viscosity * self.num_points**2), self.viscosity / 2)

    def _sought(self, num_waves: int, key: Tensor) -> Tensor:
        """Waves of random phases, and sizes that fall with their number; the largest velocity is 1."""
        angle_WN = 2 * torch.pi * torch.outer(torch.arange(1, num_waves + 1), torch.arange(self.num_points))
        angle_WN = angle_WN.double() / self.num_points
        size_2W = normal(key, (2, num_waves)).double() / torch.arange(1, num_waves + 1)
        u_N = size_2W[0] @ angle_WN.sin() + size_2W[1] @ angle_WN.cos()
        return u_N / u_N.abs().max()

    def _observe(self, noise: float, key: Tensor) -> Tensor:
        u_N = self.sought_N
        for _ in range(self.horizon or 0):
            u_N = self.solve(u_N)
        return u_N + noise * normal(key, (self.num_points,)).double()

    def init_meta(self, key: Tensor) -> Params:
        return {"velocity": self.observed_N.to(key.device, copy=True)}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        step = torch.zeros((), dtype=torch.int64, device=key.device)
        return InnerState({"velocity": self.first(meta)}, {}, {}, step, {})

    def first(self, meta: Params) -> Tensor:
        """The velocity u_0 (N,) that the flow begins with."""
        return self.smoother_NN.to(meta["velocity"]) @ meta["velocity"]

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        u_N = self.solve(state.params["velocity"])
        state = state._replace(params={"velocity": u_N}, step=state.step + 1)
        return state, StepOutput(u_N.new_zeros(()), ended(self, state))

    def solve(self, u_N: Tensor) -> Tensor:
        """The velocity one inner step later. numpy refuses tensors that carry a gradient, and those under ``vmap``."""
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # a flow that blows up ends as inf or nan, as it does in torch
            after_N = self._flow(u_N.cpu().numpy(), np.roll)
        return torch.from_numpy(after_N).to(u_N.device)

    def _flow(self, u_N: Any, roll: Callable) -> Any:
        """``substeps`` Euler steps of an array, by its own library's ``roll``."""
        for _ in range(self.substeps):
            left_N, right_N = roll(u_N, 1, -1), roll(u_N, -1, -1)
            convection_N = (right_N**2 - left_N**2) * (self.num_points / 4)
            diffusion_N = (left_N - 2 * u_N + right_N) * (self.viscosity * self.num_points**2)
            u_N = u_N + self.substep * (diffusion_N - convection_N)
        return u_N

    def outer(self, meta: Params, state: InnerState, batch: Tensor) -> Tensor:
        return (state.params["velocity"] - batch).square().mean() / 2

    def batches(self, key: Tensor, steps: int) -> Batches:
        return Batches(lambda k: None, self.observed_N.to(key.device), steps)

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """``error`` |u_0 - sought| / |sought|."""
        sought_N = self.sought_N.to(key.device)
        return {"error": float((self.first(meta) - sought_N).norm() / sought_N.norm())}


class TransparentBurgers(Burgers):
    """The same flow in torch, which can be differentiated: what the opaque one is measured against."""

    differentiable = True

    def solve(self, u_N: Tensor) -> Tensor:
        return self._flow(u_N, torch.roll)


def _smoother(num_points: int, length: float) -> Tensor:
    """The symmetric matrix S (N, N), float64."""
    wave_N = torch.fft.fftfreq(num_points, 1 / num_points, dtype=torch.float64)
    shrink_N = (-2 * (torch.pi * wave_N * length).square()).exp()
    unit_NN = torch.eye(num_points, dtype=torch.float64)
    return torch.fft.ifft(shrink_N.unsqueeze(1) * torch.fft.fft(unit_NN, dim=0), dim=0).real
