"""One learned weight for every training example, under label noise: which of them to trust."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn import random, tree
from metalearn.base import Batches, Examples, InnerState, Params, Rule, Source, require_range
from metalearn.problems.training_runs import TrainingRun


class Weighted(NamedTuple):
    """Examples with their rows (N,) in the vector of weights."""

    inputs: Tensor
    targets: Tensor
    rows: Tensor


class DataWeights(TrainingRun):
    """Training on noisy labels, each example weighted by a meta-parameter; the meta-objective is the loss on few clean ones.

    Inner: mean_i sigmoid(v_i) CE(f_theta(x_i), y_i). Outer: mean CE on the clean examples. ``num_examples`` of the
    source's "train" part are trained on, of which a share ``noise`` have labels drawn anew from all classes, so that
    some stay right by chance. The clean examples are the first of the "validation" part; the others of it are for
    ``evaluate(test=False)``.

    Args:
        source: as in ``TrainingRun``.
        model: as in ``TrainingRun``.
        rule: of the inner run and of the runs that ``evaluate`` compares.
        num_examples: training examples N, at least 1.
        clean_examples: at least 1, and fewer than the "validation" part has.
        noise: share of training labels that are drawn anew, in [0, 1].
        noise_seed: of these draws.
        evaluation_steps: full-batch steps of the runs that ``evaluate`` compares, at least 1.
        horizon: as in ``TrainingRun``.
        batch_size: as in ``TrainingRun``.
        outer_batch_size: clean examples of a window; as in ``TrainingRun``.
        init_seed: as in ``TrainingRun``.

    Raises:
        ValueError: for values out of range; by ``open``, for parts with fewer examples than asked for.

    Source: Franceschi et al. 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization", section 5.1.
    Differs from the paper: weights are kept in (0, 1) by a sigmoid instead of a projection, and start at 1/2.
    """

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        num_examples: int,
        clean_examples: int,
        noise: float = 0.5,
        noise_seed: int = 0,
        evaluation_steps: int = 500,
        horizon: int | None = None,
        batch_size: int | None = None,
        outer_batch_size: int | None = None,
        init_seed: int | None = None,
    ):
        super().__init__(source, model, rule, horizon, batch_size, outer_batch_size, init_seed)
        for name, value in dict(num_examples=num_examples, clean_examples=clean_examples).items():
            require_range(name, value, 1)
        require_range("noise", noise, 0, 1)
        require_range("evaluation_steps", evaluation_steps, 1)
        self.num_examples, self.clean_examples, self.evaluation_steps = num_examples, clean_examples, evaluation_steps
        self.noise, self.noise_seed = noise, noise_seed
        self.correct = torch.zeros(0, dtype=torch.bool)

    def read(self, parts: list[str]) -> dict[str, Examples]:
        found = super().read(parts)
        if "train" not in found:
            return found
        (inputs, targets), validation = found["train"], found["validation"]
        require_range("num_examples", self.num_examples, 1, len(targets))
        require_range("clean_examples", self.clean_examples, 1, len(validation.targets) - 1)
        inputs, targets = inputs[: self.num_examples], targets[: self.num_examples]
        noisy = self._noisy(targets)
        self.correct = noisy == targets
        found["train"] = Examples(inputs, noisy)
        found["clean"] = Examples(*(leaf[: self.clean_examples] for leaf in validation))
        found["validation"] = Examples(*(leaf[self.clean_examples :] for leaf in validation))
        return found

    def division(self) -> dict[str, Any]:
        names = ("num_examples", "clean_examples", "noise", "noise_seed")
        return {name: getattr(self, name) for name in names}

    def _noisy(self, targets: Tensor) -> Tensor:
        key, count = random.key(self.noise_seed, "noise"), len(targets)
        rows = random.distinct(random.fold(key, "rows"), round(self.noise * count), count)
        drawn = random.integers(random.fold(key, "labels"), (len(rows),), self.source.num_classes)
        return targets.index_put((rows,), drawn)

    def _batch_sizes(self) -> tuple[tuple[str, int | None, str], ...]:
        return ("batch_size", self.batch_size, "train"), ("outer_batch_size", self.outer_batch_size, "clean")

    def init_meta(self, key: Tensor) -> Params:
        like = next(self.module.parameters())
        return {"weights": torch.zeros(self.num_examples, dtype=like.dtype, device=key.device)}

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        logits, buffers = tree.call(self.module, state.params, state.buffers, batch.inputs)
        losses_N = functional.cross_entropy(logits, batch.targets, reduction="none")
        return (meta["weights"].sigmoid()[batch.rows] * losses_N).mean(), buffers

    def inner_batch(self, key: Tensor) -> Weighted:
        inputs, targets = self.examples("train", key.device)
        if self.batch_size is None:
            return Weighted(inputs, targets, torch.arange(len(targets), device=key.device))
        rows = random.distinct(key, self.batch_size, len(targets))
        return Weighted(inputs[rows], targets[rows], rows)

    def outer_batch(self, key: Tensor, part: str = "clean") -> Examples:
        return super().outer_batch(key, part)

    def f1(self, meta: Params) -> float:
        """How well weights above 1/2 find the right labels: 2 TP / (2 TP + FP + FN) of the class "label is right"."""
        chosen, correct = meta["weights"] > 0, self.correct.to(meta["weights"].device)
        return float(2 * (chosen & correct).sum() / (chosen.sum() + correct.sum()))

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """``f1``, and the accuracy of classifiers trained on differently weighted examples.

        Every classifier starts at the same parameters and takes
        ``evaluation_steps`` steps on all examples, noisy and clean, with its own weights: ``learned`` on the noisy ones
        weighted by meta; ``all_data`` on noisy and clean ones alike; ``clean_only``; and ``oracle`` on the noisy ones
        whose label is right.
        """
        correct, clean = self.correct.to(key.device), self.examples("clean", key.device)
        part = "test" if test else "validation"
        pool = [torch.cat(pair) for pair in zip(self.examples("train", key.device), clean, strict=True)]
        sure = torch.full_like(meta["weights"], torch.inf)
        of_clean = torch.full((self.clean_examples,), torch.inf, device=key.device, dtype=sure.dtype)
        weightings = {
            "learned": torch.cat([meta["weights"], -of_clean]),
            "all_data": torch.cat([sure, of_clean]),
            "clean_only": torch.cat([-sure, of_clean]),
            "oracle": torch.cat([torch.where(correct, sure, -sure), -of_clean]),
        }
        found = {"f1": self.f1(meta)}
        for name, weights in weightings.items():
            kept = torch.arange(len(weights), device=key.device)[weights > -torch.inf]
            batch = Weighted(pool[0][kept], pool[1][kept], kept)
            run = self.trained({"weights": weights}, key, _constant(batch, self.evaluation_steps))
            found[f"accuracy_{name}"] = self.score(run.end, part)["accuracy"]
        return found


def _constant(batch: Weighted, steps: int) -> Batches:
    return Batches(lambda k: batch, None, steps)
