"""The contracts that hold the house together.

Shape letters: B tasks in a batch, T sequence positions, D input features, K classes or outputs, Q independent
queries. Two joints hold everything together: ``TaskDistribution`` x ``Learner`` (what learns in context) and
``InnerProblem`` x ``Estimator`` (what is learned through a training run, and how that run is differentiated).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap

State = dict[str, Tensor]
Params = dict[str, Tensor]
Tree = Any  # nested dictionaries and named tuples of tensors

# A reference learner: x (B, T, D), y (B, T) and P positions -> its answers (B, P) at these, each from the examples before
# it alone, as y is: classes or numbers.
Oracle = Callable[[Tensor, Tensor, Sequence[int]], Tensor]

BASE = "base"  # the data set of the training tasks, among those of a task distribution


class Batch(NamedTuple):
    """Labelled sequences: ``x`` float (B, T, D), ``y`` (B, T) class indices, int64, or in regression numbers, float."""

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
    num_classes: int  # 1 in regression, where targets are numbers
    seed: int | None

    @property
    def chance_loss(self) -> float:
        """Loss of the answer that looks at nothing: ln K nats; in regression that of the answer 0, the targets' mean square."""
        return math.log(self.num_classes)

    @abstractmethod
    def oracles(self) -> Mapping[str, Oracle]:
        """Reference learners by name, to be set beside a learner on the very same sequences."""

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
    it. The first two are ``num_inputs`` (features of a token) and ``num_outputs`` (classes; 1 in regression). Neither
    ``state_size`` nor anything else depends on more than sizes. Where there are such, the layer that reads tokens is
    called ``embed`` and the one that answers ``head``: optimizers that treat matrices apart leave these two alone.
    """

    num_inputs: int
    num_outputs: int
    can_be_stacked: ClassVar[bool] = (
        True  # whether ``torch.func.vmap`` batches it over members with weights of their own
    )

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


class Loss(nn.Module, ABC):
    """A criterion, used as those of ``torch.nn``; its parameters are meta-parameters."""

    output: (
        str  # what it makes of a module's raw output z: "softmax" or "sigmoid" probabilities, "identity" in regression
    )

    @abstractmethod
    def per_example(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        """Losses (N,) of raw outputs and of targets as probabilities or numbers."""

    @abstractmethod
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss, reduced as the criterion was built to."""


class Rule(ABC):
    """An optimizer as a pure, differentiable function. Trees in, trees out; no argument is changed.

    ``meta`` holds hyper-parameters (or the weights of a learned rule) by name, each a tensor to differentiate by; what
    it lacks is taken from the rule's own settings, so that ``{}`` is always accepted; ``init`` and ``update`` are
    given the same names.
    """

    needs_loss: bool = False  # whether ``update`` makes use of ``loss``

    @abstractmethod
    def init(self, meta: Params, params: Params) -> Tree:
        """The state before the first update: nested dictionaries of tensors."""

    @abstractmethod
    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        """The parameters and the state after one update."""


class InnerState(NamedTuple):
    """All of an inner run: every leaf a tensor, so that it can be stacked, batched, stored and differentiated through."""

    params: Params
    buffers: Params  # of the module, batch statistics for one
    rule: Tree  # the optimizer's
    step: Tensor  # int64 (), steps taken since the start of the episode
    extra: Params  # what the run is given and never changes: its own horizon, a task's configuration, parameters of other levels


class StepOutput(NamedTuple):
    """What one inner step adds to the meta-objective."""

    loss: Tensor  # this step's share of the meta-objective; 0 where the objective is terminal
    done: Tensor  # bool: the episode's last step; the next step, if any, begins with a fresh inner run


class Batches(NamedTuple):
    """The data of one window by reference, so that recomputation sees the same tensors."""

    inner: Callable[[int], Any]  # the batch of the window's k-th step, k = 0 ... steps - 1
    outer: Any
    steps: int


