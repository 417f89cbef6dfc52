"""Loss gradients of many candidates at once: all that tells their otherwise equal training runs apart.

Shape letters: P candidates, N examples, K classes or outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class CandidateGradients(ABC):
    """The gradient of each candidate's mean loss by the raw outputs of its own model, on shared targets."""

    count: int  # P

    @abstractmethod
    def gradient(self, prediction_PNK: Tensor, target_NK: Tensor) -> Tensor:
        """d mean_n loss_p / d prediction: (P, N, K). Row p depends on row p of the predictions alone."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> CandidateGradients:
        """Those of some candidates, in this order."""
