"""Training runs under a loss that is learned: the base task of loss search, and the inner problem of loss tuning.

Shape letters: N examples, D input features, K classes or outputs.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from metalearn import random, tree
from metalearn.base import Examples, InnerState, Loss, Params, Rule, Source, require_range
from metalearn.losses.elementwise import one_hot
from metalearn.losses.learned import load_loss
from metalearn.losses.standard import standard_name
from metalearn.problems.training_runs import TrainingRun
from metalearn.unroll import Tasks, unroll

UNTOUCHED = "untouched"


class LossTask(TrainingRun):
    """A module trained under a loss whose parameters are meta-parameters; the meta-objective is the task's own.

    Inner: the loss on a batch of "train". Outer: cross-entropy, or in regression squared error summed over outputs, of
    validation examples. The source's validation part is divided: what is learned sees the first of it, and
    "untouched" is for scoring what was found. Targets that are floating-point numbers make it regression, with raw
    outputs; class indices make it classification, with softmax outputs, or one sigmoid output.

    Args:
        source: labelled examples; the "test" part is read for ``open(test=True)`` only.
        model: class and settings of the module, which is called with the numbers of features and of outputs.
        rule: of the inner run.
        loss: text, JSON file or name of a loss, or a loss; null for the task's own.
        horizon: steps of an episode, at least 1; null for an endless one.
        batch_size: different examples of an inner step, at least 1; null for all.
        outer_batch_size: different validation examples of a window, over all ranks, at least 1; null for all.
        init_seed: of initial parameters that are the same in every episode; null for new ones.
        untouched: share of the source's validation part that is kept from the search, in [0, 1).
        sigmoid: whether two classes are told apart by one sigmoid output instead of a softmax.
        scale_targets: whether regression targets are centred and divided by their deviation, both of "train".
        evaluation_steps: of the runs that ``evaluate`` compares, at least 1; null for ``horizon``.
        evaluation_runs: under each loss, at least 1.

    Raises:
        ValueError: for values out of range; by ``open``, for more than two classes with ``sigmoid``, targets to scale that
        are all the same, and a loss of another output than the task's.
    """

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        loss: str | Loss | None = None,
        horizon: int | None = None,
        batch_size: int | None = 128,
        outer_batch_size: int | None = 128,
        init_seed: int | None = None,
        untouched: float = 0.5,
        sigmoid: bool = False,
        scale_targets: bool = True,
        evaluation_steps: int | None = None,
        evaluation_runs: int = 5,
    ):
        super().__init__(source, model, rule, horizon, batch_size, outer_batch_size, init_seed)
        if not 0 <= untouched < 1:
            raise ValueError(f"untouched is {untouched!r}; accepted: 0 <= untouched < 1")
        require_range("evaluation_steps", 1 if evaluation_steps is None else evaluation_steps, 1)
        require_range("evaluation_runs", evaluation_runs, 1)
        self.untouched, self.sigmoid, self.scale_targets = untouched, sigmoid, scale_targets
        self.evaluation_steps, self.evaluation_runs = evaluation_steps, evaluation_runs
        self._given_loss, self._loss = loss, None

    # -- data --------------------------------------------------------------------------------------------------------

    def open(self, *, test: bool) -> None:
        super().open(test=test)
        if self.sigmoid and self.source.num_classes != 2:
            raise ValueError(f"sigmoid is true with {self.source.num_classes} classes; accepted: 2 classes")
        if self._loss is None:
            given = self._given_loss
            loss = given if isinstance(given, Loss) else load_loss(given or self.own_loss, output=self.output)
            self._loss = self._fitting(loss)

    def _fitting(self, loss: Loss) -> Loss:
        if loss.output != self.output:
            raise ValueError(f"the loss has output {loss.output!r}; accepted for this task: {self.output!r}")
        return loss

    def read(self, parts: list[str]) -> dict[str, Examples]:
        found = super().read(parts)
        if "train" in found and found["train"].targets.is_floating_point() and self.scale_targets:
            targets = found["train"].targets
            self._moments = targets.mean(), targets.std(correction=0)
            if not (std := float(self._moments[1])) > 0:
                raise ValueError(f"the train targets have deviation {std}; accepted with scale_targets: above 0")
        found = {part: Examples(inputs, self._scaled(targets)) for part, (inputs, targets) in found.items()}
        if "validation" in found:
            inputs, targets = found["validation"]
            first = len(targets) - round(self.untouched * len(targets))
            found["validation"] = Examples(inputs[:first], targets[:first])
            if first < len(targets):
                found[UNTOUCHED] = Examples(inputs[first:], targets[first:])
        return found

    def _scaled(self, targets: Tensor) -> Tensor:
        if not (targets.is_floating_point() and self.scale_targets):
            return targets
        mean, std = self._moments
        return (targets - mean) / std

    @property
    def regression(self) -> bool:
        """Whether targets are numbers."""
        if not self.parts:
            raise ValueError("the data are not read: call open(test=False) first")
        return self.parts["train"].targets.is_floating_point()

    @property
    def output(self) -> str:
        """What a loss makes of raw outputs: "softmax", "sigmoid" or "identity"."""
        return "identity" if self.regression else "sigmoid" if self.sigmoid else "softmax"

    @property
    def own_loss(self) -> str:
        """Name of the standard loss of the task."""
        return standard_name(self.output)

    @property
    def num_outputs(self) -> int:
        return 1 if self.sigmoid else self.source.num_classes

    def division(self) -> dict[str, Any]:
        return {"untouched": self.untouched}

    def target_matrix(self, targets: Tensor) -> Tensor:
        """Targets (N, K) as losses see them: one-hot, or a column of numbers."""
        dtype = next(self.module.parameters()).dtype
        if self.output != "softmax":
            return targets.to(dtype).reshape(len(targets), -1)
        return one_hot(targets, self.num_outputs, dtype)

    # -- the run -----------------------------------------------------------------------------------------------------

    @property
    def loss(self) -> Loss:
        """The loss that the module is trained under."""
        assert self._loss is not None, "open() builds the loss"
        return self._loss

    def with_loss(self, loss: Loss) -> "LossTask":
        """The same task, data and all, under another loss.

        Raises:
            ValueError: for a loss of another output than the task's, or before ``open``.
        """
        other = copy.copy(self)
        other.parts, other._loss = dict(self.parts), self._fitting(loss)
        return other

    def init_meta(self, key: Tensor) -> Params:
        like = next(self.module.parameters())
        named = self.loss.named_parameters()
        return {name: value.detach().clone().to(key.device, like.dtype) for name, value in named}

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        prediction, buffers = tree.call(self.module, state.params, state.buffers, batch.inputs)
        constants = {name: value.to(prediction.device) for name, value in self.loss.named_buffers()}
        return functional_call(self.loss, meta | constants, (prediction, batch.targets)), buffers

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return self.objective(self.predict(state, batch.inputs), batch.targets)

    def objective(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples of cross-entropy or squared error: predictions (..., N, K) and targets (N,) give (...)."""
        if self.output == "softmax":
            return -(functional.log_softmax(prediction, -1) * self.target_matrix(targets)).sum(-1).mean(-1)
        target_NK = self.target_matrix(targets)
        if self.output == "sigmoid":
            losses = functional.softplus(prediction) - prediction * target_NK
        else:
            losses = (prediction - target_NK).square()
        return losses.sum(-1).mean(-1)

    def error(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Share of wrong answers, or mean squared error: predictions (..., N, K) and targets (N,) give (...)."""
        if self.output == "softmax":
            return (prediction.argmax(-1) != targets).to(prediction.dtype).mean(-1)
        if self.output == "sigmoid":
            return ((prediction.squeeze(-1) > 0) != (targets > 0)).to(prediction.dtype).mean(-1)
        return self.objective(prediction, targets)

    def score(self, state: InnerState, part: str) -> dict[str, float]:
        """The task's objective and error on all examples of a part; of stacked runs, the means over them."""
        inputs, targets = self.examples(part, state.step.device)
        with torch.no_grad():
            runs = vmap(lambda one: self.predict(one, inputs), randomness="error") if state.step.ndim else None
            prediction = self.predict(state, inputs) if runs is None else runs(state)
        return {
            "loss": float(self.objective(prediction, targets).mean()),
            "error": float(self.error(prediction, targets).mean()),
        }

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """Loss and error of new runs under the loss with ``meta``, with the parameters it began with, and under the task's own.

        The runs under each loss start alike and see the same batches. Scored on "test" or, without ``test``, on
        "untouched" examples, or where none were kept on validation examples.

        Raises:
            ValueError: where the run is endless and ``evaluation_steps`` is null.
        """
        own = self.with_loss(load_loss(self.own_loss, output=self.output))
        compared = {"tuned": (self, meta), "initial": (self, self.init_meta(key)), "own": (own, own.init_meta(key))}
        part = "test" if test else UNTOUCHED if UNTOUCHED in self.parts else "validation"
        found = {name: task.score(task.runs(given, key), part) for name, (task, given) in compared.items()}
        return {f"{what}_{name}": values[what] for name, values in found.items() for what in values}

    def runs(self, meta: Params, key: Tensor) -> InnerState:
        """The ends of ``evaluation_runs`` new runs: every leaf has them as its first axis."""
        steps = self.horizon if self.evaluation_steps is None else self.evaluation_steps
        if steps is None:
            raise ValueError("horizon and evaluation_steps are None; accepted for an evaluation: a number of steps")
        runs = Tasks(self, self.evaluation_runs)
        batches = runs.batches(key, steps)
        with torch.no_grad():
            start = runs.init(meta, random.fold(key, "init"))
            return unroll(runs, meta, start, batches, random.fold(key, "steps")).end
