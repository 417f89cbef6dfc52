"""Tasks made of one data set by random projections of its inputs and random permutations of its labels.

B tasks in a batch, T examples of a sequence, N examples of a data set, P its features, R kept features, D projected
features.
"""

import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import BASE, Batch, MetaTest, MetaTrain, Oracle, Source, Split, TaskDistribution, require_range
from metalearn.tasks.oracles import oracles

_SEEN_STREAMS = ("seen_train", "seen_held_out")
_UNSEEN_STREAM = "unseen_held_out"
_CPU_BLOCK = 2**15  # normals drawn at once: they stay in the cache, and below torch's grain for sharing an operation
_WORTH_SHARING = 2**18  # normals of a batch from which threads gain more than they cost


@dataclass
class Images:
    """One part of one data set, ready for a standard normal draw: ``features`` (N, R) over sqrt(P), ``targets`` (N,)."""

    features: Tensor
    targets: Tensor
    repeat: bool


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

    Raises:
        ValueError: for values out of range, a data set with fewer examples than a sequence needs, or meta-test data
        asked for before ``open(test=True)``.

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
        self.bias_fraction, self.rank, self.others, self.seed = bias_fraction, rank, others or {}, seed
        self.kept_variance: dict[str, float] = {}
        self._identity: dict[str, dict[str, str | None]] = {}
        self._parts: dict[tuple[str, str], Images] = {}
        self._rotations: dict[str, Tensor | None] = {}
        self._on_device: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}

    @property
    def num_classes(self) -> int:
        """Classes K of the base data set, and so outputs of a learner."""
        return self.source.num_classes

    def oracles(self) -> Mapping[str, Oracle]:
        return oracles(self.num_classes)

    def streams(self) -> tuple[str, ...]:
        return (*(_SEEN_STREAMS if self.num_tasks else ()), _UNSEEN_STREAM, *self.others)

    def open(self, *, test: bool) -> None:
        sources = {BASE: self.source, **self.others}
        for name, source in sources.items():
            if source.num_classes > self.num_classes:
                raise ValueError(
                    f"{name} has {source.num_classes} classes; accepted: at most the base's {self.num_classes}"
                )
            for part in ("train", "validation", "test") if test else ("train", "validation"):
                if (name, part) not in self._parts:
                    self._parts[name, part] = self._read(name, source, part)
        if not self._identity:  # hashed once, not at every checkpoint
            self._identity["fingerprint"] = {name: source.fingerprint() for name, source in sources.items()}
            self._identity["revision"] = {name: source.revision for name, source in sources.items()}

    def record(self) -> dict[str, Any]:
        if not self._identity:
            raise ValueError("the data are not read: call open(test=False) first")
        return {"seed": self.seed, "kept_variance": self.kept_variance, **self._identity}

    def batch(
        self, step: int, first: int, tasks: int, length: int, split: Split, device: torch.device | str = "cpu"
    ) -> Batch:
        part = self._part_of(split)
        images = self._parts[part]
        features_NR, targets_N = self._resident(part, device)
        path = ("train", step) if isinstance(split, MetaTrain) else (type(split).__name__, split.stream)
        visit_B = random.fold(self._key(*path, device=device), torch.arange(first, first + tasks, device=device))
        task_B, biased = self._draw_tasks(visit_B, split)
        chosen_BT = self._choose(random.fold(visit_B, "examples"), length, images, part)
        x_BTD = _project(features_NR, chosen_BT, random.fold(task_B, "projection"), self.num_features)
        relabel_BK = random.permutation(random.fold(task_B, "labels"), self.num_classes)
        if biased and self.bias_fraction:
            fixed_K = random.permutation(self._key("fixed labels", device=device), self.num_classes)
            is_fixed_B = random.uniform(random.fold(task_B, "bias")) < self.bias_fraction
            relabel_BK = torch.where(is_fixed_B.unsqueeze(1), fixed_K, relabel_BK)
        return Batch(x_BTD, relabel_BK.gather(1, targets_N[chosen_BT]))

    def _key(self, *labels: int | str, device: torch.device | str) -> Tensor:
        if self.seed is None:
            raise ValueError("seed is None; accepted: an integer, or null in a config with seed_everything")
        return random.key(self.seed, *labels, device=device)

    def _draw_tasks(self, visit_B: Tensor, split: Split) -> tuple[Tensor, bool]:
        """The keys of the tasks, and whether they come from the training pool, which may be biased."""
        in_pool = isinstance(split, MetaTrain) or split.stream in _SEEN_STREAMS
        own_B = random.fold(visit_B, "task")
        if in_pool and self.num_tasks is not None:
            return random.fold(self._key("pool", device=own_B.device), random.integers(own_B, (), self.num_tasks)), True
        return own_B, in_pool

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
        sealed = isinstance(split, MetaTest) and (BASE, "test") not in self._parts
        if sealed or part not in self._parts:
            hint = "sealed until open(test=True)" if sealed else "not read: call open(test=False) first"
            raise ValueError(f"the data of {split} are {hint}")
        return part

    def _choose(self, key_B: Tensor, length: int, images: Images, part: tuple[str, str]) -> Tensor:
        """Indices (B, T) of different examples, or of one permutation of them all after another where the data set repeats."""
        available = len(images.targets)
        if length <= available:
            return random.distinct(key_B, length, available)
        if not images.repeat:
            raise ValueError(f"length is {length}; accepted: at most the {available} examples of {' '.join(part)}")
        rounds = torch.arange(math.ceil(length / available), device=key_B.device)
        return random.permutation(random.fold(key_B.unsqueeze(1), rounds), available).flatten(1)[:, :length]

    def _resident(self, part: tuple[str, str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        where = (*part, str(device))
        if where not in self._on_device:
            images = self._parts[part]
            self._on_device[where] = images.features.to(device), images.targets.to(device)
        return self._on_device[where]

    def _read(self, name: str, source: Source, part: str) -> Images:
        examples = source.read(part)
        inputs_NP = examples.inputs
        if name not in self._rotations:
            self._rotations[name], self.kept_variance[name] = _principal_directions(
                source.read("train").inputs, self.rank
            )
        rotation_PR = self._rotations[name]
        features_NR = inputs_NP if rotation_PR is None else inputs_NP @ rotation_PR
        return Images(features_NR / math.sqrt(inputs_NP.shape[1]), examples.targets, source.repeat)


def _project(features_NR: Tensor, chosen_BT: Tensor, key_B: Tensor, num_features: int) -> Tensor:
    """The chosen rows times a standard normal Aᵀ of each sequence's own: (B, T, D).

    On the CPU in blocks of sequences, whose normals and rows stay in the cache from the draw to the product. Threads
    take a block each, because two threads on every small operation of one block spend their time waiting.
    """
    (tasks, length), rank = chosen_BT.shape, features_NR.shape[1]
    x_BTD = features_NR.new_empty(tasks, length, num_features)
    inference = torch.is_inference_mode_enabled()  # which other threads do not know of

    def draw(block: slice) -> None:
        with torch.inference_mode(inference):
            rows_bTR = features_NR.index_select(0, chosen_BT[block].flatten()).view(-1, length, rank)
            torch.bmm(rows_bTR, random.normal(key_B[block], (rank, num_features)), out=x_BTD[block])

    on_cpu, threads = features_NR.device.type == "cpu", torch.get_num_threads()
    size = max(1, _CPU_BLOCK // (rank * num_features)) if on_cpu else tasks
    blocks = [slice(first, first + size) for first in range(0, tasks, size)]
    shared = on_cpu and threads > 1 and tasks * rank * num_features >= _WORTH_SHARING
    for _ in _pool(threads).map(draw, blocks) if shared else map(draw, blocks):
        pass
    return x_BTD


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "draw", initializer=torch.set_num_threads, initargs=(1,))


def _principal_directions(inputs_NP: Tensor, rank: int | float | None) -> tuple[Tensor | None, float]:
    """Orthonormal U (P, R) of the largest second moments, and the share of the second moment that it keeps.

    Computed in float64 on the CPU with the sign of each direction fixed, so that it does not depend on the device.
    """
    if rank is None:
        return None, 1.0
    x = inputs_NP.double().cpu()
    moments, directions = torch.linalg.eigh(x.T @ x)
    moments, directions = moments.flip(0).clamp_(min=0), directions.flip(1)
    kept = moments.cumsum(0) / moments.sum()
    count = int((kept < rank).sum()) + 1 if rank < 1 else min(int(rank), len(kept))
    chosen = directions[:, :count]
    strongest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    return (chosen * strongest.sign()).float(), float(kept[count - 1])
