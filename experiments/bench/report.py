"""How every benchmark shows what it measured: a header, then a row per comparison."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.bench.timing import Comparison, UnequalError, compare


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

    def as_builtins(self) -> dict[str, Any]:
        """As JSON has it, the samples in seconds."""
        ratio = self.measured.ratio
        met = None if self.bar is None else ratio >= self.bar
        sides = {"ours": list(self.measured.ours), "theirs": list(self.measured.theirs), "unit": "s"}
        return {"name": self.name, "ratio": ratio, "bar": self.bar, "met": met, **sides}


@dataclass(frozen=True)
class Bounded:
    """One line of the report: two ways, and their ratio ours / theirs against a bar."""

    name: str
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str
    bar: float | None = None
    at_least: bool = False  # whether the bar is a lower one

    @property
    def ratio(self) -> float:
        """The median over pairs."""
        return statistics.median(self._ratios)

    @property
    def met(self) -> bool:
        assert self.bar is not None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar

    @property
    def _ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def __str__(self) -> str:
        ours, theirs = (f"{statistics.median(side):,.1f}" for side in (self.ours, self.theirs))
        spread = f"{self.ratio:.2f} [{min(self._ratios):.2f}, {max(self._ratios):.2f}]"
        sign, verdict = (">=", "BELOW") if self.at_least else ("<=", "ABOVE")
        judged = "" if self.bar is None else f"{sign} {self.bar:<5.3g} {'ok' if self.met else verdict}"
        return f"{self.name:<56}{ours:>10}{theirs:>10} {self.unit:<8} {spread:<22} {judged}".rstrip()

    def as_builtins(self) -> dict[str, Any]:
        """As JSON has it, the samples in the unit of the row."""
        met, sides = None if self.bar is None else self.met, {"ours": list(self.ours), "theirs": list(self.theirs)}
        return {"name": self.name, "ratio": self.ratio, "bar": self.bar, "met": met, **sides, "unit": self.unit}


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


def report(groups: Mapping[str, Callable[[], Iterator[Row | Bounded]]], path: Path | None = None) -> None:
    """Print each group's rows as they come; what is found unequal has none. Write all to a JSON file where there is one."""
    written: list[dict[str, Any]] = []
    for name, rows in groups.items():
        try:
            for row in rows():
                print(row, flush=True)
                written.append(row.as_builtins())
        except UnequalError as error:
            print(f"{name}: NOT MEASURED: {error}", flush=True)
            written.append({"name": name, "error": str(error)})
    if path is not None:
        path.write_text(json.dumps(written, indent=1))
