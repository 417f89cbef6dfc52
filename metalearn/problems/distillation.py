"""A data set distilled into a few synthetic images, on which a fresh classifier learns in a few steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metalearn import random
from metalearn.base import Batches, Examples, InnerState, Params, Rule, Source, require_choice, require_range
from metalearn.problems.training_runs import TrainingRun

STARTS = ("real", "noise")


class Distillation(TrainingRun):
    """Synthetic images, ``per_class`` of each class, that are all a fresh module is trained on.

    Inner: mean CE on the synthetic images S (K per_class, D), whose labels are fixed. Outer: mean CE on real training
    examples after ``horizon`` steps. Meta-parameters: "images" S and, with ``learn_lr``, "log_lr", the logarithm of the
    rule's learning rate.

    Args:
        source: as in ``TrainingRun``; its training examples are seen by the outer loss only.
        model: as in ``TrainingRun``.
        rule: of the inner run.
        horizon: steps of an episode, at least 1.
        per_class: images of a class, at least 1.
        begin: "real", random training examples of each class; or "noise", standard normal.
        learn_lr: whether the rule's learning rate, from which it starts, is learned too.
        outer_batch_size: different training examples of a window; as in ``TrainingRun``.
        evaluation_inits: fresh modules that ``evaluate`` trains, at least 1.
        init_seed: as in ``TrainingRun``, for meta-training alone.

    Raises:
        ValueError: for values out of range, ``learn_lr`` for a rule without "lr"; by ``init_meta``, for too few examples
        of a class.

    Source: Wang et al. 2018, "Dataset Distillation", algorithm 1.
    Differs from the paper: the same images at every step, and one learning rate for all.
    """

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        horizon: int = 20,
        per_class: int = 1,
        begin: str = "real",
        learn_lr: bool = False,
        outer_batch_size: int | None = None,
        evaluation_inits: int = 5,
        init_seed: int | None = None,
    ):
        super().__init__(source, model, rule, horizon, None, outer_batch_size, init_seed)
        require_range("per_class", per_class, 1)
        require_choice("begin", begin, STARTS)
        require_range("evaluation_inits", evaluation_inits, 1)
        self.lr = getattr(rule, "settings", {}).get("lr", 0.0)
        if learn_lr and self.lr <= 0:
            raise ValueError(f"learn_lr is True for a rule whose lr is {self.lr}; accepted: a rule with lr > 0")
        self.per_class, self.begin, self.learn_lr, self.evaluation_inits = per_class, begin, learn_lr, evaluation_inits

    def _batch_sizes(self) -> tuple[tuple[str, int | None, str], ...]:
        return (("outer_batch_size", self.outer_batch_size, "train"),)

    def init_meta(self, key: Tensor) -> Params:
        real = self.real_images(random.fold(key, "images"))
        images = real if self.begin == "real" else random.normal(key, tuple(real.shape)).to(real.dtype)
        return {"images": images} | ({"log_lr": real.new_tensor(self.lr).log()} if self.learn_lr else {})

    def real_images(self, key: Tensor) -> Tensor:
        """Random training examples, ``per_class`` of each class in turn: (K per_class, D)."""
        inputs, targets = self.examples("train", key.device)
        rows = random.permutation(key, len(targets))
        rows = rows[targets[rows].argsort(stable=True)]
        counts = torch.bincount(targets, minlength=self.num_outputs)
        require_range("per_class", self.per_class, 1, int(counts.min()))
        first = counts.cumsum(0) - counts
        return inputs[rows[(first.unsqueeze(1) + torch.arange(self.per_class, device=key.device)).flatten()]]

    def rule_meta(self, meta: Params) -> Params:
        return {"lr": meta["log_lr"].exp()} if "log_lr" in meta else {}

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        return super().inner_loss(meta, state, Examples(meta["images"], batch), key)

    def inner_batch(self, key: Tensor) -> Tensor:
        """The labels of the synthetic images, which are the same in every step."""
        return torch.arange(self.num_outputs, device=key.device).repeat_interleave(self.per_class)

    def outer_batch(self, key: Tensor, part: str = "train") -> Examples:
        return super().outer_batch(key, part)

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """Mean accuracy of ``evaluation_inits`` fresh modules on validation or test examples.

        ``accuracy_distilled`` after training on the synthetic images, ``accuracy_real`` on as many random real ones, new
        for every module, with the same rule for as many steps.
        """
        part = "test" if test else "validation"
        keys = [random.fold(key, i) for i in range(self.evaluation_inits)]
        distilled = [self._score(meta, one, part) for one in keys]
        real = [self._score(meta | {"images": self.real_images(random.fold(one, "real"))}, one, part) for one in keys]
        return {"accuracy_distilled": sum(distilled) / len(keys), "accuracy_real": sum(real) / len(keys)}

    def _score(self, meta: Params, key: Tensor, part: str) -> float:
        assert self.horizon is not None
        labels = self.inner_batch(key)
        return self.score(self.trained(meta, key, Batches(lambda k: labels, None, self.horizon)).end, part)["accuracy"]
