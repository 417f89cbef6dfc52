"""A data set as random projections are applied to it: rotated by its principal directions and scaled.

N examples, P features, R kept features.
"""

import functools
import json
import math
from dataclasses import fields

import torch
from torch import Tensor

from metalearn.base import Examples, Source


class RotatedData:
    """Examples U^T x / sqrt(P): what is drawn for a task is then standard normal. All distributions over them may share it.

    Args:
        source: the data set.
        rank: keep the R leading principal directions U of the training examples: an integer, or a fraction in (0, 1) of
            their second moment; null keeps the inputs as they are.
    """

    def __init__(self, source: Source, rank: int | float | None):
        self.source, self.rank = source, rank
        self._parts: dict[tuple[str, str], Examples] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint()

    @functools.cached_property
    def rotation(self) -> tuple[Tensor | None, float]:
        """U (P, R), or None for none, and the share of the second moment of the training examples that it keeps."""
        return _principal_directions(self.source.read("train").inputs, self.rank)

    def read(self, part: str, device: torch.device | str = "cpu") -> Examples:
        """One part, read once, ready for a standard normal draw: inputs (N, R) over sqrt(P), targets (N,)."""
        where = part, str(device)
        if where not in self._parts:
            here = self._rotated(part) if where[1] == "cpu" else self.read(part)
            self._parts[where] = Examples(*(leaf.to(device) for leaf in here))
        return self._parts[where]

    def _rotated(self, part: str) -> Examples:
        inputs_NP, targets_N = self.source.read(part)
        rotation_PR, _ = self.rotation
        features_NR = inputs_NP if rotation_PR is None else inputs_NP @ rotation_PR
        return Examples(features_NR / math.sqrt(inputs_NP.shape[1]), targets_N)

    def is_same_as(self, other: "RotatedData") -> bool:
        """Whether the source is the same: one object, or of equal settings or, where those cannot tell, of equal content."""
        if self.source is other.source:
            return self.rank == other.rank
        if (type(self.source), self.rank) != (type(other.source), other.rank):
            return False
        ours, theirs = _settings(self.source), _settings(other.source)
        return self.fingerprint == other.fingerprint if None in (ours, theirs) else ours == theirs


def _settings(source: Source) -> str | None:
    """The constructor's arguments, as far as they are builtins, which say all of a data set without its being read."""
    try:
        return json.dumps({field.name: getattr(source, field.name) for field in fields(source)})  # type: ignore[arg-type]
    except TypeError:  # no dataclass, or arrays among its arguments
        return None


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
