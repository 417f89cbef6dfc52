"""Tasks that are functions drawn at random, whose targets are numbers and whose best predictors are known.

B tasks in a batch, T examples of a sequence, D features, K tasks of the pool, P positions asked for, F features that a
function is linear in, H hidden units.
"""

import functools
import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import BASE, Batch, MetaTest, MetaTrain, Oracle, Split, TaskDistribution, require_range
from metalearn.tasks.oracles import nearest_neighbour

LARGEST_POOL = (
    2**16
)  # tasks that the posterior over a pool is computed for: a second per hundred sequences of 16 examples
_BLOCK = 2**21  # numbers of that computation held at once


class FunctionTasks(TaskDistribution):
    """y = f(x) + noise · ε with ε ~ N(0, 1): f belongs to the task, x and ε to the sequence.

    Task k < num_tasks of the pool is drawn from its own key and never stored, and pools are nested. Sequence i of step s is a
    function of (seed, s, i) alone; evaluation streams do not depend on the step.

    Streams: ``seen`` (tasks of the pool on new inputs; only with finite ``num_tasks``) and ``unseen`` (new tasks). Validation
    and test have tasks and inputs of their own.
    """

    num_classes = 1

    def __init__(self, num_features: int, num_tasks: int | None, noise: float, seed: int | None):
        require_range("num_features", num_features, 1)
        require_range("num_tasks", 1 if num_tasks is None else num_tasks, 1, 2**31)
        require_range("noise", noise, 0)
        self.num_features, self.num_tasks, self.noise, self.seed = num_features, num_tasks, noise, seed
        self._sealed = True

    @abstractmethod
    def inputs(self, key_B: Tensor, length: int) -> Tensor:
        """x (B, T, D) of sequences with these keys."""

    @abstractmethod
    def values(self, task_B: Tensor, x_BTD: Tensor) -> Tensor:
        """f(x) (B, T) of the tasks with these keys."""

    @abstractmethod
    def law(self) -> tuple[Any, ...]:
        """The settings that functions, inputs and noise follow from, but for the pool and the seed."""

    def streams(self) -> tuple[str, ...]:
        return ("seen", "unseen") if self.num_tasks else ("unseen",)

    def open(self, *, test: bool) -> None:
        self._sealed = self._sealed and not test

    def record(self) -> dict[str, Any]:
        fingerprint = hashlib.sha256(repr((type(self).__name__, *self.law())).encode()).hexdigest()
        return {"seed": self.seed, "fingerprint": {BASE: fingerprint}}

    def batch(
        self, step: int, first: int, tasks: int, length: int, split: Split, device: torch.device | str = "cpu"
    ) -> Batch:
        self._require_allowed(split)
        path = ("train", step) if isinstance(split, MetaTrain) else (type(split).__name__, split.stream)
        visit_B = random.fold(self._key(*path, device=device), torch.arange(first, first + tasks, device=device))
        x_BTD = self.inputs(random.fold(visit_B, "inputs"), length)
        noise_BT = random.normal(random.fold(visit_B, "noise"), (length,))
        return Batch(x_BTD, self.values(self.task_keys(visit_B, split), x_BTD) + self.noise * noise_BT)

    def task_keys(self, visit_B: Tensor, split: Split) -> Tensor:
        """The keys (B,) of the tasks of sequences with keys ``visit_B``."""
        own_B = random.fold(visit_B, "task")
        if self.num_tasks is None or not (isinstance(split, MetaTrain) or split.stream == "seen"):
            return own_B
        return self.pool_keys(random.integers(own_B, (), self.num_tasks))

    def pool_keys(self, number_B: Tensor) -> Tensor:
        """The keys (B,) of these tasks of the pool."""
        return random.fold(self._key("pool", device=number_B.device), number_B)

    def _key(self, *labels: int | str, device: torch.device | str) -> Tensor:
        if self.seed is None:
            raise ValueError("seed is None; accepted: an integer, or null in a config with seed_everything")
        return random.key(self.seed, *labels, device=device)

    def _require_allowed(self, split: Split) -> None:
        if not isinstance(split, MetaTrain) and split.stream not in self.streams():
            raise ValueError(f"stream is {split.stream!r}; accepted: {', '.join(self.streams())}")
        if isinstance(split, MetaTest) and self._sealed:
            raise ValueError(f"the data of {split} are sealed until open(test=True)")


