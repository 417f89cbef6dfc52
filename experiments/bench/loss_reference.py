"""The way of the public EvoMAL code (Raymond et al. 2023), written anew, and a door to that code itself.

A new iterator of a ``DataLoader`` for every step, a loss that walks through its tree, error rates counted in Python,
``higher`` for the step that is differentiated through; a candidate's weights are tuned before it may be rejected, and what
was rejected is forgotten.

Shape letters: N examples, K classes.
"""

import copy
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import higher
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler, TensorDataset

from experiments.bench.loss_rivals import REJECTION_EXAMPLES, MetaStep, Rival
from experiments.bench.timing import require_equal
from metalearn.base import Params
from metalearn.losses.program import Program
from metalearn.problems.learned_loss import LossTask
from metalearn.random import fold
from metalearn.search.candidates import Candidate


class Score(NamedTuple):
    """What became of one candidate."""

    weights: tuple[float, ...]
    error: float  # infinite where it was rejected, or training diverged
    rejected: bool


@dataclass(frozen=True)
class Plan:
    """What a search does to each of its candidates before the training run."""

    start: Callable[[Candidate], Tensor]
    meta_steps: Sequence[MetaStep]
    lr: float
    rejection_params: Params
    rejection_steps: int
    rejection_lr: float


class ReferenceStyle(Rival):
    """The way of the public code, written anew."""

    def train(self, candidates: Sequence[Candidate]) -> tuple[list[Params], list[float]]:
        start, _ = self.task.initial(fold(self.key, "init"))
        batches = self.batches()
        trained, errors = [], []
        for candidate in candidates:
            params, error = self._trained(TreeLoss.of(candidate), start, batches)
            trained.append(params)
            errors.append(error)
        return trained, errors

    def tune(
        self, candidates: Sequence[Candidate], starts: Sequence[Tensor], meta_steps: Sequence[MetaStep], lr: float
    ) -> list[Tensor]:
        losses = [TreeLoss.of(candidate, start) for candidate, start in zip(candidates, starts, strict=True)]
        for loss in losses:
            self._tuned(loss, meta_steps, lr)
        return [loss.weights for loss in losses]

    def rejected(self, candidates: Sequence[Candidate], params: Params, steps: int, lr: float) -> list[bool]:
        return [self._rejected(TreeLoss.of(candidate), params, steps, lr) for candidate in candidates]

    def _trained(self, loss: nn.Module, start: Params, batches: Sequence[Tensor]) -> tuple[Params, float]:
        module = self.module(start)
        optimizer = self.optimizer(module.parameters())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100_000, 135_000], 0.1)
        loader, history = self._loader("train", batches), []
        for _ in batches:
            optimizer.zero_grad()
            inputs, targets = next(iter(loader))
            prediction = module(inputs)
            value = loss(prediction, targets)
            if value.isnan() or value.isinf():
                break
            value.backward()
            optimizer.step()
            scheduler.step()
            history.append(counted_error(prediction, targets).item())
        whole = DataLoader(TensorDataset(*self.validation), batch_size=self.task.batch_size or len(batches[0]))
        with torch.no_grad():
            outputs = [(module(inputs), targets) for inputs, targets in whole]
        prediction, targets = (torch.cat(leaves) for leaves in zip(*outputs, strict=True))
        finite = len(history) == len(batches) and bool(prediction.isfinite().all())
        params = {name: p.detach() for name, p in module.named_parameters()}
        return params, counted_error(prediction, targets).item() if finite else math.inf

    def _tuned(self, loss: nn.Module, meta_steps: Sequence[MetaStep], lr: float) -> None:
        module = copy.deepcopy(self.task.module)
        inner_optimizer = self.optimizer(module.parameters())
        optimizer, history = torch.optim.Adam(loss.parameters(), lr), []
        training = self._loader("train", [step.inner for step in meta_steps])
        validation = self._loader("validation", [step.outer for step in meta_steps])
        for step in meta_steps:
            module.load_state_dict(step.params)
            optimizer.zero_grad()
            with higher.innerloop_ctx(module, inner_optimizer, copy_initial_weights=False) as (unrolled, inner):
                inputs, targets = next(iter(training))
                inner.step(loss(unrolled(inputs), targets))
                inputs, targets = next(iter(validation))
                prediction = unrolled(inputs)
                functional.cross_entropy(prediction, targets).backward()
                history.append(counted_error(prediction, targets).item())
            optimizer.step()

    def _rejected(self, loss: nn.Module, params: Params, steps: int, lr: float) -> bool:
        ordered = DataLoader(TensorDataset(*self.train_part), batch_size=REJECTION_EXAMPLES)
        inputs, targets = next(iter(ordered))
        before = self.module(params)(inputs).detach()
        prediction = before.clone().requires_grad_()
        optimizer = torch.optim.Adam([prediction], lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(prediction, targets).backward()
            optimizer.step()
        return not bool(counted_error(prediction, targets) < counted_error(before, targets))

    def _loader(self, part: str, batches: Sequence[Tensor]) -> DataLoader:
        examples = self.train_part if part == "train" else self.validation
        return DataLoader(TensorDataset(*examples), batch_size=len(batches[0]), sampler=_InTurn(batches))

    # -- the whole search --------------------------------------------------------------------------------------------

    def search(self, generations: Sequence[Sequence[Candidate]], plan: Plan) -> list[list[Score]]:
        """Scores of all candidates: known only by the text of those that were trained; rejected after they are tuned."""
        known: dict[str, Score] = {}
        start, _ = self.task.initial(fold(self.key, "init"))
        batches, found = self.batches(), []
        for candidates in generations:
            scores = []
            for candidate in candidates:
                score = known.get(candidate.text) or self._scored(candidate, plan, start, batches)
                known |= {} if score.rejected else {candidate.text: score}
                scores.append(score)
            found.append(scores)
        return found

    def _scored(self, candidate: Candidate, plan: Plan, start: Params, batches: Sequence[Tensor]) -> Score:
        loss = TreeLoss.of(candidate, plan.start(candidate))
        self._tuned(loss, plan.meta_steps, plan.lr)
        rejected = self._rejected(loss, plan.rejection_params, plan.rejection_steps, plan.rejection_lr)
        error = math.inf if rejected else self._trained(loss, start, batches)[1]
        return Score(tuple(loss.weights.tolist()), error, rejected)


def counted_error(prediction_NK: Tensor, targets: Tensor) -> Tensor:
    """Share of wrong answers, counted one by one."""
    wrong = 0
    for scores, target in zip(prediction_NK, targets, strict=True):
        if torch.argmax(scores) != target:
            wrong += 1
    return torch.tensor(wrong / len(targets), dtype=torch.float64)


class _InTurn(Sampler[int]):
    """Every pass over it yields the rows of the next step."""

    def __init__(self, batches: Sequence[Tensor]):
        self._steps = iter(batches)

    def __iter__(self) -> Iterator[int]:
        yield from next(self._steps).tolist()


_MAGNITUDES = {
    name: lambda a, f=f: f(a.abs().clamp(min=1e-7)) for name, f in (("log", torch.log), ("sqrt", torch.sqrt))
}
_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / torch.sqrt(1 + b.square()),
    "sign": torch.sign,
    "square": torch.square,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "min": torch.minimum,
    "max": torch.maximum,
    **_MAGNITUDES,
}


