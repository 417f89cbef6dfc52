"""Data sets that are drawn, not read."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from metalearn.base import Examples, Source, require_choice, require_range
from metalearn.random import integers, key, normal
from metalearn.tasks.examples import PARTS


@dataclass(eq=False)
class RandomSource(Source):
    """A fixed set of standard normal inputs with uniformly random labels, the same in every part: only to be memorised.

    Args:
        num_examples: N, >= 1.
        num_features: D, >= 1.
        num_classes: K, >= 1.
        seed: of the inputs and labels.
    """

    num_examples: int = 20
    num_features: int = 784
    num_classes: int = 10
    seed: int = 0

    repeat: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("num_examples", "num_features", "num_classes"):
            require_range(option, getattr(self, option), 1)

    @property
    def class_names(self) -> tuple[str, ...]:
        """``("0", "1", ...)``."""
        return tuple(str(label) for label in range(self.num_classes))

    def read(self, part: str) -> Examples:
        """The examples, whichever the part."""
        require_choice("part", part, PARTS)
        inputs_ND = normal(key(self.seed, "inputs"), (self.num_examples, self.num_features))
        return Examples(inputs_ND, integers(key(self.seed, "targets"), (self.num_examples,), self.num_classes))

    def fingerprint(self) -> str:
        """SHA-256 of the inputs and targets."""
        inputs_ND, targets_N = self.read("train")
        return hashlib.sha256(inputs_ND.numpy().tobytes() + targets_N.numpy().tobytes()).hexdigest()
