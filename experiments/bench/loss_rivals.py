"""What loss search is compared with: one candidate after the other, on classification with softmax outputs.

A rival is given the initial weights and the minibatches of ours, so that results can be compared. ``Loop`` is as fast as
plain torch allows; ``experiments.bench.loss_reference`` has the way of the public code.

Shape letters: N examples, K classes.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from metalearn import random
from metalearn.base import Params
from metalearn.losses.compiled import compile_loss
from metalearn.optim.first_order import SGD
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.candidates import Candidate

REJECTION_EXAMPLES = 100


class MetaStep(NamedTuple):
    """What one step of local search begins with: an initial model and rows of training and validation examples."""

    params: Params
    inner: Tensor
    outer: Tensor


def rows(task: LossTask, part: str, key: Tensor) -> Tensor:
    """The examples that the task draws under this key, by number."""
    size = task.batch_size if part == "train" else task.outer_batch_size
    count = len(task.parts[part].targets)
    return torch.arange(count, device=key.device) if size is None else random.distinct(key, size, count)


def meta_steps(task: LossTask, key: Tensor, count: int) -> list[MetaStep]:
    """What ``LocalSearch`` draws under this key, a model per meta-step."""
    found = []
    for step in range(count):
        step_key = fold(key, "steps", step)
        params, _ = task.initial(fold(step_key, "episode"))
        drawn = rows(task, "train", fold(step_key, "inner", 0)), rows(task, "validation", fold(step_key, "outer"))
        found.append(MetaStep(params, *drawn))
    return found


def first_weights(candidate: Candidate, key: Tensor, like: Tensor, std: float = 1e-3) -> Tensor:
    """What ``LocalSearch`` begins with under this key, for a candidate in canonical form without weights of its own."""
    assert candidate.program is not None and candidate == candidate.canonical and not candidate.weights
    drawn = random.normal(fold(key, "weights", candidate.name), (candidate.program.num_weights,))
    return (1 + std * drawn.double()).to(like)


class Rival(ABC):
    """Does what a search does to its candidates, one after the other.

    Args:
        task: opened; its rule is SGD.
        steps: of a training run.
        key: of the run, whose device is worked on: initial weights from "init", minibatches from "batch" and the step.
    """

    def __init__(self, task: LossTask, steps: int, key: Tensor):
        assert isinstance(task.rule, SGD) and task.output == "softmax"
        self.task, self.steps, self.key, self.rule = task, steps, key, task.rule
        self.train_part, self.validation = (task.examples(part, key.device) for part in ("train", "validation"))

    def module(self, params: Params) -> nn.Module:
        """A trainable module with these parameters."""
        module = copy.deepcopy(self.task.module).to(self.key.device)
        module.load_state_dict(params)
        return module

    def optimizer(self, parameters: Any, **options: Any) -> torch.optim.SGD:
        """torch's twin of the task's rule."""
        return torch.optim.SGD(parameters, nesterov=self.rule.nesterov, **self.rule.settings, **options)

    def batches(self) -> list[Tensor]:
        """Rows of every step."""
        return [rows(self.task, "train", fold(self.key, "batch", k)) for k in range(self.steps)]

    @abstractmethod
    def train(self, candidates: Sequence[Candidate]) -> tuple[list[Params], list[float]]:
        """Parameters of the models trained under each, and their validation errors."""

    @abstractmethod
    def tune(
        self, candidates: Sequence[Candidate], starts: Sequence[Tensor], meta_steps: Sequence[MetaStep], lr: float
    ) -> list[Tensor]:
        """Weights of each after Adam's steps, through one step of training each, from ``starts``."""

    @abstractmethod
    def rejected(self, candidates: Sequence[Candidate], params: Params, steps: int, lr: float) -> list[bool]:
        """Whether Adam's steps on the predictions of a new model leave them no better."""


class Loop(Rival):
    """The same work as fast as plain torch allows: compiled losses, tensors loaded once, ``torch.optim``'s foreach."""

    def train(self, candidates: Sequence[Candidate]) -> tuple[list[Params], list[float]]:
        start, _ = self.task.initial(fold(self.key, "init"))
        loaded = [self._loaded("train", chosen) for chosen in self.batches()]
        trained, errors = [], []
        for candidate in candidates:
            module, loss = self.module(start), self.loss(candidate)
            optimizer = self.optimizer(module.parameters(), foreach=True)
            for inputs, target_NK in loaded:
                optimizer.zero_grad()
                loss(module(inputs), target_NK).backward()
                optimizer.step()
            with torch.no_grad():
                prediction = module(self.validation.inputs)
            finite = bool(prediction.isfinite().all())
            errors.append(float(self.task.error(prediction, self.validation.targets)) if finite else math.inf)
            trained.append({name: p.detach() for name, p in module.named_parameters()})
        return trained, errors

    def tune(
        self, candidates: Sequence[Candidate], starts: Sequence[Tensor], meta_steps: Sequence[MetaStep], lr: float
    ) -> list[Tensor]:
        loaded = [(s.params, *self._loaded("train", s.inner), *self._loaded("validation", s.outer)) for s in meta_steps]
        tuned = []
        for candidate, start in zip(candidates, starts, strict=True):
            weights = start.clone().requires_grad_()
            optimizer, loss = torch.optim.Adam([weights], lr), self.loss(candidate, weights)
            for params, inputs, target_NK, outer_inputs, outer_NK in loaded:
                after = self._stepped(params, loss, inputs, target_NK)
                logits = functional_call(self.task.module, after, outer_inputs)
                objective = functional.cross_entropy(logits, outer_NK)
                (weights.grad,) = torch.autograd.grad(objective, weights, materialize_grads=True)
                optimizer.step()
            tuned.append(weights.detach())
        return tuned

    def rejected(self, candidates: Sequence[Candidate], params: Params, steps: int, lr: float) -> list[bool]:
        inputs, targets = (leaf[:REJECTION_EXAMPLES] for leaf in self.train_part)
        target_NK = self.task.target_matrix(targets)
        with torch.no_grad():
            before = self.module(params)(inputs)
        found = []
        for candidate in candidates:
            prediction, loss = before.clone().requires_grad_(), self.loss(candidate)
            optimizer = torch.optim.Adam([prediction], lr, foreach=True)
            for _ in range(steps):
                optimizer.zero_grad()
                loss(prediction, target_NK).backward()
                optimizer.step()
            improved = self.task.error(prediction, targets) < self.task.error(before, targets)
            found.append(not bool(improved))
        return found

    def loss(self, candidate: Candidate, weights: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Mean loss of raw outputs and targets (N, K), compiled."""
        assert candidate.program is not None
        own = torch.tensor(candidate.weights).to(self.train_part.inputs) if weights is None else weights
        entrywise = compile_loss(candidate.program)
        return lambda z_NK, target_NK: entrywise(target_NK, functional.softmax(z_NK, -1), own).sum(-1).mean()

    def _loaded(self, part: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = self.train_part if part == "train" else self.validation
        return inputs[chosen], self.task.target_matrix(targets[chosen])

    def _stepped(self, params: Params, loss: Callable[..., Tensor], inputs: Tensor, target_NK: Tensor) -> Params:
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        value = loss(functional_call(self.task.module, params, inputs), target_NK)
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True, materialize_grads=True)
        named = dict(zip(params, grads, strict=True))
        return self.rule.update({}, named, self.rule.init({}, params), params)[0]
