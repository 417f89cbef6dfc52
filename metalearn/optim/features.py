"""What learned rules see of a training run: running means, time, and statistics of whole tensors; and a layer that reads it.

Letters: P parameters of all tensors together; T tensors; D decays; S time scales; ``…`` leading axes.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn.optim.layout import Layout

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
NORMALISER_EPS = 1e-5


def running_mean(mean_P: Tensor, value_P: Tensor, kept: float) -> Tensor:
    """``kept mean + (1 - kept) value``, not corrected for its start at 0."""
    return torch.lerp(mean_P, value_P, 1 - kept)


def weights_held(step: Tensor, kept: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``1 - k^step`` (…, D) of D shares k: the weight of ``step`` >= 1 values in a running mean that started at 0."""
    # In float32, 1 - 0.999^t would have no more than four digits.
    shares_D = _constants(tuple(kept), torch.float64, step.device)
    return (1 - shares_D ** step.double().unsqueeze(-1)).to(dtype)


def time_features(step: Tensor, scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``tanh(t / s - 1)`` of t updates taken so far (…) and each scale s: (…, S).

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned optimizers", appendix D.
    """
    return (step.to(dtype).unsqueeze(-1) / _constants(tuple(scales), dtype, step.device)).sub(1).tanh()


def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # which has its own way with constants, and warns of caches
        return torch.tensor(values, dtype=dtype, device=device)
    return _kept_constants(values, dtype, device)


@functools.lru_cache(maxsize=64)
def _kept_constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that is made once: a GPU waits for one that is copied to it."""
    return torch.tensor(values, dtype=dtype, device=device)


def second_moment_normaliser(layout: Layout, x_P: Tensor) -> Tensor:
    """``1 / sqrt(1e-5 + mean x^2)`` of each tensor (…, T), with which its entries are multiplied.

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of learned optimizers", appendix D.
    """
    return (tensor_means(layout, x_P.square()) + NORMALISER_EPS).rsqrt()


def tensor_means(layout: Layout, x_P: Tensor) -> Tensor:
    """The mean over each tensor, 0 for one without entries: (…, T)."""
    means = [part.mean(-1) if part.shape[-1] else part.sum(-1) for part in layout.split(x_P)]
    return torch.stack(means, -1)


def spread(layout: Layout, x_T: Tensor) -> Tensor:
    """The value of each tensor (…, T) at each of its entries: (…, P)."""
    values = x_T.split(1, -1)
    return torch.cat([value.expand(*value.shape[:-1], n) for value, n in zip(values, layout.sizes, strict=True)], -1)


def affine(matrix: Tensor, added: Tensor, values: Tensor) -> Tensor:
    """``matrix values + added`` of (…, out, in), (…, in, n) and (…, out, n or 1), in one pass; values have all leading axes."""
    if values.dim() == 2:
        return torch.addmm(added, matrix, values)
    leading = values.shape[:-2]
    flat = (x.expand(*leading, *x.shape[-2:]).flatten(0, -3) for x in (added, matrix, values))
    return torch.baddbmm(*flat).unflatten(0, leading)