class LinearRegression(FunctionTasks):
    """y = w·x + noise · ε with w, x ~ N(0, I_D): linear regression from a pool of K weight vectors.

    Oracles: ``ridge`` is the Bayes predictor for fresh tasks, the posterior mean under w ~ N(0, I), which is ridge
    regression with penalty noise²; ``dMMSE`` that of a pool, the posterior mean under w uniform on its K vectors (only for at
    most 2^16 of them); ``mean`` answers the mean target so far. All answer 0, or the pool's mean, before the first example.

    Args:
        num_features: D, at least 1 (the paper: 8, with sequences of 16 examples).
        num_tasks: weight vectors K of the pool, 1 … 2^31 (the paper: 2^1 … 2^20); null for a new one in every sequence.
        noise: standard deviation of the targets about w·x, at least 0.001, because posteriors divide by its square (the
            paper: 0.5).
        seed: of tasks and sequences; null follows ``seed_everything``.

    Raises:
        ValueError: for values out of range, another stream, or meta-test sequences asked for before ``open(test=True)``.

    Source: Raventós et al. 2023, "Pretraining task diversity and the emergence of non-Bayesian in-context learning for
    regression", section 2.
    """

    def __init__(
        self, num_features: int = 8, num_tasks: int | None = None, noise: float = 0.5, seed: int | None = None
    ):
        super().__init__(num_features, num_tasks, noise, seed)
        require_range("noise", noise, 1e-3)

    @property
    def chance_loss(self) -> float:
        """E y² = D + noise²."""
        return self.num_features + self.noise**2

    def law(self) -> tuple[Any, ...]:
        return self.num_features, self.noise

    def oracles(self) -> Mapping[str, Oracle]:
        ridge = functools.partial(linear_posterior_mean, variance=self.noise**2)
        pool = self.num_tasks is not None and self.num_tasks <= LARGEST_POOL
        return {"ridge": ridge} | ({"dMMSE": self.pool_posterior_mean} if pool else {}) | {"mean": running_mean}

    def inputs(self, key_B: Tensor, length: int) -> Tensor:
        return random.normal(key_B, (length, self.num_features))

    def values(self, task_B: Tensor, x_BTD: Tensor) -> Tensor:
        return (x_BTD * self.weights(task_B).unsqueeze(1)).sum(-1)

    def weights(self, task_B: Tensor) -> Tensor:
        """w (B, D) of the tasks with these keys."""
        return random.normal(random.fold(task_B, "weights"), (self.num_features,))

    def pool_posterior_mean(self, x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int]) -> Tensor:
        """dMMSE: ``discrete_posterior_mean`` under this pool."""
        assert self.num_tasks is not None
        pool_KD = self.weights(self.pool_keys(torch.arange(self.num_tasks, device=x_BTD.device)))
        return discrete_posterior_mean(x_BTD, y_BT, positions, pool_KD, self.noise**2)


class Sinusoids(FunctionTasks):
    """y = A sin(x - φ) + noise · ε with A ~ U[0.1, 5], φ ~ U[0, π], x ~ U[-5, 5]: one feature.

    Because y = a sin x + b cos x with a = A cos φ and b = -A sin φ, the oracle ``sine regression`` is linear: of all answers
    that are linear in the targets seen it has the least squared error, given mean and covariance of (a, b). Without noise two
    examples determine the function, and it knows it from the third on. The posterior mean, which is not linear because
    (a, b) are not normal, may be better before. ``1-nearest-neighbour`` knows nothing of sines.

    Args:
        num_tasks: functions K of the pool, 1 … 2^31; null for a new one in every sequence.
        noise: standard deviation of the targets, at least 0 (the paper: 0).
        seed: of tasks and sequences; null follows ``seed_everything``.

    Raises:
        ValueError: for values out of range, another stream, or meta-test sequences asked for before ``open(test=True)``.

    Source: Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", section 5.1.
    """

    def __init__(self, num_tasks: int | None = None, noise: float = 0.0, seed: int | None = None):
        super().__init__(1, num_tasks, noise, seed)

    @property
    def chance_loss(self) -> float:
        """E y² = E A² / 2 + noise², because φ covers half a turn evenly, whatever x is."""
        return _AMPLITUDE_SQUARE / 2 + self.noise**2

    def law(self) -> tuple[Any, ...]:
        return (self.noise,)

    def oracles(self) -> Mapping[str, Oracle]:
        return {"sine regression": self.sine_regression, "1-nearest-neighbour": nearest_neighbour}

    def inputs(self, key_B: Tensor, length: int) -> Tensor:
        return 10 * random.uniform(key_B, (length, 1)) - 5

    def values(self, task_B: Tensor, x_BTD: Tensor) -> Tensor:
        low, high = _AMPLITUDES
        amplitude_B = low + (high - low) * random.uniform(random.fold(task_B, "amplitude"))
        phase_B = math.pi * random.uniform(random.fold(task_B, "phase"))
        return amplitude_B.unsqueeze(1) * (x_BTD.squeeze(-1) - phase_B.unsqueeze(1)).sin()

    def sine_regression(self, x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int]) -> Tensor:
        """The best linear estimate of (a, b), applied: (B, P). Noise counts as at least 10⁻⁴: else the equations were singular."""
        waves_BTF = torch.cat([x_BTD.sin(), x_BTD.cos()], dim=-1)
        mean_b = -sum(_AMPLITUDES) / 2 * 2 / math.pi  # E sin φ = 2 / π, E cos φ = 0, E cos² φ = E sin² φ = 1 / 2
        covariance = (_AMPLITUDE_SQUARE / 2, _AMPLITUDE_SQUARE / 2 - mean_b**2)
        return linear_posterior_mean(
            waves_BTF, y_BT, positions, max(self.noise, 1e-4) ** 2, prior_mean=(0.0, mean_b), prior_variance=covariance
        )


