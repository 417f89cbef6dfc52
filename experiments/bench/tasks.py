"""The same tasks drawn our way and the plain way of public reproductions, from the same images.

MNIST is read from ``$METALEARN_DATA/mnist``; without it, scikit-learn's digits resized to 28x28 stand in.

B sequences, T examples, P pixels, D projected features, K classes.
"""

import copy
import functools
import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metalearn.base import Batch, Examples, MetaTrain, Source
from metalearn.tasks.images import ProjectedImages
from metalearn.tasks.sources import ImageSource

SEQUENCES, LENGTH, PIXELS, CLASSES, RANK = 16, 100, 784, 10, 128


@dataclass(eq=False)
class InMemory(Source):
    """Examples that are already there, the same in every part."""

    name: str
    examples: Examples
    num_classes: int = CLASSES

    def read(self, part: str) -> Examples:
        return self.examples

    def fingerprint(self) -> str:
        return self.name


@functools.cache
def images() -> InMemory:
    """MNIST's training examples, or digits resized to its shape."""
    root = os.environ.get("METALEARN_DATA")
    if root and (Path(root) / "mnist").is_dir():
        return InMemory("MNIST", ImageSource(path="mnist", normalise="per_pixel").read("train"))
    return InMemory("digits at 28x28", ImageSource(path="digits", image_size=28, normalise="per_pixel").read("train"))


@functools.cache
def _opened(source: InMemory, rank: int | None) -> ProjectedImages:
    tasks = ProjectedImages(source, num_features=1, rank=rank, seed=0)
    tasks.open(test=False)
    return tasks


def projected(source: InMemory, num_features: int, rank: int | None) -> ProjectedImages:
    """An opened task distribution; the principal directions, which take seconds, are computed once per rank."""
    tasks = copy.copy(_opened(source, rank))
    tasks.num_features = num_features
    return tasks


def batches_of(tasks: ProjectedImages) -> Iterator[Batch]:
    return (tasks.batch(step, 0, SEQUENCES, LENGTH, MetaTrain()) for step in itertools.count())


def made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Each made in a thread while the one before is used, as ``TaskBatches`` does on a CPU."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches)
        while True:
            batch, following = following.result(), thread.submit(next, batches)
            yield batch


class PlainTasks(Dataset):
    """Tasks as public reproductions draw them: a generator per task, a whole matrix, one product per example."""

    def __init__(self, examples: Examples, num_features: int):
        self.examples, self.num_features = examples, num_features

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, task: int) -> tuple[Tensor, Tensor]:
        images_NP, labels_N = self.examples
        generator = torch.Generator().manual_seed(task)
        projection_DP = torch.randn(self.num_features, images_NP.shape[1], generator=generator)
        projection_DP /= math.sqrt(images_NP.shape[1])
        chosen_T = torch.randint(len(images_NP), (LENGTH,), generator=generator)
        relabel_K = torch.randperm(CLASSES, generator=generator)
        x_TD = torch.stack([projection_DP @ image_P for image_P in images_NP[chosen_T]])
        return x_TD, relabel_K[labels_N[chosen_T]]


def plain_batches(tasks: PlainTasks, sequences: int = SEQUENCES) -> Iterator[Batch]:
    for first in itertools.count(step=sequences):
        x, y = zip(*(tasks[first + offset] for offset in range(sequences)), strict=True)
        yield Batch(torch.stack(x), torch.stack(y))