class TreeLoss(nn.Module):
    """A loss that is evaluated node by node, from the last in prefix order to the root, with a parameter per node.

    Args:
        program: the loss.
        weights: of its edges, (num_weights,).
    """

    def __init__(self, program: Program, weights: Tensor):
        super().__init__()
        self.nodes = program.nodes
        self.parents = {child: place for place, node in enumerate(program.nodes) for child in node.children}
        values = torch.cat([weights.new_ones(1), weights])  # the root has one too, which is never used
        self.phi = nn.ParameterList([nn.Parameter(value.reshape(1).clone()) for value in values])

    @classmethod
    def of(cls, candidate: Candidate, weights: Tensor | None = None) -> "TreeLoss":
        """That of a candidate, with its own weights or others."""
        assert candidate.program is not None
        own = torch.tensor(candidate.weights or [1.0] * candidate.program.num_weights)
        return cls(candidate.program, own if weights is None else weights)

    @property
    def weights(self) -> Tensor:
        """Those of the edges, (num_weights,)."""
        return torch.cat([phi.detach() for phi in self.phi][1:])

    def forward(self, logits_NK: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples of the sum over classes."""
        p = functional.softmax(logits_NK, dim=1)
        y = functional.one_hot(targets, num_classes=logits_NK.shape[1]).to(p.dtype)
        results: dict[int, Tensor] = {}
        for place, parent in reversed(sorted(self.parents.items())):
            name = self.nodes[place].name
            if name in ("y", "p"):
                results[place] = y if name == "y" else p
            elif name in ("1", "-1"):
                results[place] = torch.tensor([float(name)], dtype=p.dtype)
            value = torch.mul(results[place], self.phi[place])
            operation = _OPERATIONS[self.nodes[parent].name]
            if len(self.nodes[parent].children) == 1:
                results[parent] = operation(value)
            else:  # the second argument comes first and waits under its parent's number
                results[parent] = operation(value, results[parent]) if parent in results else value
        return results[0].expand(p.shape).sum(dim=1).mean()


# -- the public code itself ------------------------------------------------------------------------------------------


class Checkout:
    """A user's checkout of the public repository, Decadz/Evolved-Model-Agnostic-Loss, on the same task.

    Its minibatches and initial weights are its own, so that its results cannot be compared with ours; its losses can,
    and are. It runs with ``higher`` 0.2.1 on torch 2.13 once constants are named "1" and "-1", as of its release of
    May 2023. No test covers this class, since that code is not part of this project.

    Args:
        directory: the checkout.
        task: opened; its rule is SGD.
        steps: of a training run.
        key: of ``ReferenceStyle``, which lends its model and optimizer.

    Raises:
        ImportError: where there is no such code.
    """

    def __init__(self, directory: Path, task: LossTask, steps: int, key: Tensor):
        if str(directory) not in sys.path:
            sys.path.insert(0, str(directory))
        found = importlib.import_module
        self.grammar = found("source.representation.utilities.gp_expression")
        self.transform = found("source.representation.utilities.phase_transformer").phase_transformer
        self.backpropagation = found("source.optimization.bp").backpropagation
        self.local_search = found("source.optimization.gimli").GeneralizedInnerLoopMetaLearning
        self.filters = found("source.optimization.utilities.filters").LossFunctionFilters
        self.task, self.steps, self.ours = task, steps, ReferenceStyle(task, steps, key)
        self.train_part, self.validation = (
            TensorDataset(*part) for part in (self.ours.train_part, self.ours.validation)
        )
        self.base = {"base_network": partial(_Resettable, task), "base_network_parameters": {}}

    def loss(self, candidate: Candidate) -> nn.Module:
        """Its own module for a loss, found equal to ours on the first examples."""
        assert candidate.program is not None
        gp = self.grammar.gp
        constants = {name: gp.Terminal(int(name), False, object) for name in ("1", "-1")}
        nodes = {"y": self.grammar.pset.mapping["ARG0"], "p": self.grammar.pset.mapping["ARG1"], **constants}
        expression = gp.PrimitiveTree([nodes.get(n) or self.grammar.pset.mapping[n] for n in candidate.program.names])
        loss = self.transform(expression, self.task.num_outputs, True, "cpu")
        ours = TreeLoss.of(candidate)
        with torch.no_grad():
            for phi, value in zip(loss.parameters(), ours.phi, strict=True):
                phi.copy_(value)
            inputs, targets = self.train_part[:REJECTION_EXAMPLES]
            logits_NK = self.task.module(inputs)
            require_equal(f"losses {candidate.text}", ours(logits_NK, targets), loss(logits_NK, targets), 1e-5)
        return loss

    def train(self, losses: Sequence[nn.Module]) -> None:
        """One training run under each."""
        for loss in losses:
            module = _Resettable(self.task)
            optimizer = self.ours.optimizer(module.parameters())
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100_000, 135_000], 0.1)
            size = self.task.batch_size or len(self.train_part)
            whose = self.train_part, loss, self.steps, size, optimizer, scheduler, counted_error
            self.backpropagation(module, *whose, verbose=0, device="cpu")

    def tune(self, losses: Sequence[nn.Module], meta_steps: int, lr: float) -> None:
        """Local search on each."""
        rule = self.ours.rule
        learning = {"base_learning_rate": rule.settings["lr"], "base_momentum": rule.settings["momentum"]}
        learning |= {"base_weight_decay": rule.settings["weight_decay"], "base_nesterov": rule.nesterov}
        search = self.local_search(
            **self.base,
            **learning,
            base_batch_size=self.task.batch_size,
            base_gradient_steps=self.steps,
            task_loss=nn.CrossEntropyLoss(),
            meta_gradient_steps=meta_steps,
            meta_learning_rate=lr,
            inner_gradient_steps=1,
            performance_metric=counted_error,
            random_state=0,
            verbose=0,
            device="cpu",
        )
        for loss in losses:
            search.train(loss, [self.train_part], [self.validation])

    def reject(self, losses: Sequence[nn.Module], steps: int, lr: float) -> None:
        """The rejection protocol on each."""
        settings = {"learning_rate": lr, "momentum": 0, "nesterov": False, "performance_metric": counted_error}
        samples = {"filter_gradient_steps": steps, "filter_sample_size": REJECTION_EXAMPLES}
        filters = self.filters(**samples, **self.base, **settings, device="cpu")
        for loss in losses:
            filters.rejection_protocol(loss, *filters.compute_predictions([self.train_part]), "classification")


class _Resettable(nn.Module):
    """The task's module with the ``reset`` that the public code calls."""

    def __init__(self, task: LossTask):
        super().__init__()
        self.module = copy.deepcopy(task.module)

    def reset(self) -> None:
        for part in self.module.modules():
            if isinstance(part, nn.Linear):
                part.reset_parameters()

    def forward(self, inputs_ND: Tensor) -> Tensor:
        return self.module(inputs_ND)