_AMPLITUDES = 0.1, 5.0
_AMPLITUDE_SQUARE = sum(a * b for a in _AMPLITUDES for b in _AMPLITUDES if a <= b) / 3  # E A² = (l² + lh + h²) / 3


class MLPTeachers(FunctionTasks):
    """y = (Σ_h a_h relu(u_h·x) - mean) / deviation + noise · ε, with a, u and x standard normal: random two-layer networks.

    Mean and deviation over x are those of the task's own network, in closed form: every task has targets of mean 0 and
    variance 1 + noise². With θ the angle of u and v, ``E relu(u·x) relu(v·x) = |u| |v| (sin θ + (π - θ) cos θ) / 2π`` and
    ``E relu(u·x) = |u| / √(2π)``.

    Oracles: ``ridge``, whose penalty takes the share π / (2π - 2) = .73 of the variance that is linear in x (of the expected
    squares over tasks) for signal, spread evenly over features, and the rest for noise; ``1-nearest-neighbour``.

    Args:
        num_features: D, at least 1.
        hidden: units H, at least 1.
        num_tasks: networks K of the pool, 1 … 2^31; null for a new one in every sequence.
        noise: standard deviation of the targets about the network's output, at least 0.
        seed: of tasks and sequences; null follows ``seed_everything``.

    Raises:
        ValueError: for values out of range, another stream, or meta-test sequences asked for before ``open(test=True)``.

    Source: Cho and Saul 2009, "Kernel Methods for Deep Learning", equation 6 (the moments); Garg et al. 2022, "What Can
    Transformers Learn In-Context?", section 4 (such tasks, without the normalisation of each).
    """

    def __init__(
        self,
        num_features: int = 8,
        hidden: int = 32,
        num_tasks: int | None = None,
        noise: float = 0.0,
        seed: int | None = None,
    ):
        super().__init__(num_features, num_tasks, noise, seed)
        require_range("hidden", hidden, 1)
        self.hidden = hidden

    @property
    def chance_loss(self) -> float:
        """E y² = 1 + noise²."""
        return 1 + self.noise**2

    def law(self) -> tuple[Any, ...]:
        return self.num_features, self.hidden, self.noise

    def oracles(self) -> Mapping[str, Oracle]:
        linear = math.pi / (2 * math.pi - 2)
        prior = (linear / self.num_features,) * self.num_features
        ridge = functools.partial(linear_posterior_mean, variance=1 - linear + self.noise**2, prior_variance=prior)
        return {"ridge": ridge, "1-nearest-neighbour": nearest_neighbour}

    def inputs(self, key_B: Tensor, length: int) -> Tensor:
        return random.normal(key_B, (length, self.num_features))

    def values(self, task_B: Tensor, x_BTD: Tensor) -> Tensor:
        u_BHD = random.normal(random.fold(task_B, "hidden weights"), (self.hidden, self.num_features))
        a_BH = random.normal(random.fold(task_B, "output weights"), (self.hidden,))
        mean_B, deviation_B = relu_moments(u_BHD, a_BH)
        sum_BT = ((x_BTD @ u_BHD.mT).relu() * a_BH.unsqueeze(1)).sum(-1)
        return (sum_BT - mean_B.unsqueeze(1)) / deviation_B.unsqueeze(1)


