"""What meta-gradients are compared with: the same inner run in our terms, in ``higher``'s and in ``torchopt``'s.

Digits, a tanh network 64-H-H-10 and one learned weight for each of 1000 examples: the inner loss of ``DataWeights``, and
cross-entropy on 500 other examples at the end.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import higher
import torch
import torchopt
from torch import Tensor, nn
from torch.nn import functional

from metalearn import random
from metalearn.base import Batches, Estimator, Examples, InnerProblem, InnerState, MetaGradient, Params, Rule, Source
from metalearn.models.vision import MLP
from metalearn.problems.data_weights import DataWeights
from metalearn.tasks.sources import ImageSource

TRAIN, CLEAN = 1000, 500
KEY = random.key(0)


@dataclass(eq=False)
class Digits(Source):
    """scikit-learn's digits: the first examples to train on, all others to validate on."""

    name: str = "digits"
    num_classes: int = 10

    def read(self, part: str) -> Examples:
        source = ImageSource(path="digits")
        parts = [source.read(each) for each in ("train", "validation", "test")]
        inputs, targets = (torch.cat(leaves) for leaves in zip(*parts, strict=True))
        rows = slice(TRAIN) if part == "train" else slice(TRAIN, None)
        return Examples(inputs[rows], targets[rows])

    def fingerprint(self) -> str:
        return self.name


def data_weights(rule: Rule, width: int, depth: int = 2, batch_size: int | None = None) -> DataWeights:
    """The problem with ``depth`` hidden layers; full batches of the same run every time, or small ones of a run per key."""
    problem = DataWeights(
        Digits(),
        partial(MLP, hidden=[width] * depth),
        rule,
        num_examples=TRAIN,
        clean_examples=CLEAN,
        batch_size=batch_size,
        outer_batch_size=batch_size,
        init_seed=0 if batch_size is None else None,
    )
    problem.open(test=False)
    return problem


def estimated(estimator: Estimator, problem: InnerProblem, steps: int) -> Callable[[], MetaGradient]:
    """One estimate at the first meta-parameters, with data and keys that are the same in every call."""
    meta, batches = problem.init_meta(KEY), problem.batches(KEY, steps)
    state = estimator.init(problem, meta, KEY)
    return lambda: estimator.estimate(problem, meta, state, batches, KEY)


def higher_gradient(
    problem: DataWeights, start: InnerState, batches: Batches, optimizer: Callable[..., torch.optim.Optimizer]
) -> Params:
    """d outer/d weights by ``higher``: one autograd graph of the whole inner run."""
    weights = torch.zeros(TRAIN, requires_grad=True)
    module = _module(problem, start)
    with higher.innerloop_ctx(module, optimizer(module.parameters())) as (functional_module, differentiable):
        for k in range(batches.steps):
            differentiable.step(_inner_loss(weights, functional_module, batches.inner(k)))
        return _gradient(functional_module, batches, weights)


def torchopt_gradient(
    problem: DataWeights, start: InnerState, batches: Batches, optimizer: Callable[..., torchopt.MetaOptimizer]
) -> Params:
    """The same by ``torchopt``'s meta-optimizers."""
    weights = torch.zeros(TRAIN, requires_grad=True)
    module = _module(problem, start)
    differentiable = optimizer(module)
    for k in range(batches.steps):
        differentiable.step(_inner_loss(weights, module, batches.inner(k)))
    return _gradient(module, batches, weights)


def _module(problem: DataWeights, start: InnerState) -> nn.Module:
    module = copy.deepcopy(problem.module)
    module.load_state_dict(start.params)
    return module


def _inner_loss(weights: Tensor, module: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    inputs, targets, rows = batch
    losses_N = functional.cross_entropy(module(inputs), targets, reduction="none")
    return (weights.sigmoid()[rows] * losses_N).mean()


def _gradient(module: nn.Module, batches: Batches, weights: Tensor) -> Params:
    inputs, targets = batches.outer
    outer = functional.cross_entropy(module(inputs), targets)
    return {"weights": torch.autograd.grad(outer, weights)[0]}
