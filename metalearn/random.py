"""Counter-based random numbers: a pure function of (key, shape), the same on every device and rank, and vmappable.

A key is an int64 tensor of any shape; every function draws independently for each of its elements, and the shape
asked for comes after the key's own axes. Element j of key k is SplitMix64's output function applied to ``k + j *
GOLDEN`` (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators", fig. 16); child keys are
hashes of their parent. Integers are equal bit by bit on every device; floats up to the rounding of ``erfinv``.
"""

import functools
import math
import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # int64 spelling of the odd constants of SplitMix64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_UNIT = 2.0**-31 * (1 - 2.0**-23)  # takes every int32 into (-1, 1), never onto its ends


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's bijective output function, in place; ``>>`` keeps the sign in torch, so the mask makes it logical."""
    shifted = (x >> 30).bitwise_and_(2**34 - 1)
    x.bitwise_xor_(shifted).mul_(_MIX_1)
    shifted.copy_(x).bitwise_right_shift_(27).bitwise_and_(2**37 - 1)  # one scratch tensor, not three
    x.bitwise_xor_(shifted).mul_(_MIX_2)
    shifted.copy_(x).bitwise_right_shift_(31).bitwise_and_(2**33 - 1)
    return x.bitwise_xor_(shifted)


def _mix_number(number: int) -> int:
    """``_mix`` of a Python integer: what is known on the host costs no device operation."""
    x = number % 2**64
    x = (x ^ (x >> 30)) * (_MIX_1 % 2**64) % 2**64
    x = (x ^ (x >> 27)) * (_MIX_2 % 2**64) % 2**64
    return x ^ (x >> 31)


def _salt(datum: int | str) -> int:
    """A mixed constant for an integer, or for a string by its CRC-32."""
    return _mix_number(((zlib.crc32(datum.encode()) if isinstance(datum, str) else datum) + 1) * _GOLDEN)


def key(seed: int, *labels: int | str, device: torch.device | str = "cpu") -> Tensor:
    """The scalar key of ``seed`` (any Python int, taken modulo 2^64) and a path of labels."""
    number = _mix_number(seed + _GOLDEN)
    for label in labels:
        number = _mix_number(number + _salt(label))
    return torch.full((), _signed(number), dtype=torch.int64, device=device)  # a fill, not a copy that a GPU waits for


def fold(parent: Tensor, *data: int | str | Tensor) -> Tensor:
    """The child key ``mix(parent + mix((datum + 1) * GOLDEN))`` under each datum in turn; integer tensors broadcast."""
    for datum in data:
        salt = _mix((datum + 1) * _GOLDEN) if isinstance(datum, Tensor) else _signed(_salt(datum))
        parent = _mix(parent + salt)
    return parent


def bits(key: Tensor, count: int) -> Tensor:
    """``count`` int64 words of 64 random bits for each key: (*key.shape, count)."""
    return _mix(key.unsqueeze(-1) + _counter(count, key.device))


@functools.lru_cache(maxsize=16)
def _counter(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _GOLDEN


def uniform(key: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """float32 uniforms in [0, 1) on a grid of 2^-24: (*key.shape, *shape)."""
    words = bits(key, math.prod(shape))
    return ((words >> 40) & (2**24 - 1)).float().mul_(2.0**-24).reshape((*key.shape, *shape))


def normal(key: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """float32 standard normals, ``sqrt(2) erfinv(u)`` with u uniform in (-1, 1): (*key.shape, *shape).

    Every word gives two numbers of 32 bits, of which u keeps 24; the largest possible magnitude is 5.29.
    """
    count = math.prod(shape)
    halves = bits(key, (count + 1) // 2).view(torch.int32)[..., :count]
    return halves.float().mul_(_UNIT).erfinv_().mul_(math.sqrt(2)).reshape((*key.shape, *shape))


def truncated_normal(key: Tensor, shape: tuple[int, ...] = (), cut: float = 2.0) -> Tensor:
    """float32 standard normals, those left out that are more than ``cut`` away from 0: (*key.shape, *shape)."""
    share = math.erf(cut / math.sqrt(2))  # of those that stay
    return uniform(key, shape).mul_(2).sub_(1).mul_(share).erfinv_().mul_(math.sqrt(2))


def integers(key: Tensor, shape: tuple[int, ...], high: int | Tensor) -> Tensor:
    """int64 uniform in [0, high), 1 <= high <= 2^31: (*key.shape, *shape). The bias of the multiply-shift is below high / 2^32.

    A tensor ``high`` has one for each key, broadcasts against them, and is not checked: a GPU would have to be waited for.
    """
    if isinstance(high, Tensor):
        high = high.unsqueeze(-1)
    elif not 1 <= high <= 2**31:
        raise ValueError(f"high is {high}; accepted: 1 <= high <= 2^31")
    words = bits(key, math.prod(shape)) >> 32 & (2**32 - 1)
    return ((words * high) >> 32).reshape((*key.shape, *shape))


def permutation(key: Tensor, size: int) -> Tensor:
    """A uniformly random permutation of 0 ... size-1 for each key: (*key.shape, size)."""
    return bits(key, size).argsort(dim=-1)


def distinct(key: Tensor, count: int, high: int) -> Tensor:
    """``count`` different integers below ``high`` in random order for each key: (*key.shape, count).

    Small ranges are permuted whole. From large ones more are drawn than needed, and the first ``count`` different
    ones kept; with at least ``8 count + 64`` values to draw from, too few differ with probability below 1e-15.
    """
    if count > high:
        raise ValueError(f"cannot draw count = {count} different integers below high = {high}; accepted: count <= high")
    if high < 8 * count + 64:
        return permutation(key, high)[..., :count]
    drawn = integers(key, (2 * count + 16,), high)
    ordered, order = drawn.sort(dim=-1, stable=True)
    repeated = torch.zeros_like(drawn, dtype=torch.bool)
    again = torch.cat([torch.zeros_like(ordered[..., :1], dtype=torch.bool), ordered[..., 1:] == ordered[..., :-1]], -1)
    repeated = repeated.scatter(-1, order, again)
    kept = repeated.int().argsort(dim=-1, stable=True)[..., :count]
    return drawn.gather(-1, kept)
