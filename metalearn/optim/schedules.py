"""Schedules: the factor of a learning rate as a function of the updates taken so far, for ``Scheduled``.

Each takes an int64 tensor, of one run or under ``vmap``, and returns a float64 tensor.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from metalearn.base import require_range


class Schedule(ABC):
    """The factor of a learning rate."""

    @abstractmethod
    def __call__(self, step: Tensor) -> Tensor:
        """The factor of the update that comes after ``step`` others."""


class Decay(Schedule):
    """From 1 to ``final``, after a warm-up ``(t + 1) / warmup_steps``; t counts from 0, and ``final`` stays after the end."""

    def __init__(self, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> None:
        require_range("warmup_steps", warmup_steps, 0)
        require_range("total_steps", total_steps, warmup_steps + 1)
        require_range("final", final, 0.0)
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final = final

    def __call__(self, step: Tensor) -> Tensor:
        time = step.double()
        left = self._left(((time - self.warmup_steps) / (self.total_steps - self.warmup_steps)).clamp(0.0, 1.0))
        factor = self.final + (1 - self.final) * left
        return factor * ((time + 1) / self.warmup_steps).clamp(max=1.0) if self.warmup_steps else factor

    @abstractmethod
    def _left(self, progress: Tensor) -> Tensor:
        """The share of the way from 1 to ``final`` that is left at progress 0 ... 1."""


class Linear(Decay):
    """``final + (1 - final) (1 - r)``, where r goes from 0 after the warm-up to 1 at ``total_steps``.

    Args:
        total_steps: Update at which ``final`` is reached, > ``warmup_steps``.
        warmup_steps: Updates in which the factor rises to 1 in equal parts, >= 0.
        final: Last factor, >= 0.

    Raises:
        ValueError: A value is out of range.
    """

    def _left(self, progress: Tensor) -> Tensor:
        return 1 - progress


class Cosine(Decay):
    """``final + (1 - final) (1 + cos(pi r)) / 2``, where r goes from 0 after the warm-up to 1 at ``total_steps``.

    Args:
        total_steps: Update at which ``final`` is reached, > ``warmup_steps``.
        warmup_steps: Updates in which the factor rises to 1 in equal parts, >= 0.
        final: Last factor, >= 0.

    Raises:
        ValueError: A value is out of range.

    Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, eq. 5.
    Differs from the paper: no restarts; a warm-up.
    """

    def _left(self, progress: Tensor) -> Tensor:
        return (1 + torch.cos(math.pi * progress)) / 2


class InverseTime(Schedule):
    """``(1 + t / steps)^-power``, where t counts from 0.

    Args:
        steps: Updates in which the base doubles, > 0.
        power: Exponent, >= 0.

    Raises:
        ValueError: A value is out of range.

    Source: Wu et al., "Understanding short-horizon bias in stochastic meta-optimization", ICLR 2018.
    """

    def __init__(self, steps: float, power: float = 1.0) -> None:
        require_range("steps", steps, math.ulp(0.0))
        require_range("power", power, 0.0)
        self.steps = steps
        self.power = power

    def __call__(self, step: Tensor) -> Tensor:
        return (1 + step.double() / self.steps) ** -self.power