class InnerProblem(ABC):
    """What is learned through: a training run as pure functions of the meta-parameters. Estimators see nothing else.

    The meta-objective of an episode is the sum of its steps' losses plus ``outer`` at its end. An endless run
    (``horizon`` None) is asked for ``outer`` at the end of every window.

    Functions are written for one run. The engine batches them by ``vmap`` over particles and tasks, except ``init``,
    which it calls run by run; ``step_runs`` may do better, with the same results. ``outer`` draws nothing but from a key in
    its batch. Keys are ``metalearn.random`` keys; equal keys give equal results.
    """

    horizon: int | None = None  # steps of an episode
    rule: Rule | None = None  # where a step is this rule applied to the gradient of ``inner_loss``
    terminal: bool = True  # whether ``outer`` is the whole meta-objective, every step's loss being 0
    differentiable: bool = True  # whether ``step`` may be differentiated; else zeroth-order estimators only
    equal_lengths: bool = True  # whether all episodes have as many steps
    global_generator: bool = False  # whether ``step`` draws from torch's global generator, as dropout does
    rank: int = 0  # of a distributed run, which divides outer examples (or tasks) among its ranks
    world: int = 1

    @abstractmethod
    def init_meta(self, key: Tensor) -> Params:
        """The meta-parameters before meta-training."""

    @abstractmethod
    def init(self, meta: Params, key: Tensor) -> InnerState:
        """The start of an episode."""

    @abstractmethod
    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        """One inner step."""

    def step_runs(
        self, metas_R: Params, states_R: InnerState, batch: Any, keys_R: Tensor
    ) -> tuple[InnerState, StepOutput]:
        """``step`` of R runs, each with meta-parameters, a state and a key of its own; the batch is one for all."""
        return vmap(self.step, (0, 0, None, 0), randomness="error")(metas_R, states_R, batch, keys_R)

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        """The terminal part of the meta-objective, a scalar; 0 where every part of it is in the steps' losses."""
        return torch.zeros((), device=state.step.device)

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        """The loss that the inner run minimises, and the buffers after; what implicit estimators and mixed mode need."""
        raise NotImplementedError

    @property
    def has_inner_loss(self) -> bool:
        """Whether the problem says what its inner run minimises."""
        return type(self).inner_loss is not InnerProblem.inner_loss

    def rule_meta(self, meta: Params) -> Params:
        """The part of ``meta`` that the rule is given: its learned hyper-parameters, under the rule's own names."""
        return {}

    # -- what meta-training asks for, besides --

    def open(self, *, test: bool) -> None:
        """Read the data, those of the final test only with ``test=True``."""
        return

    def record(self) -> dict[str, Any]:
        """What checkpoints say of the data, in builtins: ``fingerprint``, a hash by data set, and ``division``.

        The latter holds the settings that say which examples are for what; no checkpoint is used under others.
        """
        return {"fingerprint": {}, "division": {}}

    def batches(self, key: Tensor, steps: int) -> Batches:
        """The data of a window; of outer examples, ``rank``'s equal share of a draw that all ranks agree on."""
        return Batches(lambda k: None, None, steps)

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """What a user wants to know of learned meta-parameters, by name."""
        return {}


class MetaGradient(NamedTuple):
    """An estimate of the gradient of the meta-objective."""

    grad: Params
    loss: Tensor  # the meta-objective of the window
    state: Tree  # the estimator's, after
    diagnostics: dict[str, Tensor]  # scalars


class Response(ABC):
    """How the end of an inner run responds to the meta-parameters: the linear operator d(params)/d(meta), transposed."""

    @abstractmethod
    def vjp(self, cotangent: Params) -> Params:
        """``(d params / d meta)^T cotangent``, in the shape of the meta-parameters. May be called more than once."""


class Estimator(ABC):
    """A way of differentiating through an inner run. Pure: state in, state out, no argument changed.

    ``shards`` says what the ranks of a distributed run divide among them: "outer" examples, "directions" or
    antithetic "pairs". Averaging the gradients over ranks gives the gradient of one process.
    """

    shards: str = "outer"
    rank: int = 0
    world: int = 1
    reduce: Callable[[Params], Params] | None = (
        None  # mean over ranks that divide outer examples; None where there is one
    )

    @abstractmethod
    def refusal(self, problem: InnerProblem) -> str | None:
        """Why this estimator cannot work on ``problem``, in a sentence that names what is missing; None where it can."""

    @abstractmethod
    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        """The state before the first estimate: particles, accumulators, warm starts. ``ValueError`` where refused."""

    @abstractmethod
    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        """The gradient of the window's meta-objective, and the state after the window."""


def require_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; accepted: {low} <= {name} <= {high}")


def require_whole(name: str, value: float, low: int, high: float = float("inf")) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number, ``low <= value <= high``."""
    if not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; accepted: whole numbers, {low} <= {name} <= {high}")
    require_range(name, value, low, high)


def require_choice(name: str, value: object, choices: Mapping[str, object] | tuple[object, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(repr(c) for c in choices)}")
