"""From decoded rows to examples: which rows form which part, what the classes are, how inputs are normalised.

Shape letters: N rows, D input features, K classes. Nothing here knows where the rows come from.
"""

import functools
import hashlib
import json
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metalearn.base import Examples, Source, require_choice
from metalearn.random import key, permutation

PARTS = ("train", "validation", "test")


class Labels(NamedTuple):
    """A label column: ``index_N`` int64 positions in ``names``, the names of all classes of the data set."""

    index_N: np.ndarray
    names: tuple[str, ...]


def split_names(split: str) -> list[str]:
    """``train[:50]+test`` -> ``["train", "test"]``."""
    return list(dict.fromkeys(re.split(r"[\[(]", piece)[0].strip() for piece in split.split("+")))


def part_rows(num_rows: int, test: float, validation: float, seed: int | None) -> dict[str, np.ndarray]:
    """Row numbers of "train", "validation" and "test": disjoint, and together all ``num_rows`` rows.

    ``round(test * N)`` rows are "test", ``round(validation * (N - tests))`` of the others are "validation".

    Args:
        num_rows: N.
        test: fraction of all rows.
        validation: fraction of the rows that are not "test".
        seed: of the permutation that the parts are cut from; None keeps the order, "train" first and "test" last.
    """
    order_N = np.arange(num_rows) if seed is None else permutation(key(seed, "parts"), num_rows).numpy()
    first_test = num_rows - round(test * num_rows)
    first_validation = first_test - round(validation * first_test)
    return dict(zip(PARTS, np.split(order_N, [first_validation, first_test]), strict=True))


def labels_of(column_N: np.ndarray, names: Sequence[str] | None, column: str) -> Labels:
    """The classes of a column: ``names`` where its values are positions in that list, else its sorted unique values.

    Raises:
        ValueError: where a row has no label, or the values are numbers that are not whole.
    """
    if column_N.dtype.kind == "O" and any(value is None for value in column_N):
        raise ValueError(f"column {column!r} has rows without a label; accepted: a label in every row")
    if column_N.dtype.kind == "f":
        if not (np.isfinite(column_N) & (column_N == np.round(column_N))).all():
            raise ValueError(
                f"column {column!r} has missing or fractional numbers; accepted as classes: whole numbers, text"
            )
        column_N = column_N.astype(np.int64)
    if names is None:
        values, index_N = np.unique(column_N, return_inverse=True)
        return Labels(index_N.astype(np.int64), tuple(str(value) for value in values))
    if column_N.min(initial=0) < 0:
        raise ValueError(f"column {column!r} has rows labelled {column_N.min()}; accepted: 0 ... {len(names) - 1}")
    return Labels(column_N.astype(np.int64), tuple(names))


