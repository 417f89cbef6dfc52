"""What a search proposes and what it knows of each proposal, in builtins: what checkpoints and hall of fame are made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn.base import Loss
from metalearn.losses.elementwise import ElementwiseLoss
from metalearn.losses.learned import LearnedLoss
from metalearn.losses.program import Program, canonical_weights
from metalearn.losses.taylor import TaylorLoss
from metalearn.search.gradients import CandidateGradients, MixedGradients, ModuleGradients, SymbolicGradients


class Candidate(NamedTuple):
    """A loss: a program with weights of its edges, or, without a program, the eight numbers of a Taylor polynomial."""

    program: Program | None
    weights: tuple[float, ...] = ()  # () for all ones

    @property
    def canonical(self) -> Candidate:
        """The same loss, written so that equal losses are written alike more often."""
        if self.program is None:
            return self
        weights = canonical_weights(self.program, self.weights) if self.weights else ()
        return Candidate(self.program.canonical, weights)

    @property
    def text(self) -> str:
        """What it is, on one line."""
        return "taylor" if self.program is None else str(self.program)

    @property
    def num_weights(self) -> int:
        """Numbers that can be tuned."""
        return len(self.weights) if self.program is None else self.program.num_weights

    @property
    def complexity(self) -> int:
        """That of the program; the number of its numbers for a polynomial."""
        return len(self.weights) if self.program is None else self.program.complexity

    @property
    def name(self) -> str:
        """A short hash that equal candidates share: what draws of its own are keyed by, and the cache."""
        return hashlib.sha256(repr((self.text, self.weights)).encode()).hexdigest()[:16]

    def loss(self, output: str, **options: Any) -> ElementwiseLoss:
        """The criterion."""
        if self.program is None:
            return TaylorLoss(list(self.weights), output=output, **options)
        return LearnedLoss(self.program, list(self.weights) or None, output=output, **options)


class Scored(NamedTuple):
    """A candidate, and what became of it."""

    candidate: Candidate  # as it was proposed
    tuned: tuple[float, ...] = ()  # weights after local search, under which it was trained; () where there was none
    errors: tuple[float, ...] = ()  # of each task, on validation examples; () where it was never trained to the end
    verdict: str = "scored"  # or why not: "dead", "not finite", "wrong sign", "rejected", "diverged", "halved"
    like: str = ""  # the name of the earlier candidate whose gradient, and so errors, it has after tuning; "" for none

    @property
    def error(self) -> float:
        """Mean over tasks; infinite where it was never trained to the end."""
        return sum(self.errors) / len(self.errors) if self.errors else math.inf

    @property
    def family(self) -> str:
        """A name that candidates of one gradient share."""
        return self.like or self.candidate.canonical.name

    @property
    def best(self) -> Candidate:
        """The candidate with the weights that its errors are of."""
        return self.candidate._replace(weights=self.tuned) if self.tuned else self.candidate

    def to_builtins(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        program = self.candidate.program
        named = {"program": None if program is None else str(program), "weights": list(self.candidate.weights)}
        return named | {
            "tuned": list(self.tuned),
            "errors": list(self.errors),
            "verdict": self.verdict,
            "like": self.like,
        }

    @classmethod
    def from_builtins(cls, saved: dict[str, Any]) -> Scored:
        """The inverse of ``to_builtins``."""
        program = None if saved["program"] is None else Program.parse(saved["program"])
        candidate = Candidate(program, tuple(saved["weights"]))
        return cls(candidate, tuple(saved["tuned"]), tuple(saved["errors"]), saved["verdict"], saved["like"])


def gradients_of(losses: Sequence[Candidate | Loss], output: str) -> CandidateGradients:
    """The gradients of candidates and of finished losses as one population, in their order.

    Programs go by generated code, if they are of this output and have no weights of classes; all else by autograd.

    Args:
        losses: candidates, to which ``output`` applies, and losses, which have their own.
        output: "softmax", "sigmoid" or "identity".
    """
    symbolic: list[tuple[int, Program, Tensor]] = []
    others: list[tuple[int, Loss]] = []
    for place, loss in enumerate(losses):
        if isinstance(loss, LearnedLoss) and loss.weight is None and loss.output == output:
            symbolic.append((place, loss.program, loss.weights.detach()))
        elif isinstance(loss, Candidate) and loss.program is not None:
            symbolic.append((place, loss.program, torch.tensor(loss.weights, dtype=torch.float64)))
        else:
            others.append((place, loss.loss(output) if isinstance(loss, Candidate) else loss))
    parts: list[CandidateGradients] = []
    if symbolic:
        parts.append(SymbolicGradients([row[1] for row in symbolic], [row[2] for row in symbolic], output))
    if others:
        parts.append(ModuleGradients([loss for _, loss in others]))
    if len(parts) == 1:
        return parts[0]
    order = [place for place, *_ in symbolic] + [place for place, _ in others]
    return MixedGradients(parts).select(sorted(range(len(order)), key=order.__getitem__))