def relu_moments(u_BHD: Tensor, a_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B,) of Σ_h a_h relu(u_h·x) over x ~ N(0, I), computed in float64."""
    u_BHD, a_BH = u_BHD.double(), a_BH.double()
    length_BH = u_BHD.norm(dim=-1)
    lengths_BHH = length_BH.unsqueeze(1) * length_BH.unsqueeze(2)
    cosine_BHH = (u_BHD @ u_BHD.mT / lengths_BHH).clamp(-1, 1)
    angle_BHH = cosine_BHH.acos()
    square_BHH = lengths_BHH * ((1 - cosine_BHH.square()).sqrt() + (math.pi - angle_BHH) * cosine_BHH)
    covariance_BHH = (square_BHH - lengths_BHH) / (2 * math.pi)
    variance_B = (a_BH.unsqueeze(1) @ covariance_BHH @ a_BH.unsqueeze(2)).flatten()
    mean_B = (a_BH * length_BH).sum(1) / math.sqrt(2 * math.pi)
    return mean_B.float(), variance_B.sqrt().float()


def linear_posterior_mean(
    x_BTF: Tensor,
    y_BT: Tensor,
    positions: Sequence[int],
    variance: float,
    prior_mean: Sequence[float] | None = None,
    prior_variance: Sequence[float] | None = None,
) -> Tensor:
    """E[w | examples before t]·x_t under w ~ N(m, diag(v)) and targets N(w·x, variance): (B, P), computed in float64.

    ``w_t = m + (X'X + variance · diag(1 / v))⁻¹ X'(y - X m)`` over the examples before t. With m = 0 and v = 1, the defaults,
    this is ridge regression with penalty ``variance``; for other priors of these moments it is the best linear estimate.
    """
    x, y, at = x_BTF.double(), y_BT.double(), list(positions)
    mean_F = x.new_zeros(x.shape[-1]) if prior_mean is None else x.new_tensor(prior_mean)
    precision_F = torch.ones_like(mean_F) if prior_variance is None else 1 / x.new_tensor(prior_variance)
    squares_BTFF = x.unsqueeze(-1) * x.unsqueeze(-2)
    products_BTF = x * (y - x @ mean_F).unsqueeze(-1)
    gram_BPFF = (squares_BTFF.cumsum(1) - squares_BTFF)[:, at] + variance * precision_F.diag()
    moment_BPF = (products_BTF.cumsum(1) - products_BTF)[:, at]
    return (x[:, at] * (mean_F + torch.linalg.solve(gram_BPFF, moment_BPF))).sum(-1).to(y_BT.dtype)


def discrete_posterior_mean(
    x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int], pool_KD: Tensor, variance: float
) -> Tensor:
    """E[w | examples before t]·x_t under w uniform on the pool and targets N(w·x, variance): (B, P), computed in float64.

    The posterior of task k is proportional to ``exp(-Σ_{s<t} (y_s - w_k·x_s)² / (2 variance))``. Tasks come in blocks, whose
    sums are kept relative to the greatest exponent so far, so that no likelihood is lost and memory does not grow with K.

    Source: Raventós et al. 2023, equation 4.
    """
    x, y, pool_KD = x_BTD.double(), y_BT.double(), pool_KD.double()
    greatest_BT, mass_BT, total_BT = torch.full_like(y, -math.inf), torch.zeros_like(y), torch.zeros_like(y)
    for block_kD in pool_KD.split(max(1, _BLOCK // y.numel())):
        answer_BTk = x @ block_kD.T
        exponent_BTk = (y.unsqueeze(-1) - answer_BTk).square().div_(-2 * variance)
        exponent_BTk = exponent_BTk.cumsum(1).sub_(exponent_BTk)  # of the examples before t
        raised_BT = torch.maximum(greatest_BT, exponent_BTk.amax(-1))
        kept_BT = (greatest_BT - raised_BT).exp()
        weight_BTk = exponent_BTk.sub_(raised_BT.unsqueeze(-1)).exp_()
        mass_BT = mass_BT * kept_BT + weight_BTk.sum(-1)
        total_BT = total_BT * kept_BT + (weight_BTk * answer_BTk).sum(-1)
        greatest_BT = raised_BT
    return (total_BT / mass_BT)[:, list(positions)].to(y_BT.dtype)


def running_mean(x_BTD: Tensor, y_BT: Tensor, positions: Sequence[int]) -> Tensor:
    """The mean of the targets so far, and 0 before the first: (B, P)."""
    seen_T = torch.arange(y_BT.shape[1], device=y_BT.device).clamp(min=1)
    return ((y_BT.cumsum(1) - y_BT) / seen_T)[:, list(positions)]