def choose_classes(names: Sequence[str], classes: Sequence[int] | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the chosen ``classes`` in the order given; None chooses all.

    A text is a name. An integer is the class of that name if names are numbers, else a position in ``names``.

    Raises:
        ValueError: where a class is absent or chosen twice, or none is chosen.
    """
    if classes is None:
        return tuple(names)
    numbered = any(name.lstrip("-").isdigit() for name in names)
    known: dict[int | str, str] = {name: name for name in names}
    known |= {int(name): name for name in names if name.lstrip("-").isdigit()} if numbered else dict(enumerate(names))
    if absent := [chosen for chosen in classes if chosen not in known]:
        raise ValueError(f"classes has {absent}; accepted: {', '.join(names)}")
    chosen = tuple(known[chosen] for chosen in classes)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"classes is {list(classes)}; accepted: at least one of {', '.join(names)}, each at most once")
    return chosen


def relabel(labels: Labels, names: Sequence[str], chosen: Sequence[str]) -> np.ndarray:
    """Targets (N,) int64: positions in ``chosen``, -1 for rows of other classes of ``names``.

    Goes by name, not by number: two splits of one data set may number the same classes differently.

    Raises:
        ValueError: where a row's class is not in ``names``.
    """
    present = {labels.names[index] for index in np.unique(labels.index_N)}
    if unknown := sorted(present - set(names)):
        raise ValueError(f"rows of class {unknown}; accepted: the classes of the training split, {', '.join(names)}")
    position = {name: target for target, name in enumerate(chosen)}
    return np.array([position.get(name, -1) for name in labels.names], dtype=np.int64)[labels.index_N]


def moments(inputs_ND: Tensor, normalise: str) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation that ``normalise`` subtracts and divides by, in the dtype of the inputs.

    - ``largest``: no mean, and instead of the deviation the largest magnitude of all examples and features.
    - ``scalar``: both over all examples and features.
    - ``per_pixel``: mean of each feature; one deviation, ``sqrt(mean over n, d of (x_nd - mean_d)^2)``.
    - ``per_feature``: mean and deviation of each feature.

    A deviation of zero is returned as one, so that what is constant becomes zero.
    """
    if normalise == "largest":
        largest = inputs_ND.abs().max()
        return torch.zeros_like(largest), torch.where(largest == 0, 1.0, largest)
    mean = inputs_ND.mean(dtype=torch.float64) if normalise == "scalar" else inputs_ND.mean(0, dtype=torch.float64)
    mean = mean.to(inputs_ND.dtype)
    centred_ND = inputs_ND - mean
    if normalise == "per_feature":
        std = torch.linalg.vector_norm(centred_ND, dim=0, dtype=torch.float64) / math.sqrt(len(inputs_ND))
    else:
        std = torch.linalg.vector_norm(centred_ND, dtype=torch.float64) / math.sqrt(inputs_ND.numel())
    # The computed mean of equal numbers may differ from them in the last bit.
    size = mean.abs() if normalise == "per_feature" else mean.abs().max()
    return mean, torch.where(std <= 1e-10 * size, 1.0, std).to(inputs_ND.dtype)


def _floating(raw_ND: Tensor) -> Tensor:
    """A new tensor: bytes as float32; float64 stays, so that no digit is lost before a large mean is subtracted."""
    return raw_ND.float() if raw_ND.dtype == torch.uint8 else raw_ND.clone()


@dataclass(eq=False)
class DataSource:
    """Rows of a data set in three disjoint parts: "train" and "validation" are cut from ``split``, and "test" may be.

    Args:
        path: in-memory data set, bundled name, file, folder or hub id; see ``open_dataset``.
        name: configuration of a data set that has several.
        revision: commit, branch or tag of a hub data set.
        split: split or slice that "train" and "validation" are made of, such as ``train`` or ``train[:10%]``.
        test: fraction of the rows of ``split``, in [0, 1), or the name of the data set's own split, such as ``test``. A
            split of its own stays closed until the part is read.
        validation: fraction of the rows of ``split`` that are not "test", in [0, 1).

    Raises:
        ValueError: where a fraction is outside its range, or ``test`` names a split that ``split`` reads.
    """

    path: str | Any
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    test: float | str = 0.2
    validation: float = 0.1

    def __post_init__(self) -> None:
        fractions = {"validation": self.validation} | ({} if isinstance(self.test, str) else {"test": self.test})
        for option, value in fractions.items():
            if not 0 <= value < 1:
                raise ValueError(f"{option} is {value!r}; accepted: 0 <= {option} < 1")
        if isinstance(self.test, str) and set(split_names(self.test)) & set(split_names(self.split)):
            raise ValueError(
                f"test is {self.test!r}; accepted: a fraction, or a split that {self.split!r} does not read"
            )

    @property
    def _separate_test(self) -> str | None:
        """The test split of the data set's own, which must be there before anything is trained, but stays closed."""
        return self.test if isinstance(self.test, str) else None

    def _part_rows(self, part: str, num_rows: int, seed: int | None) -> np.ndarray:
        """Rows of ``part`` in ``split``, or in ``test`` where that is a split of its own."""
        require_choice("part", part, PARTS)
        if part == "test" and isinstance(self.test, str):
            return np.arange(num_rows)
        return part_rows(num_rows, 0.0 if isinstance(self.test, str) else self.test, self.validation, seed)[part]

    def _require_rows(self, part: str, num_rows: int) -> None:
        if not num_rows:
            raise ValueError(
                f"part {part!r} is empty with test={self.test!r} and validation={self.validation!r}; accepted: parts "
                "of at least one row"
            )

    def _digest(self, *content: bytes | memoryview) -> str:
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "path"}
        digest = hashlib.sha256(json.dumps([type(self).__name__, options], sort_keys=True).encode())
        for piece in content:
            digest.update(piece)
        return digest.hexdigest()


