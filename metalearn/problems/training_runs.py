"""Classifiers that are trained on the examples of a source: what most inner problems are made of.

Shape letters: N examples, D input features, K classes.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn import random, tree
from metalearn.base import BASE, Batches, Examples, InnerState, Params, Rule, Source, require_range
from metalearn.unroll import Descent, Window, unroll


class TrainingRun(Descent):
    """A module trained on the "train" part of a source; the meta-objective is its loss on the "validation" part.

    Inner: mean cross-entropy of a batch, the module in training mode. Outer: mean cross-entropy of validation examples,
    the module in evaluation mode. Residents say what ``meta`` is and where it enters.

    Examples have the precision of the module's parameters and lie on the device of the key that asks for them. The
    module is built on the CPU, and runs begin with what its ``reset_parameters`` draw from the episode's key.

    Args:
        source: labelled examples; the "test" part is read for ``open(test=True)`` only.
        model: class and settings of the module, which is called with the numbers of features and of classes.
        rule: of the inner run.
        horizon: steps of an episode, at least 1; null for an endless one.
        batch_size: different examples of an inner step, at least 1; null for all.
        outer_batch_size: different validation examples of a window, over all ranks, at least 1; null for all.
        init_seed: of initial parameters that are the same in every episode; null for new ones.

    Raises:
        ValueError: for values out of range; by ``open``, for batches larger than their part.
    """

    def __init__(
        self,
        source: Source,
        model: Callable[[int, int], nn.Module],
        rule: Rule,
        horizon: int | None = None,
        batch_size: int | None = None,
        outer_batch_size: int | None = None,
        init_seed: int | None = None,
    ):
        super().__init__(rule, horizon)
        self.source, self.model, self.init_seed = source, model, init_seed
        self.batch_size, self.outer_batch_size = batch_size, outer_batch_size
        self.parts: dict[str, Examples] = {}
        self._modules: tuple[nn.Module, nn.Module] | None = None
        self._on_device: dict[tuple[str, str], Examples] = {}
        self._identity: dict[str, Any] = {}

    # -- data --------------------------------------------------------------------------------------------------------

    def open(self, *, test: bool) -> None:
        wanted = ("train", "validation", "test") if test else ("train", "validation")
        if missing := [part for part in wanted if part not in self.parts]:
            self.parts |= self.read(missing)
        for name, size, part in self._batch_sizes():
            require_range(name, 1 if size is None else size, 1, len(self.parts[part].targets))
        if self._modules is None:
            with torch.random.fork_rng([]):  # what no reset_parameters sets must not depend on what was drawn before
                torch.manual_seed(0)
                module = self.model(self.parts["train"].inputs.shape[1], self.num_outputs)
            self._modules = module.train(), copy.deepcopy(module).eval()
            self.global_generator = tree.draws(module)

    def read(self, parts: list[str]) -> dict[str, Examples]:
        """The examples of these parts, and what else is made of them."""
        return {part: self.source.read(part) for part in parts}

    def _batch_sizes(self) -> tuple[tuple[str, int | None, str], ...]:
        """Name, size and part of every draw of different examples."""
        return ("batch_size", self.batch_size, "train"), ("outer_batch_size", self.outer_batch_size, "validation")

    @property
    def num_outputs(self) -> int:
        """Outputs K of the module."""
        return self.source.num_classes

    def record(self) -> dict[str, Any]:
        if not self._identity:  # hashed once, not at every checkpoint
            self._identity = {
                "fingerprint": {BASE: self.source.fingerprint()},
                "revision": {BASE: self.source.revision},
                "division": self.division(),
            }
        return self._identity

    def division(self) -> dict[str, Any]:
        """The settings that say which examples or classes are for what: a checkpoint is tested under the same only."""
        return {}

    def examples(self, part: str, device: torch.device | str) -> Examples:
        """All examples of a part on ``device``, moved there once.

        Raises:
            ValueError: for a part that was not read.
        """
        where = part, str(device)
        if where not in self._on_device:
            if part not in self.parts:
                raise ValueError(
                    f"part is {part!r}; accepted: {', '.join(self.parts) or 'none before open()'}; the "
                    "test part after open(test=True)"
                )
            inputs, targets = self.parts[part]
            like = next(self.module.parameters())
            self._on_device[where] = Examples(inputs.to(device, like.dtype), targets.to(device))
        return self._on_device[where]

    def batches(self, key: Tensor, steps: int) -> Batches:
        inner_key, outer = random.fold(key, "inner"), self.outer_batch(random.fold(key, "outer"))
        return Batches(lambda k: self.inner_batch(random.fold(inner_key, k)), outer, steps)

    def inner_batch(self, key: Tensor) -> Any:
        """The batch of an inner step."""
        return draw(self.examples("train", key.device), self.batch_size, key)

    def outer_batch(self, key: Tensor, part: str = "validation") -> Examples:
        """This rank's share of a draw that all ranks agree on."""
        drawn = draw(self.examples(part, key.device), self.outer_batch_size, key)
        share, rest = divmod(len(drawn.targets), self.world)
        if rest:
            raise ValueError(
                f"outer_batch_size is {self.outer_batch_size}, which gives {len(drawn.targets)} examples; accepted: a "
                f"multiple of the {self.world} ranks"
            )
        return Examples(*(leaf[self.rank * share :][:share] for leaf in drawn))

    # -- the run -----------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The module in training mode, whose own parameters are never used."""
        return self._both[0]

    @property
    def _both(self) -> tuple[nn.Module, nn.Module]:
        if self._modules is None:
            raise ValueError("the data are not read: call open(test=False) first")
        return self._modules

    @abstractmethod
    def init_meta(self, key: Tensor) -> Params: ...

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return self.start(meta, *self.initial(key))

    def initial(self, key: Tensor) -> tuple[Params, Params]:
        """Parameters and buffers at the start of an episode, on the device of the key."""
        seed = key if self.init_seed is None else random.key(self.init_seed, "init")
        return tree.map(lambda leaf: leaf.to(key.device), tree.initialise(self.module, seed))

    def inner_loss(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[Tensor, Params]:
        logits, buffers = tree.call(self.module, state.params, state.buffers, batch.inputs)
        return functional.cross_entropy(logits, batch.targets), buffers

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return functional.cross_entropy(self.predict(state, batch.inputs), batch.targets)

    def predict(self, state: InnerState, inputs: Tensor) -> Tensor:
        """Logits (N, K), the module in evaluation mode."""
        return tree.call(self._both[1], state.params, state.buffers, inputs)[0]

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """Loss and accuracy, on validation or test examples, of one new run of ``horizon`` steps.

        Raises:
            ValueError: where the run is endless.
        """
        if self.horizon is None:
            raise ValueError("horizon is None; accepted for an evaluation: a number of steps")
        end = self.trained(meta, key, self.batches(key, self.horizon)).end
        return self.score(end, "test" if test else "validation")

    def trained(self, meta: Params, key: Tensor, batches: Batches) -> Window:
        """A new run on these batches, to its end."""
        with torch.no_grad():
            return unroll(self, meta, self.init(meta, random.fold(key, "init")), batches, random.fold(key, "steps"))

    def score(self, state: InnerState, part: str) -> dict[str, float]:
        """Loss and accuracy on all examples of a part."""
        inputs, targets = self.examples(part, state.step.device)
        with torch.no_grad():
            logits = self.predict(state, inputs)
        loss = functional.cross_entropy(logits, targets)
        return {"loss": float(loss), "accuracy": float(accuracy(logits, targets))}


def draw(examples: Examples, count: int | None, key: Tensor) -> Examples:
    """``count`` different examples in random order; all of them, in their own, for None."""
    if count is None:
        return examples
    rows = random.distinct(key, count, len(examples.targets))
    return Examples(*(leaf[rows] for leaf in examples))


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of examples whose largest logit is the target's."""
    return (logits.argmax(-1) == targets).to(logits.dtype).mean()
