"""Ratios of two ways of doing the same thing, on a machine that does other things too.

Both ways are warmed up, then timed in turns (A B, B A, A B, …), so that whatever slows the machine down slows both.
The median of the pairs' ratios is the result; absolute times are for orientation only.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHORTEST = 0.1  # seconds: shorter calls are repeated, so that a sample is long against the clock and the scheduler


class UnequalError(Exception):
    """Two ways that were to be compared do not do the same thing."""


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of both ways, pair by pair."""

    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """theirs / ours of each pair: above 1 where ours is faster."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of ``ratios``."""
        return statistics.median(self.ratios)


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int = 7, seconds: float = 30
) -> Comparison:
    """Time two ways in interleaved pairs, after warming them up; past ``seconds`` no further pair is begun."""
    ways, deadline = (ours, theirs), time.perf_counter() + seconds
    for way in ways:
        seconds_per_call(way)
    repeats = [max(1, math.ceil(_SHORTEST / seconds_per_call(way))) for way in ways]
    samples: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            samples[side].append(seconds_per_call(ways[side], repeats[side]))
        if time.perf_counter() > deadline:
            break
    return Comparison(*samples)


def seconds_per_call(way: Callable[[], object], repeats: int = 1) -> float:
    """Wall seconds of one call, averaged over ``repeats``; a way that returns a float has timed itself."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    answers = [way() for _ in range(repeats)]
    wait()
    own = [answer for answer in answers if isinstance(answer, float)]
    return (sum(own) if own else time.perf_counter() - start) / repeats


def require_alike(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise ``UnequalError`` unless shapes and types agree."""
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        raise UnequalError(f"{what}: {tuple(ours.shape)} {ours.dtype} against {tuple(theirs.shape)} {theirs.dtype}")


def require_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Raise ``UnequalError`` unless shapes and types agree, and values up to an absolute ``tolerance``."""
    require_alike(what, ours, theirs)
    if not (distance := float((ours - theirs).abs().max())) <= tolerance:
        raise UnequalError(f"{what} differ by {distance:.2e}; accepted: at most {tolerance:.0e}")
