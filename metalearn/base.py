"""The contracts that hold the house together.

Shape letters: B tasks in a batch, T sequence positions, D input features, K classes or outputs, Q independent
queries. Contracts of later residents (losses, update rules, inner problems, estimators) are added here with their
first implementer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

BASE = "base"  # the data set of the training tasks, among those of a task distribution


class Batch(NamedTuple):
    """Labelled sequences: ``x`` float (B, T, D), ``y`` class indices int64 (B, T)."""

    x: Tensor
    y: Tensor


class Examples(NamedTuple):
    """Labelled examples: ``inputs`` (N, ...), ``targets`` int64 (N,) class indices or float (N,) regression targets."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class MetaTrain:
    """What ``fit`` learns from: the pool of training tasks, made of training examples."""


@dataclass(frozen=True)
class MetaValidation:
    """What ``fit`` may look at: one named evaluation stream over validation tasks and validation examples."""

    stream: str


@dataclass(frozen=True)
class MetaTest:
    """What only ``test`` may look at: one named evaluation stream over test tasks and test examples."""

    stream: str


Split = MetaTrain | MetaValidation | MetaTest


class TaskDistribution(ABC):
    """A distribution over labelled sequences that is a pure function of (seed, step, index, split).

    The seed is an attribute, so that a resumed run continues its stream with no state but the step, and every world
    size sees the same global batch: rank r of a batch of B tasks each asks for ``first = r * B``.
    """

    num_features: int
    num_classes: int
    seed: int | None

    @abstractmethod
    def batch(
        self, step: int, first: int, tasks: int, length: int, split: Split, device: torch.device | str = "cpu"
    ) -> Batch:
        """Sequences ``first ... first + tasks - 1`` of global step ``step``, each of ``length`` examples, on ``device``."""

    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """Names of the evaluation streams, for ``MetaValidation`` and ``MetaTest``."""

    @abstractmethod
    def open(self, *, test: bool) -> None:
        """Read the data of ``fit`` and ``validate`` or, with ``test=True``, also the meta-test data, which are sealed before."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What checkpoints and run folders say of the data, in builtins, after ``open``.

        At least ``seed`` and ``fingerprint``: a hash of content, options and revision of every data set by name,
        where the one that training tasks are made of is called ``BASE``.
        """


class Learner(nn.Module, ABC):
    """A sequence model that learns in context: causal, and the same function in parallel and step by step.

    Every constructor argument is kept as an attribute of the same name, so that a checkpoint can say how to rebuild
    it. The first two are ``num_inputs`` (features of a token) and ``num_outputs`` (classes).
    """

    num_inputs: int
    num_outputs: int

    @abstractmethod
    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """Logits (B, T, K); the logits of position t depend on tokens 0 ... t only."""

    @abstractmethod
    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token; the first axis of every leaf is the sequence."""

    @abstractmethod
    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        """``T`` calls of ``step`` at once: logits (B, T, K) and the state after the last token."""

    def step(self, token_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One position: logits (B, K) and the next state. Neither argument is changed."""
        logits_BTK, state = self.prefill(token_BD.unsqueeze(1), state)
        return logits_BTK.squeeze(1), state

    @abstractmethod
    def branch(self, tokens_BQD: Tensor, state: State) -> Tensor:
        """Logits (B, Q, K) of Q alternative next tokens for each sequence, none of which sees the others."""

    @abstractmethod
    def state_size(self, length: int) -> int:
        """Floats that the next prediction can depend on after ``length`` tokens, per sequence."""

    @abstractmethod
    def flops_per_token(self, length: int) -> int:
        """Forward floating-point operations per token, averaged over a sequence of ``length`` tokens (2 per multiply-add)."""


class Source(ABC):
    """Examples of one data set in three disjoint parts, "train", "validation" and "test", each read when first asked for."""

    num_classes: int
    revision: str | None = None  # commit, branch or tag, where the data set has such a thing
    repeat: ClassVar[bool] = False  # whether a sequence may hold an example more than once

    @abstractmethod
    def read(self, part: str) -> Examples:
        """The examples of one part, as float32 inputs (N, D) normalised by statistics of "train" alone."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of content, options and revision; the same whichever parts were read. A separate test split is not covered."""


def require_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; accepted: {low} <= {name} <= {high}")


def require_choice(name: str, value: object, choices: Mapping[str, object] | tuple[object, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(repr(c) for c in choices)}")
