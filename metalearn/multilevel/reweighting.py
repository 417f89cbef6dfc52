"""Meta-Weight-Net on long-tailed data, and a third level above it: programs that weight examples by their loss.

Shape letters: N examples, D input features, K classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn import random
from metalearn.base import BASE, Estimator, Examples, Rule, Source, Tree, require_range
from metalearn.models.vision import MLP
from metalearn.multilevel.graph import Graph
from metalearn.multilevel.problem import Nets, Problem
from metalearn.multilevel.program import Program
from metalearn.problems.training_runs import accuracy, draw

LONG_TAIL, META, SELECTION, BOTH = "long_tail", "meta", "selection", "long_tail_and_clean"


class Reweighting(Program):
    """A classifier trained on long-tailed data under weights that a small network gives to each example by its loss.

    Lower problem ``classifier``: mean_i w(l_i) l_i with l_i = CE(f_theta(x_i), y_i), the loss inside w held fixed. Upper
    problem ``weights``: mean CE of the classifier on a small set with as many examples of each class. w(l) is the
    sigmoid of a network with one hidden layer.

    Of the source's "train" part, ``meta_per_class`` examples of each class are set aside for the upper problem. Of the
    others, class c of K keeps n imbalance^(-c / (K - 1)) examples, rounded, at least 1, n the size of its smallest
    class: class 0 is the head of the tail. Both are drawn by ``data_seed``.

    Args:
        source: labelled examples; the "validation" part is for ``evaluate``, the "test" part for ``evaluate(test=True)``.
        model: class and settings of the classifier, which is called with the numbers of features and of classes.
        rule: of the classifier, and of those that ``evaluate`` compares it with.
        weights_rule: of the weighting network.
        imbalance: examples of the most frequent class over those of the rarest, at least 1.
        meta_per_class: examples of each class in the meta set, at least 1.
        batch_size: different long-tailed examples of a step of the classifier, over all ranks, at least 1; null for all.
        meta_batch_size: different meta examples of a step of the weighting network, as ``batch_size``.
        unroll_steps: steps of the classifier to one of the weighting network, at least 1.
        estimator: of the response of the classifier to the weights; null for ``Unrolled("store")``.
        hidden: units of the weighting network, at least 1.
        precision: of the classifier's loss, "32" or "bf16".
        data_seed: of the meta set and the long tail.

    Raises:
        ValueError: for values out of range; by ``open``, for classes that are too small or batches that are too large.

    Source: Shu et al. 2019, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting", eqs. 1-5; the long tail,
    Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", section 5.1.
    Differs from the paper: every estimator, where the paper unrolls one step; any number of classifier steps between two
    steps of the weighting network; the classifier is not put back to where it was before the look-ahead steps.
    """

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        weights_rule: Rule,
        imbalance: float = 100.0,
        meta_per_class: int = 10,
        batch_size: int | None = None,
        meta_batch_size: int | None = None,
        unroll_steps: int = 1,
        estimator: Estimator | None = None,
        hidden: int = 100,
        precision: str = "32",
        data_seed: int = 0,
    ):
        require_range("imbalance", imbalance, 1)
        require_range("meta_per_class", meta_per_class, 1)
        self.source, self.model, self.rule, self.weights_rule = source, model, rule, weights_rule
        self.imbalance, self.meta_per_class, self.data_seed = imbalance, meta_per_class, data_seed
        self.batch_size, self.meta_batch_size = batch_size, meta_batch_size
        self.unroll_steps, self.estimator, self.hidden, self.precision = unroll_steps, estimator, hidden, precision
        self.parts: dict[str, Examples] = {}
        self._on_device: dict[tuple[str, str], Examples] = {}
        self._identity: dict[str, Any] = {}

    # -- data --------------------------------------------------------------------------------------------------------

    @property
    def clean(self) -> tuple[str, ...]:
        """The balanced sets that are set aside."""
        return (META,)

    def open(self, *, test: bool) -> None:
        if not self.parts:
            self.parts = self._divided(self.source.read("train")) | {"validation": self.source.read("validation")}
            self._require_batch("batch_size", self.batch_size, LONG_TAIL)
            self._require_batch("meta_batch_size", self.meta_batch_size, META)
        if test and "test" not in self.parts:
            self.parts["test"] = self.source.read("test")

    def record(self) -> dict[str, Any]:
        if not self._identity:  # hashed once, not at every checkpoint
            self._identity = {
                "fingerprint": {BASE: self.source.fingerprint()},
                "revision": {BASE: self.source.revision},
                "imbalance": float(self.imbalance),
                "meta_per_class": self.meta_per_class,
                "data_seed": self.data_seed,
            }
        return self._identity

    def _divided(self, examples: Examples) -> dict[str, Examples]:
        """The long tail, the balanced sets, and all of these together."""
        key, num_classes = random.key(self.data_seed, "long_tail"), self.source.num_classes
        rows = [(examples.targets == c).nonzero().squeeze(1) for c in range(num_classes)]
        rows = [own[random.permutation(random.fold(key, c), len(own))] for c, own in enumerate(rows)]
        taken = len(self.clean) * self.meta_per_class
        largest = min(len(own) for own in rows) - taken
        if largest < 1:
            raise ValueError(
                f"meta_per_class is {self.meta_per_class}, and the smallest class has {largest + taken} examples; "
                f"accepted: fewer than {(largest + taken) / len(self.clean):g}"
            )
        sizes = tail_sizes(largest, num_classes, self.imbalance)
        chosen = {LONG_TAIL: [own[taken:][:size] for own, size in zip(rows, sizes, strict=True)]}
        for number, name in enumerate(self.clean):
            chosen[name] = [own[number * self.meta_per_class :][: self.meta_per_class] for own in rows]
        chosen[BOTH] = [own for kind in list(chosen.values()) for own in kind]
        return {name: Examples(*(leaf[torch.cat(kind)] for leaf in examples)) for name, kind in chosen.items()}

    def _require_batch(self, name: str, size: int | None, part: str) -> None:
        require_range(name, 1 if size is None else size, 1, len(self.parts[part].targets))

    def examples(self, part: str, device: torch.device | str) -> Examples:
        """All examples of a part on ``device``, moved there once.

        Raises:
            ValueError: for a part that was not read.
        """
        if part not in self.parts:
            raise ValueError(
                f"part is {part!r}; accepted: {', '.join(self.parts) or 'none before open()'}; the test part after "
                "open(test=True)"
            )
        where = part, str(device)
        if where not in self._on_device:
            self._on_device[where] = Examples(*(leaf.to(device) for leaf in self.parts[part]))
        return self._on_device[where]

    def sampler(self, part: str, size: int | None) -> Callable[[Tensor], Examples]:
        """The data of a problem: ``size`` different examples of a part by a key."""
        return lambda key: draw(self.examples(part, key.device), size, key)

    # -- the program -------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        problems = [self.weights(), self.classifier("validation")]
        return Graph(problems, {"weights": ["classifier"]}, {"classifier": ["weights"]})

    def weights(self) -> Problem:
        """The weighting network."""
        module = MLP(1, 1, [self.hidden], activation="relu")
        data = self.sampler(META, self.meta_batch_size)
        return Problem("weights", module, self.weights_rule, self.weights_loss, data)

    def weights_loss(self, nets: Nets, batch: Examples) -> Tensor:
        """Mean cross-entropy of the classifier on balanced examples."""
        return functional.cross_entropy(nets.classifier(batch.inputs), batch.targets)

    def classifier(self, scored: str, weighted: bool = True, part: str = LONG_TAIL) -> Problem:
        """The classifier, its accuracy measured on the part ``scored``; under weights, or without any on another part."""
        return Problem(
            "classifier",
            self.model(self.parts[part].inputs.shape[1], self.source.num_classes),
            self.rule,
            weighted_loss if weighted else plain_loss,
            self.sampler(part, self.batch_size),
            unroll_steps=self.unroll_steps if weighted else 1,
            estimator=self.estimator if weighted else None,
            precision=self.precision,
            validation=lambda nets: self._score(nets, scored),
        )

    def _score(self, nets: Nets, part: str) -> dict[str, float]:
        device = next(iter(nets.classifier.params.values())).device
        inputs, targets = self.examples(part, device)
        logits = nets.classifier(inputs)
        recalls = [accuracy(logits[targets == c], targets[targets == c]) for c in targets.unique()]
        return {"accuracy": float(torch.stack(recalls).mean())}

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, state: Tree, key: Tensor, *, test: bool) -> dict[str, float]:
        """Accuracies, as means over classes, of the classifier and of two that were trained without weights.

        Both take as many steps by the same rule, from the same start: ``plain`` on the long tail alone, and
        ``plain_with_clean`` on the long tail and the balanced examples together, from which ``accuracy``'s weights were
        learned. ``weight_head`` and ``weight_tail`` are the mean weights of long-tailed examples of the most frequent
        class and of the rarest.
        """
        scored = "test" if test else "validation"
        found = {"accuracy": self.accuracy(state, scored)}
        steps = int(state["levels"]["classifier"].step)
        found["accuracy_plain"] = self.without_weights(LONG_TAIL, scored, steps, key)
        found["accuracy_plain_with_clean"] = self.without_weights(BOTH, scored, steps, key)
        return found | self._mean_weights(state)

    def without_weights(self, part: str, scored: str, steps: int, key: Tensor) -> float:
        """Accuracy of a classifier after ``steps`` steps on a part with equal weights."""
        graph = Graph([self.classifier(scored, weighted=False, part=part)], {}, {})
        state = graph.init(key)
        for _ in range(steps):
            state, _ = graph.step(state, key)
        return self.accuracy(state, scored)

    def accuracy(self, state: Tree, scored: str) -> float:
        """Of the classifier on a part, as the mean over classes."""
        graph = Graph([self.classifier(scored, weighted=False)], {}, {})
        return graph.validate(state)["classifier/accuracy"]

    def _mean_weights(self, state: Tree) -> dict[str, float]:
        nets = self.graph().nets(state)
        inputs, targets = self.examples(LONG_TAIL, state["step"].device)
        with torch.no_grad():
            weights_N = weigh(nets, functional.cross_entropy(nets.classifier(inputs), targets, reduction="none"))
        ends = {"weight_head": 0, "weight_tail": self.source.num_classes - 1}
        return {name: float(weights_N[targets == c].mean()) for name, c in ends.items()}


class RegularisedReweighting(Reweighting):
    """Meta-Weight-Net with a third level above it, which learns how much the weighting network's parameters decay.

    Top problem ``decay``: mean CE of the classifier on a second balanced set of the size of the first, by the logarithm of
    the decay c. Middle problem ``weights``: as in ``Reweighting``, plus c/2 |parameters of the weighting network|^2.
    Lower problem ``classifier``: as there. ``evaluate`` counts the second set among the clean examples.

    Args:
        decay_rule: of log c.
        weights_unroll_steps: steps of the weighting network to one of log c, at least 1.
        weights_estimator: of the response of the weighting network to log c; null for ``Unrolled("store")``.
        initial_decay: c at the start, > 0.
        settings: those of ``Reweighting``.

    Raises:
        ValueError: as ``Reweighting``, or for an initial decay that is not positive.
    """

    def __init__(
        self,
        decay_rule: Rule,
        weights_unroll_steps: int = 1,
        weights_estimator: Estimator | None = None,
        initial_decay: float = 1e-3,
        **settings: Any,
    ):
        super().__init__(**settings)
        if not initial_decay > 0:
            raise ValueError(f"initial_decay is {initial_decay!r}; accepted: initial_decay > 0")
        self.decay_rule, self.initial_decay = decay_rule, initial_decay
        self.weights_unroll_steps, self.weights_estimator = weights_unroll_steps, weights_estimator

    @property
    def clean(self) -> tuple[str, ...]:
        return META, SELECTION

    def graph(self) -> Graph:
        data = self.sampler(SELECTION, self.meta_batch_size)
        decay = Problem("decay", LogDecay(self.initial_decay), self.decay_rule, super().weights_loss, data)
        problems = [decay, self.weights(), self.classifier("validation")]
        sees = {"decay": ["classifier"], "weights": ["classifier"]}
        return Graph(problems, sees, {"classifier": ["weights"], "weights": ["decay"]})

    def weights(self) -> Problem:
        problem = super().weights()
        problem.unroll_steps, problem.estimator = self.weights_unroll_steps, self.weights_estimator
        return problem

    def weights_loss(self, nets: Nets, batch: Examples) -> Tensor:
        squares = torch.stack([value.square().sum() for value in nets.weights.params.values()]).sum()
        return super().weights_loss(nets, batch) + nets.decay.params["log_decay"].exp() / 2 * squares

    def evaluate(self, state: Tree, key: Tensor, *, test: bool) -> dict[str, float]:
        log_decay = state["levels"]["decay"].params["log_decay"]
        return super().evaluate(state, key, test=test) | {"decay": float(log_decay.exp())}


class LogDecay(nn.Module):
    """The logarithm of a weight decay, as the parameter ``log_decay``."""

    def __init__(self, initial: float):
        super().__init__()
        self.log_decay = nn.Parameter(torch.tensor(initial).log())


def tail_sizes(largest: int, num_classes: int, imbalance: float) -> list[int]:
    """Examples of each class: ``largest imbalance^(-c / (K - 1))``, rounded, at least 1."""
    last = max(num_classes - 1, 1)
    return [max(round(largest * imbalance ** (-c / last)), 1) for c in range(num_classes)]


def plain_loss(nets: Nets, batch: Examples) -> Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(nets.classifier(batch.inputs), batch.targets)


def weighted_loss(nets: Nets, batch: Examples) -> Tensor:
    """Cross-entropy, every example's weighted by what the weighting network says of it, and divided by their number."""
    losses_N = functional.cross_entropy(nets.classifier(batch.inputs), batch.targets, reduction="none")
    return (weigh(nets, losses_N) * losses_N).mean()


def weigh(nets: Nets, losses_N: Tensor) -> Tensor:
    """Weights (N,) in (0, 1) of examples with these losses, which are held fixed."""
    return nets.weights(losses_N.detach().unsqueeze(1)).sigmoid().squeeze(1)
