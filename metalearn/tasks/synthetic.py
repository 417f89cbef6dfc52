"""Data sets that are drawn, not read."""

import hashlib
import math
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metalearn.base import Examples, Source, require_choice, require_range
from metalearn.random import fold, integers, key, normal, uniform
from metalearn.tasks.examples import PARTS


@dataclass(eq=False)
class RandomSource(Source):
    """A fixed set of standard normal inputs with uniformly random labels, the same in every part: only to be memorised.

    Args:
        num_examples: N, >= 1.
        num_features: D, >= 1.
        num_classes: K, >= 1.
        seed: of the inputs and labels.
    """

    num_examples: int = 20
    num_features: int = 784
    num_classes: int = 10
    seed: int = 0

    repeat: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("num_examples", "num_features", "num_classes"):
            require_range(option, getattr(self, option), 1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """``("0", "1", ...)``."""
        return tuple(str(label) for label in range(self.num_classes))

    def read(self, part: str) -> Examples:
        """The examples, whichever the part."""
        require_choice("part", part, PARTS)
        inputs_ND = normal(key(self.seed, "inputs"), (self.num_examples, self.num_features))
        return Examples(inputs_ND, integers(key(self.seed, "targets"), (self.num_examples,), self.num_classes))

    def fingerprint(self) -> str:
        """SHA-256 of the inputs and targets."""
        inputs_ND, targets_N = self.read("train")
        return hashlib.sha256(inputs_ND.numpy().tobytes() + targets_N.numpy().tobytes()).hexdigest()


@dataclass(eq=False)
class HeavyTailedRegression(Source):
    """A smooth function whose "train" targets alone carry heavy-tailed noise: losses that forgive outliers must win.

    ``f(x) = sum_j a_j sin(w_j . x + b_j)``, j = 1 ... 16, x standard normal, scaled to mean 0 and deviation 1. Targets of
    "train" are f(x) + noise_scale t with t of Student's distribution; those of "validation" and "test" are f(x) itself.

    A network of 32 tanh units trained for 1000 steps, the learning rate chosen on "validation" for each loss, has a squared
    error on "test" of .34, .97, .60 under squared errors, .15, .11, .22 under absolute ones (seeds 0, 1, 2 of the source,
    means over five runs; deviations up to .12 and .03).

    Args:
        num_features: D, >= 1.
        num_train: examples of "train", >= 1.
        num_validation: examples of "validation", >= 1.
        num_test: examples of "test", >= 1.
        degrees_of_freedom: of t, > 0; below 2 its variance is infinite.
        noise_scale: factor of t, >= 0.
        seed: of function, inputs and noise.

    Source of t: Bailey 1994, "Polar generation of random variates with the t-distribution", theorem 1.
    """

    num_features: int = 4
    num_train: int = 1000
    num_validation: int = 1000
    num_test: int = 2000
    degrees_of_freedom: float = 1.5
    noise_scale: float = 1.0
    seed: int = 0

    num_classes: ClassVar[int] = 1  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        for option in ("num_features", "num_train", "num_validation", "num_test"):
            require_range(option, getattr(self, option), 1)
        require_range("degrees_of_freedom", self.degrees_of_freedom, math.ulp(0.0))
        require_range("noise_scale", self.noise_scale, 0)

    def read(self, part: str) -> Examples:
        require_choice("part", part, PARTS)
        part_key, count = key(self.seed, part), getattr(self, f"num_{part}")
        inputs_ND = normal(fold(part_key, "inputs"), (count, self.num_features))
        targets_N = self.function(inputs_ND)
        if part == "train":
            noise_N = student(fold(part_key, "noise"), (count,), self.degrees_of_freedom)
            targets_N = targets_N + self.noise_scale * noise_N
        return Examples(inputs_ND, targets_N)

    def function(self, inputs_ND: Tensor) -> Tensor:
        """f of inputs (N, D): (N,)."""
        own, waves = key(self.seed, "function"), 16
        w_DJ = normal(fold(own, "w"), (self.num_features, waves)) / math.sqrt(self.num_features)
        a_J, b_J = normal(fold(own, "a"), (waves,)), 2 * math.pi * uniform(fold(own, "b"), (waves,))
        # Over x, mean and covariance of the waves are known: w . x is normal, and E sin(u + b) = sin(b) exp(-var(u) / 2).
        gram_JJ = w_DJ.T @ w_DJ
        square_J = gram_JJ.diagonal()
        mean_J = b_J.sin() * (-square_J / 2).exp()
        apart, together = b_J[:, None] - b_J, b_J[:, None] + b_J
        total_JJ = (square_J[:, None] + square_J) / 2
        products_JJ = (apart.cos() * (gram_JJ - total_JJ).exp() - together.cos() * (-gram_JJ - total_JJ).exp()) / 2
        variance = a_J @ (products_JJ - mean_J[:, None] * mean_J) @ a_J
        return ((inputs_ND @ w_DJ + b_J).sin() @ a_J - a_J @ mean_J) / variance.sqrt()

    def fingerprint(self) -> str:
        """SHA-256 of every argument, from which all examples follow."""
        return hashlib.sha256(repr((type(self).__name__, *astuple(self))).encode()).hexdigest()


def student(key: Tensor, shape: tuple[int, ...], degrees_of_freedom: float) -> Tensor:
    """float32 draws of Student's distribution: ``sqrt(n (U^(-2/n) - 1)) cos(2 pi V)`` with n degrees of freedom."""
    u, v = 1 - uniform(fold(key, "radius"), shape), uniform(fold(key, "angle"), shape)
    radius = torch.expm1(-2 / degrees_of_freedom * u.log())
    return (degrees_of_freedom * radius).sqrt() * (2 * math.pi * v).cos()
