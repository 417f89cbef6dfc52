"""Tasks made of one data set by random projections of its inputs and random permutations of its labels.

B tasks in a batch, T examples of a sequence, N examples of a data set, P its features, R kept features, D projected
features, K classes, M distributions drawn from at once. What is written for one, as (B, K), is (M, B, K) of several.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import (
    BASE,
    Batch,
    MetaTest,
    MetaTrain,
    Oracle,
    Source,
    Split,
    TaskDistribution,
    require_range,
)
from metalearn.tasks.curriculum import Curriculum
from metalearn.tasks.oracles import oracles
from metalearn.tasks.rotation import RotatedData

_SEEN_STREAMS = ("seen_train", "seen_held_out")
_UNSEEN_STREAM = "unseen_held_out"
_CPU_BLOCK = 2**15  # normals drawn at once: they stay in the cache, and below torch's grain for sharing an operation
_WORTH_SHARING = 2**18  # normals of a batch from which threads gain more than they cost


class _Pool(NamedTuple):
    """Whose tasks are drawn: one distribution's, or those of M at once."""

    key: Callable[..., Tensor]  # of labels: () or (M, 1), the seed's
    size: int | Tensor | None  # the number of tasks, None for always new ones; or (M, 1), 0 for always new ones


class ProjectedImages(TaskDistribution):
    """Task k is (A x, permutation of y): A is D x P with entries N(0, 1/P), both drawn from the task's own key and never stored.

    A sequence draws a task, then ``length`` different examples independently of the task. Sequence i of step s is a
    function of (seed, s, i) alone; evaluation streams do not depend on the step.

    Streams: ``seen_train`` (training tasks on training examples), ``seen_held_out`` (training tasks on held-out
    examples; both only with finite ``num_tasks``), ``unseen_held_out`` (new tasks on held-out examples), and one more
    for each of ``others`` (new tasks on another data set). Validation and test have tasks and examples of their own.

    Args:
        source: the data set D̄ that all training tasks are made of.
        num_features: features D of a projected example, at least 1 (the paper: D = P).
        num_tasks: training tasks K, 1 … 2^31 (the paper: 2^0 … 2^25); null for a new task in every sequence.
        bias_fraction: probability in [0, 1] that a training task's label permutation is one fixed permutation (the
            paper's intervention on the plateau, 0.9). Here it is a property of the task; the paper speaks of a
            fraction of each batch, which is the same in law for fresh tasks.
        rank: keep the R leading principal directions U of the training examples: an integer, or a fraction in (0, 1)
            of their second moment; null keeps the inputs as they are. (A U)(Uᵀx) has the law of A U Uᵀ x, because A U
            has independent N(0, 1/P) entries as A has, and the draw per task shrinks from D·P to D·R. See
            ``kept_variance``. Every data set is rotated by its own U.
        others: further data sets for evaluation only, by name of the stream; any input size, at most as many classes.
        seed: of tasks and sequences; null follows ``seed_everything``.
        task_curriculum: training tasks before a global step, by that step: {500: 256} draws from 256 tasks until step
            500 and then from all ``num_tasks``, of which the 256 are a part where there is a pool.
        class_curriculum: classes before a global step, likewise, 1 … K: {500: 2} makes training sequences of examples
            whose labels in their task are 0 and 1, and so of two classes of the task's own. Labels are coded as ever.
            It shuffles the whole data set for every sequence, which takes its time on a large one. Neither curriculum
            touches evaluation streams.

    Raises:
        ValueError: for values out of range, a data set (or the classes of a stage) with fewer examples than a sequence
        needs, or meta-test data asked for before ``open(test=True)``.

    Source: Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-Learning Transformers", Algorithm 1.
    Differs from the paper: D may be smaller than P, and P rotated to R; examples do not repeat within a sequence.
    """

    def __init__(
        self,
        source: Source,
        num_features: int,
        num_tasks: int | None = None,
        bias_fraction: float = 0.0,
        rank: int | float | None = None,
        others: dict[str, Source] | None = None,
        seed: int | None = None,
        task_curriculum: dict[int, int] | None = None,
        class_curriculum: dict[int, int] | None = None,
    ):
        require_range("num_features", num_features, 1)
        require_range("num_tasks", 1 if num_tasks is None else num_tasks, 1, 2**31)
        require_range("bias_fraction", bias_fraction, 0, 1)
        if rank is not None and not (0 < rank < 1 or (rank >= 1 and rank == int(rank))):
            raise ValueError(f"rank is {rank}; accepted: an integer >= 1, a fraction in (0, 1), or null")
        taken = {BASE, *_SEEN_STREAMS, _UNSEEN_STREAM} & set(others or {})
        if taken:
            raise ValueError(f"others names a stream {taken.pop()!r}; accepted: any other name")
        self.source, self.num_features, self.num_tasks = source, num_features, num_tasks
        self.task_curriculum = Curriculum("task_curriculum", task_curriculum or {}, 1, num_tasks or 2**31)
        self.class_curriculum = Curriculum("class_curriculum", class_curriculum or {}, 1)
        self.bias_fraction, self.rank, self.others, self.seed = bias_fraction, rank, others or {}, seed
        self.kept_variance: dict[str, float] = {}
        self._data = {name: RotatedData(data, rank) for name, data in {BASE: source, **self.others}.items()}
        self._rotations: dict[str, Tensor | None] = {}
        self._opened: set[tuple[str, str]] = set()

    @property
    def num_classes(self) -> int:
        """Classes K of the base data set, and so outputs of a learner."""
        return self.source.num_classes

    def oracles(self) -> Mapping[str, Oracle]:
        return oracles(self.num_classes)

    def streams(self) -> tuple[str, ...]:
        return (*(_SEEN_STREAMS if self.num_tasks else ()), _UNSEEN_STREAM, *self.others)

    def share(self, other: "ProjectedImages") -> None:
        """Use what ``other`` reads of the same data sets instead of reading them again; to be called before ``open``."""
        for name, own in self._data.items():
            self._data[name] = next((known for known in other._data.values() if known.is_same_as(own)), own)

    def open(self, *, test: bool) -> None:
        for name, images in self._data.items():
            if images.source.num_classes > self.num_classes:
                raise ValueError(
                    f"{name} has {images.source.num_classes} classes; accepted: at most the base's {self.num_classes}"
                )
            for part in ("train", "validation", "test") if test else ("train", "validation"):
                images.read(part)
                self._opened.add((name, part))
            self._rotations[name], self.kept_variance[name] = images.rotation
        self.class_curriculum.require_at_most(self.num_classes)

    def record(self) -> dict[str, Any]:
        self._require_opened(BASE, "train", "the training data")
        identity = {
            "fingerprint": {name: images.fingerprint for name, images in self._data.items()},
            "revision": {name: images.source.revision for name, images in self._data.items()},
        }
        return {"seed": self.seed, "kept_variance": self.kept_variance, **identity}

    def batch(
        self, step: int, first: int, tasks: int, length: int, split: Split, device: torch.device | str = "cpu"
    ) -> Batch:
        pool = _Pool(functools.partial(self._key, device=device), self.num_tasks)
        return self._draw(pool, step, first, tasks, length, split, device)

    def _draw(
        self, pool: _Pool, step: int, first: int, tasks: int, length: int, split: Split, device: torch.device | str
    ) -> Batch:
        name, part = self._part_of(split)
        features_NR, targets_N = self._data[name].read(part, device)
        path = ("train", step) if isinstance(split, MetaTrain) else (type(split).__name__, split.stream)
        visit_B = random.fold(pool.key(*path), torch.arange(first, first + tasks, device=device))
        training_step = step if isinstance(split, MetaTrain) else None
        task_B, biased = self._draw_tasks(visit_B, split, pool, self.task_curriculum.at(training_step, pool.size))
        relabel_BK = self._relabel(task_B, pool, biased)
        key_B, classes = random.fold(visit_B, "examples"), self.class_curriculum.at(training_step, self.num_classes)
        if classes < self.num_classes:
            self._require_examples(length, classes, self._data[name].read(part).targets)
            chosen_BT = _choose_among(key_B, length, relabel_BK[..., targets_N] < classes)
        else:
            chosen_BT = self._choose(key_B, length, len(targets_N), name, part)
        x_BTD = _project(features_NR, chosen_BT, random.fold(task_B, "projection"), self.num_features)
        return Batch(x_BTD, relabel_BK.gather(-1, targets_N[chosen_BT]))

    def _key(self, *labels: int | str, device: torch.device | str) -> Tensor:
        if self.seed is None:
            raise ValueError("seed is None; accepted: an integer, or null in a config with seed_everything")
        return random.key(self.seed, *labels, device=device)

    def _draw_tasks(
        self, visit_B: Tensor, split: Split, pool: _Pool, num_tasks: int | Tensor | None
    ) -> tuple[Tensor, bool]:
        """The keys of the tasks, and whether they come from the training pool, which may be biased."""
        in_pool = isinstance(split, MetaTrain) or split.stream in _SEEN_STREAMS
        own_B = random.fold(visit_B, "task")
        if not in_pool or num_tasks is None:
            return own_B, in_pool
        pooled_B = random.fold(pool.key("pool"), random.integers(own_B, (), num_tasks))
        return pooled_B if isinstance(num_tasks, int) else torch.where(num_tasks > 0, pooled_B, own_B), True

    def _relabel(self, task_B: Tensor, pool: _Pool, biased: bool) -> Tensor:
        """The label (B, K) that each task gives to each class of the data."""
        relabel_BK = random.permutation(random.fold(task_B, "labels"), self.num_classes)
        if not (biased and self.bias_fraction):
            return relabel_BK
        fixed_K = random.permutation(pool.key("fixed labels"), self.num_classes)
        is_fixed_B = random.uniform(random.fold(task_B, "bias")) < self.bias_fraction
        return torch.where(is_fixed_B.unsqueeze(-1), fixed_K, relabel_BK)

    def _part_of(self, split: Split) -> tuple[str, str]:
        """Which part of which data set a split reads."""
        if isinstance(split, MetaTrain):
            part = BASE, "train"
        elif split.stream not in self.streams():
            raise ValueError(f"stream is {split.stream!r}; accepted: {', '.join(self.streams())}")
        else:
            held_out = "test" if isinstance(split, MetaTest) else "validation"
            name = split.stream if split.stream in self.others else BASE
            part = name, "train" if split.stream == "seen_train" else held_out
        if isinstance(split, MetaTest) and (BASE, "test") not in self._opened:
            raise ValueError(f"the data of {split} are sealed until open(test=True)")
        self._require_opened(*part, f"the data of {split}")
        return part

    def _require_opened(self, name: str, part: str, what: str) -> None:
        if (name, part) not in self._opened:
            raise ValueError(f"{what} are not read: call open(test=False) first")

    def _choose(self, key_B: Tensor, length: int, available: int, name: str, part: str) -> Tensor:
        """Indices (B, T) of different examples, or of one permutation of them all after another where the data set repeats."""
        if length <= available:
            return random.distinct(key_B, length, available)
        if not self._data[name].source.repeat:
            raise ValueError(f"length is {length}; accepted: at most the {available} examples of {name} {part}")
        rounds = torch.arange(math.ceil(length / available), device=key_B.device)
        return random.permutation(random.fold(key_B.unsqueeze(-1), rounds), available).flatten(-2)[..., :length]

    def _require_examples(self, length: int, classes: int, targets_N: Tensor) -> None:
        """Raise ``ValueError`` unless any ``classes`` classes together have examples for a sequence."""
        least = int(torch.bincount(targets_N, minlength=self.num_classes).sort().values[:classes].sum())
        if length > least:
            raise ValueError(
                f"length is {length}; accepted where class_curriculum has {classes} of {self.num_classes} classes: at "
                f"most {least}, the examples of the smallest {classes}"
            )


