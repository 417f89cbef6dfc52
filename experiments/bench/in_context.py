"""How fast in-context learning is, as ratios to what people write today: ``python -m experiments.bench.in_context``.

Every measurement first checks that both sides do the same thing, then times them in interleaved pairs
(``experiments.bench.timing``). MNIST is read from ``$METALEARN_DATA/mnist``; without it, scikit-learn's digits
resized to 28x28 stand in.

B sequences, T examples, P pixels, R kept directions, D projected features, K classes, Q queries, F a user's features.
"""

# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# (The Trainer sets many of its attributes where no type checker sees them, and re-exports names without saying so.)

import copy
import functools
import logging
import math
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
import yaml
from jsonargparse import auto_cli
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from experiments.bench.timing import Comparison, Unequal, compare, require_equal, seconds_per_call
from metalearn import random
from metalearn.base import Batch, Examples, Learner, MetaTrain, Source
from metalearn.classifier import InContextClassifier, class_probabilities
from metalearn.models.saving import describe, save_learner
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Transformer
from metalearn.tasks.images import BASE, ProjectedImages
from metalearn.tasks.sources import ImageSource
from metalearn.training.callbacks import Budget, RunCheckpoint
from metalearn.training.data import TaskBatches
from metalearn.training.in_context import InContextLearning

CONFIGS = Path(__file__).parents[2] / "configs" / "in_context"
SEQUENCES, LENGTH, RANK = 16, 100, 128


@dataclass(frozen=True)
class Row:
    """One line of the report: ``amount`` units of work per call, or None to show milliseconds."""

    name: str
    measured: Comparison
    bar: float | None = None
    amount: float | None = None
    unit: str = "ms"

    def __str__(self) -> str:
        ratios = self.measured.ratios
        verdict = "" if self.bar is None else "ok" if self.measured.ratio >= self.bar else "BELOW"
        spread = f"{self.measured.ratio:6.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        bar = "-" if self.bar is None else f">= {self.bar:g}"
        return (
            f"{self.name:<52} {self._show(self.measured.ours):>12} {self._show(self.measured.theirs):>12} "
            f"{self.unit:<9} {spread:<22} {bar:<8} {verdict}"
        )

    def _show(self, samples: Any) -> str:
        seconds = float(np.median(samples))
        return f"{1e3 * seconds if self.amount is None else self.amount / seconds:,.6g}"


@dataclass(frozen=True)
class Effort:
    """How much to measure: interleaved pairs of a row, and the seconds it may take."""

    pairs: int
    seconds: float

    def compare(self, ours: Callable[[], object], theirs: Callable[[], object]) -> Comparison:
        return compare(ours, theirs, self.pairs, self.seconds)


# -- data ----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class InMemory(Source):
    """Examples that are already there, the same in every part."""

    name: str
    examples: Examples
    num_classes: int = 10

    def read(self, part: str) -> Examples:
        return self.examples

    def fingerprint(self) -> str:
        return self.name


@functools.cache
def images() -> InMemory:
    """MNIST's training examples, or digits resized to its shape, whose spectrum decays as fast."""
    if (Path(os.environ.get("METALEARN_DATA", "")) / "mnist").is_dir() and "METALEARN_DATA" in os.environ:
        return InMemory("MNIST", ImageSource(path="mnist", normalise="per_pixel").read("train"))
    digits = ImageSource(path="digits", image_size=28, normalise="per_pixel").read("train")
    return InMemory("digits at 28x28", digits)


@functools.cache
def _opened(source: InMemory, rank: int | None) -> ProjectedImages:
    tasks = ProjectedImages(source, num_features=1, rank=rank, seed=0)
    tasks.open(test=False)
    return tasks


def projected(source: InMemory, num_features: int, rank: int | None) -> ProjectedImages:
    """An opened task distribution; the principal directions, which take seconds, are found once per ``rank``."""
    tasks = copy.copy(_opened(source, rank))
    tasks.num_features = num_features
    return tasks