class _Rows(NamedTuple):
    """Every row of a split: raw ``inputs``, ``targets`` (-1: not a chosen class), and the names of all classes."""

    inputs: Tensor
    targets: Tensor
    names: tuple[str, ...]


@dataclass(eq=False)
class LabelledSource(DataSource, Source):
    """What images and tables share: seeded parts, classes, normalisation. No row changes its part with ``classes``.

    Args:
        classes: the classes to keep, which become 0, 1, ... in the order given; all by default. A text is a class name,
            an integer the class of that name where names are numbers, else a position in the list of names.
        normalise: statistics of "train" that inputs are centred and scaled with: ``scalar``, one mean and one deviation
            over all examples and features; ``per_pixel``, the mean of each feature and one deviation of what is left;
            ``largest``, no mean and the largest magnitude, so that pixels are in [0, 1];
            tables also ``per_feature``, the mean and the deviation of each feature.
        seed: of the permutation that the parts are cut from.
    """

    classes: list[int] | list[str] | None = None
    normalise: str = "per_pixel"
    seed: int = 0

    normalisations: ClassVar[tuple[str, ...]] = ("scalar", "per_pixel", "largest")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("normalise", self.normalise, self.normalisations)
        self._parts: dict[str, Examples] = {}

    @abstractmethod
    def _decode(self, split: str) -> tuple[Tensor, Labels | Tensor]:
        """Every row of a split: raw inputs (N, ...), uint8 or float64, and labels or regression targets (N,)."""

    def _load(self, split: str, names: tuple[str, ...] | None) -> _Rows:
        """A split, with targets among the classes ``names`` of the training split; None where it is that split."""
        inputs, column = self._decode(split)
        if isinstance(column, Tensor):
            return _Rows(inputs, column, ())
        names = column.names if names is None else names
        return _Rows(inputs, torch.from_numpy(relabel(column, names, choose_classes(names, self.classes))), names)

    @functools.cached_property
    def _rows(self) -> _Rows:
        return self._load(self.split, None)

    def _raw(self, part: str) -> Examples:
        separate = part == "test" and isinstance(self.test, str)
        rows = self._load(str(self.test), self._rows.names) if separate else self._rows
        kept = torch.from_numpy(self._part_rows(part, len(rows.targets), self.seed))
        if not rows.targets.is_floating_point():
            kept = kept[rows.targets[kept] >= 0]
        self._require_rows(part, len(kept))
        return Examples(rows.inputs[kept].flatten(1), rows.targets[kept])

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return moments(_floating(self._raw("train").inputs), self.normalise)

    def read(self, part: str) -> Examples:
        """``(x - mean) / deviation`` of one part; the same tensors at every call.

        Raises:
            ValueError: where there is no such data set, column, class or part, or the part has no rows.
        """
        if part not in self._parts:
            inputs, targets = self._raw(part)
            mean, std = self._moments
            if inputs.shape[1] != self.num_features:
                raise ValueError(
                    f"part {part!r} has {inputs.shape[1]} features; accepted: {self.num_features}, as in 'train'"
                )
            self._parts[part] = Examples(_floating(inputs).sub_(mean).div_(std).float(), targets)
        return self._parts[part]

    def fingerprint(self) -> str:
        """SHA-256 of every constructor argument but ``path``, and of all rows of ``split``: raw inputs, targets, names.

        So it covers "train", "validation" and a "test" that is a fraction, and depends neither on what was read before
        nor on where the data lie. It does not cover a test split of its own, which stays closed.
        """
        inputs, targets, names = self._rows
        shape = json.dumps([list(inputs.shape), str(inputs.dtype), names]).encode()
        return self._digest(shape, inputs.contiguous().numpy().data, targets.numpy().data)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the kept classes, in the order of the targets; none for regression. Reads ``split``."""
        return choose_classes(self._rows.names, self.classes) if self._rows.names else ()

    @functools.cached_property
    def num_classes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of kept classes; 1 for regression, the number of outputs. Reads ``split``."""
        return len(self.class_names) or 1

    @property
    def num_features(self) -> int:
        """D, the features of an input. Reads ``split``."""
        return self._rows.inputs[:1].numel()