class StackedImages:
    """Training batches of M distributions that differ in seed and number of tasks alone, drawn in one go.

    Each is what its own distribution makes, to the last bit on a CPU and up to the rounding of products elsewhere.

    Args:
        distributions: all opened, of which ``accepts`` is true.

    Raises:
        ValueError: for others.
    """

    def __init__(self, distributions: Sequence[TaskDistribution]):
        if not self.accepts(distributions):
            raise ValueError("distributions differ; accepted: ProjectedImages that differ in seed and num_tasks alone")
        self.distributions = [one for one in distributions if isinstance(one, ProjectedImages)]
        self._pools: dict[str, _Pool] = {}

    @staticmethod
    def accepts(distributions: Sequence[TaskDistribution]) -> bool:
        """Whether the distributions make training batches alike, of the same data, but for seed and number of tasks."""
        laws = [_training_law(one) if type(one) is ProjectedImages else None for one in distributions]
        return bool(laws) and laws[0] is not None and all(law == laws[0] for law in laws)

    def batch(self, step: int, first: int, tasks: int, length: int, device: torch.device | str = "cpu") -> Batch:
        """Sequences ``first ... first + tasks - 1`` of global step ``step`` of all: x (M, B, T, D), y (M, B, T)."""
        pool = self._pools.get(str(device)) or self._pools.setdefault(str(device), self._pool_on(device))
        return self.distributions[0]._draw(pool, step, first, tasks, length, MetaTrain(), device)

    def _pool_on(self, device: torch.device | str) -> _Pool:
        seeds_M1 = torch.stack([one._key(device=device) for one in self.distributions]).unsqueeze(1)
        sizes = [one.num_tasks or 0 for one in self.distributions]
        size = torch.tensor(sizes, device=device).unsqueeze(1) if any(sizes) else None
        return _Pool(functools.partial(random.fold, seeds_M1), size)