def plain_task(task: int, examples: Examples, num_features: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """A task as public reproductions draw it: a generator of its own, a whole matrix, one product per example."""
    generator = torch.Generator().manual_seed(task)
    projection_DP = torch.randn(num_features, examples.inputs.shape[1], generator=generator)
    projection_DP /= math.sqrt(examples.inputs.shape[1])
    chosen_T = torch.randint(len(examples.targets), (length,), generator=generator)
    x_TD = torch.stack([projection_DP @ image_P for image_P in examples.inputs[chosen_T]])
    relabel_K = torch.randperm(10, generator=generator)
    return x_TD, relabel_K[examples.targets[chosen_T]]


class PlainTasks(Dataset):
    """Plain tasks by number, for a DataLoader."""

    def __init__(self, examples: Examples, num_features: int):
        self.examples, self.num_features = examples, num_features

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return plain_task(index, self.examples, self.num_features)


def plain_batch(first: int, examples: Examples, num_features: int, sequences: int = SEQUENCES) -> Batch:
    tasks = [plain_task(first + offset, examples, num_features) for offset in range(sequences)]
    x_BTD, y_BT = (torch.stack(parts) for parts in zip(*tasks, strict=True))
    return Batch(x_BTD, y_BT)


# -- generation ----------------------------------------------------------------------------------------------------------


def generation(effort: Effort) -> Iterator[Row]:
    """One batch of tasks against one generator and one matrix-vector product per example; the same output shape."""
    source = images()
    check_law(source.examples)
    for num_features, rank, bar in ((64, None, 1.7), (64, RANK, 8), (784, None, None), (784, RANK, 8)):
        tasks = projected(source, num_features, rank)
        check_projection(tasks)
        steps = iter(range(10**9))
        measured = effort.compare(
            lambda tasks=tasks, steps=steps: tasks.batch(next(steps), 0, SEQUENCES, LENGTH, MetaTrain()),
            lambda d=num_features, steps=steps: plain_batch(SEQUENCES * next(steps), source.examples, d),
        )
        kept = "full rank" if rank is None else f"rank {rank} ({tasks.kept_variance[BASE]:.1%} of variance)"
        yield Row(f"generation 784->{num_features}, {kept}", measured, bar)


def check_projection(tasks: ProjectedImages, sequences: int = 2, length: int = LENGTH) -> None:
    """A batch is A x for the drawn A and raw images x, A taken back to pixels: dense, one sequence at a time."""
    batch = tasks.batch(0, 0, sequences, length, MetaTrain())
    examples, rotation_PR = tasks.source.read("train"), tasks._rotations[BASE]
    for visit in random.fold(random.key(0, "train", 0), torch.arange(sequences)):
        chosen_T = random.distinct(random.fold(visit, "examples"), length, len(examples.targets))
        pixels = examples.inputs.shape[1]
        kept = pixels if rotation_PR is None else rotation_PR.shape[1]
        drawn_RD = random.normal(random.fold(visit, "task", "projection"), (kept, tasks.num_features))
        projection_PD = (drawn_RD if rotation_PR is None else rotation_PR @ drawn_RD) / math.sqrt(pixels)
        x_TD, *rest = batch.x
        require_equal("projected examples", x_TD, examples.inputs[chosen_T] @ projection_PD, 1e-4)
        batch = Batch(torch.stack(rest) if rest else batch.x, batch.y)


def check_law(examples: Examples, num_features: int = 64, sequences: int = 256) -> None:
    """On images of norm sqrt(P), every projected feature is N(0, 1) given the image, and inner products agree in law."""
    pixels = examples.inputs.shape[1]
    unit = functional.normalize(examples.inputs[:2000], dim=1) * math.sqrt(pixels)
    source = InMemory("images of norm sqrt(P)", Examples(unit, examples.targets[:2000]))
    ours = projected(source, num_features, None).batch(0, 0, sequences, LENGTH, MetaTrain())
    theirs = plain_batch(0, source.examples, num_features, sequences)
    require_equal("labels", torch.zeros_like(ours.y), torch.zeros_like(theirs.y), 0)
    require_equal("variances given the image", ours.x.var().round(decimals=1), theirs.x.var().round(decimals=1), 0)
    first, second = (((x[:, 0] * x[:, 1]).sum(1) / num_features).numpy() for x in (ours.x, theirs.x))
    if (p := scipy.stats.ks_2samp(first, second).pvalue) < 1e-3:
        raise Unequal(f"inner products of projected examples differ in law (Kolmogorov-Smirnov p = {p:.1e})")
