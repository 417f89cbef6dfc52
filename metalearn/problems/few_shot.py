"""Few-shot classification by adapting learned parameters: implicit MAML, under ``Tasks`` with many tasks at once.

C classes of a part, M examples of the largest of them, D input features.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metalearn import random, tree
from metalearn.base import Batches, Examples, InnerState, Params, Rule, Source, require_range
from metalearn.problems.training_runs import TrainingRun, accuracy
from metalearn.unroll import Tasks, unroll

PARTS = ("train", "validation", "test")


class FewShot(TrainingRun):
    """One task: ``ways`` classes with ``shots`` examples each, learned from parameters phi that serve all tasks.

    Inner: CE on the support examples + (proximal / 2) |theta - phi|^2, from theta = phi. Outer: CE on the task's query
    examples. The meta-parameters phi are the module's, by its own names. ``Tasks(FewShot(...), num_tasks)`` averages
    over tasks; implicit estimators differentiate through the solution, ``Unrolled`` through the steps (MAML).

    Tasks are made of the source's "train" part. Its classes are divided: a share ``held_out`` is for meta-test tasks,
    as much for validation, the others are for training tasks. Give a source ``test=0`` and ``validation=0``, so that every
    example is in "train".

    Args:
        source: as in ``TrainingRun``.
        model: as in ``TrainingRun``; it is called with the numbers of features and of ways.
        rule: of the inner run.
        horizon: steps of a task, at least 1.
        ways: classes of a task, at least 2.
        shots: support examples of a class, at least 1.
        queries: query examples of a class, at least 1.
        proximal: weight of the distance from phi, at least 0.
        held_out: share of the classes in validation and again in test tasks, in [0, 0.5]; 0 only where nothing is evaluated.
        class_seed: of this division.
        evaluation_tasks: fresh tasks of ``evaluate``, at least 2.

    Raises:
        ValueError: for values out of range; by ``open``, for a part with fewer than ``ways`` classes that have
        ``shots + queries`` examples.

    Source: Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients", eqs. 2-4; without the proximal term Finn et
    al. 2017, "Model-Agnostic Meta-Learning".
    Differs from the papers: the inner solver is any rule.
    """

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        horizon: int = 5,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        proximal: float = 1.0,
        held_out: float = 0.2,
        class_seed: int = 0,
        evaluation_tasks: int = 100,
    ):
        super().__init__(source, model, rule, horizon)
        require_range("ways", ways, 2)
        require_range("evaluation_tasks", evaluation_tasks, 2)
        for name, value in dict(shots=shots, queries=queries).items():
            require_range(name, value, 1)
        require_range("proximal", proximal, 0)
        require_range("held_out", held_out, 0, 0.5)
        self.ways, self.shots, self.queries, self.proximal = ways, shots, queries, proximal
        self.held_out, self.class_seed, self.evaluation_tasks = held_out, class_seed, evaluation_tasks
        self._rows: dict[tuple[str, str], Tensor] = {}

    @property
    def num_outputs(self) -> int:
        return self.ways

    def division(self) -> dict[str, Any]:
        return {"held_out": self.held_out, "class_seed": self.class_seed}

    def read(self, parts: list[str]) -> dict[str, Examples]:
        inputs, targets = self.source.read("train")
        num_classes = self.source.num_classes
        order = random.permutation(random.key(self.class_seed, "classes"), num_classes)
        share = round(self.held_out * num_classes)
        sizes = [num_classes - 2 * share, share, share]
        found = {}
        for part, classes in zip(PARTS, order.split(sizes), strict=True):
            if part in parts:
                kept = torch.isin(targets, classes)
                found[part] = Examples(inputs[kept], targets[kept])
                self._require_classes(part, found[part].targets)
        return found

    def _require_classes(self, part: str, targets: Tensor) -> None:
        able = int((targets.bincount() >= self.shots + self.queries).sum()) if len(targets) else 0
        if able < self.ways:
            raise ValueError(
                f"ways is {self.ways}; accepted: at most the {able} classes of {part!r} that have shots + queries = "
                f"{self.shots + self.queries} examples"
            )

    def init_meta(self, key: Tensor) -> Params:
        return self.initial(key)[0]

    def init(self, meta: Params, key: Tensor) -> InnerState:
        # Nothing is drawn: estimators differentiate through the start, which is the meta-parameters themselves.
        buffers = {name: value.detach().clone().to(key.device) for name, value in self.module.named_buffers()}
        return self.start(meta, dict(meta), buffers)

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        loss, buffers = super().inner_loss(meta, state, batch, key)
        distance = tree.add(state.params, meta, -1.0)
        return loss + self.proximal / 2 * tree.dot(distance, distance), buffers

    def batches(self, key: Tensor, steps: int) -> Batches:
        support, query = self.task(key, "train")
        return Batches(lambda k: support, query, steps)

    def task(self, key: Tensor, part: str) -> tuple[Examples, Examples]:
        """Support (ways shots, D) and query examples (ways queries, D) of the task that the key draws."""
        inputs, _ = self.examples(part, key.device)
        rows_CM = self._rows_by_class(part, key.device)
        chosen = random.distinct(random.fold(key, "classes"), self.ways, len(rows_CM))
        rows_wM = rows_CM[chosen]
        # Classes differ in size: their missing examples come last in every random order.
        order = random.uniform(random.fold(key, "examples"), tuple(rows_wM.shape)).masked_fill(rows_wM < 0, 2.0)
        rows_wM = rows_wM.gather(1, order.argsort(1))
        labels_w = torch.arange(self.ways, device=key.device)
        cuts = (0, self.shots), (self.shots, self.shots + self.queries)
        support, query = (
            Examples(inputs[rows_wM[:, a:b].flatten()], labels_w.repeat_interleave(b - a)) for a, b in cuts
        )
        return support, query

    def _rows_by_class(self, part: str, device: torch.device) -> Tensor:
        """Rows of the examples of each class that has enough of them, filled up with -1: (C, M)."""
        where = part, str(device)
        if where not in self._rows:
            targets = self.parts[part].targets
            rows = [(targets == label).nonzero().squeeze(1) for label in targets.unique()]
            rows = [of_class for of_class in rows if len(of_class) >= self.shots + self.queries]
            self._rows[where] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
        return self._rows[where]

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """Mean query accuracy on fresh tasks of held-out classes, and half of its 95 % confidence interval (normal)."""
        assert self.horizon is not None
        part, count = "test" if test else "validation", self.evaluation_tasks
        tasks = [self.task(random.fold(key, "task", i), part) for i in range(count)]
        support, query = (tree.stack(list(examples)) for examples in zip(*tasks, strict=True))
        together = Tasks(self, count)
        start = together.init(meta, random.fold(key, "init"))
        with torch.no_grad():
            batches = Batches(lambda k: support, None, self.horizon)
            end = unroll(together, meta, start, batches, random.fold(key, "steps")).end
            logits = torch.vmap(self.predict)(end, query.inputs)
            found = torch.vmap(accuracy)(logits, query.targets).double()
        half = 1.96 * found.std() / math.sqrt(count)
        return {"accuracy": float(found.mean()), "accuracy_half_interval": float(half)}
