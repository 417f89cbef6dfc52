"""How every benchmark shows what it measured: a header, then a row per comparison."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.bench.timing import Comparison, compare


@dataclass(frozen=True)
class Row:
    """One line of the report: milliseconds per call, or units per second of a call that does ``amount`` of them."""

    name: str
    measured: Comparison
    bar: float | None = None
    amount: float | None = None
    unit: str = "ms"

    def __str__(self) -> str:
        ratio, ratios = self.measured.ratio, self.measured.ratios
        ours, theirs = self._shown(self.measured.ours), self._shown(self.measured.theirs)
        verdict = "" if self.bar is None else f">= {self.bar:<4g} {'ok' if ratio >= self.bar else 'BELOW'}"
        spread = f"{ratio:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        return f"{self.name:<56}{ours:>10}{theirs:>10} {self.unit:<8} {spread:<22} {verdict}".rstrip()

    def _shown(self, samples: Sequence[float]) -> str:
        seconds = float(np.median(samples))
        shown = 1e3 * seconds if self.amount is None else self.amount / seconds
        return f"{shown:,.2f}" if shown < 1000 else f"{shown:,.0f}"


@dataclass(frozen=True)
class Effort:
    """What one row may cost: at most ``pairs`` pairs, and none begun after ``seconds``."""

    pairs: int
    seconds: float

    def compare(self, ours: Callable[[], object], theirs: Callable[[], object]) -> Comparison:
        return compare(ours, theirs, self.pairs, self.seconds)


def header(data: str) -> str:
    """Machine, versions, time and data, without which the numbers below say nothing."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores, threads = f"{os.cpu_count()} cores (load {os.getloadavg()[0]:.1f})", torch.get_num_threads()
    return (
        f"{platform.machine()}, {cores}, torch {torch.__version__} with {threads} threads, {device}\n"
        f"{time.strftime('%Y-%m-%d %H:%M')}, commit {commit}, images: {data}\n\n"
        f"{'':<56}{'ours':>10}{'theirs':>10} {'':<8} {'ratio [min, max]':<22} bar"
    )