def _training_law(tasks: ProjectedImages) -> tuple[Any, ...]:
    """All that training sequences depend on but for seed and number of tasks."""
    curricula = tasks.task_curriculum.stages, tasks.class_curriculum.stages
    return tasks.num_features, tasks.rank, tasks.bias_fraction, *curricula, tasks.record()["fingerprint"][BASE]


def _choose_among(key_B: Tensor, length: int, allowed_BN: Tensor) -> Tensor:
    """Indices (B, T) of different examples out of those allowed, of which there are enough, in random order."""
    words_BN = random.bits(key_B, allowed_BN.shape[-1])
    return words_BN.masked_fill(~allowed_BN, torch.iinfo(torch.int64).max).topk(length, largest=False).indices


def _project(features_NR: Tensor, chosen_BT: Tensor, key_B: Tensor, num_features: int) -> Tensor:
    """The chosen rows times a standard normal Aᵀ of each sequence's own: (B, T, D).

    On the CPU in blocks of sequences of one distribution, whose normals and rows stay in the cache from the draw to the
    product. Threads take a block each, because two threads on every small operation of one block spend their time waiting.
    """
    if features_NR.device.type != "cpu":
        rows_BTR = features_NR[chosen_BT]
        return rows_BTR @ random.normal(key_B, (features_NR.shape[1], num_features))
    if key_B.ndim > 1:
        own = zip(chosen_BT, key_B, strict=True)
        return torch.stack([_project(features_NR, *one, num_features) for one in own])
    (tasks, length), rank = chosen_BT.shape, features_NR.shape[1]
    x_BTD = features_NR.new_empty(tasks, length, num_features)
    inference = torch.is_inference_mode_enabled()  # which other threads do not know of

    def draw(block: slice) -> None:
        with torch.inference_mode(inference):
            rows_bTR = features_NR.index_select(0, chosen_BT[block].flatten()).view(-1, length, rank)
            torch.bmm(rows_bTR, random.normal(key_B[block], (rank, num_features)), out=x_BTD[block])

    threads, size = torch.get_num_threads(), max(1, _CPU_BLOCK // (rank * num_features))
    blocks = [slice(first, first + size) for first in range(0, tasks, size)]
    shared = threads > 1 and tasks * rank * num_features >= _WORTH_SHARING
    for _ in _drawing_threads(threads).map(draw, blocks) if shared else map(draw, blocks):
        pass
    return x_BTD


@functools.cache
def _drawing_threads(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "draw", initializer=torch.set_num_threads, initargs=(1,))
