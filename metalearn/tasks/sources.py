"""The one door to data: whatever `datasets` opens, scikit-learn's bundled sets and `.npz` arrays, as labelled examples.

Where a data set is found, first match wins:

1. an in-memory ``datasets.Dataset`` or ``DatasetDict``;
2. ``digits``, ``iris``, ``wine``, ``breast_cancer``, ``diabetes``: scikit-learn's bundled sets;
3. ``$METALEARN_DATA/<path>``, a file or a folder;
4. a local file or folder. It must look like a path (absolute, starting with ``./`` or ``../``, with a file suffix, or
   with a separator and existing): a bare name such as ``mnist`` never means a folder of the working directory;
5. a Hugging Face hub id; ``mnist``, ``fashion_mnist`` and ``cifar10`` are short for theirs.

Nothing is opened before it is asked for: a test split of its own stays closed until ``read("test")``.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metalearn.base import require_choice, require_range
from metalearn.tasks.decoding import (
    as_image,
    bundled_columns,
    cached,
    decode_images,
    find_column,
    is_numeric,
    npz_columns,
)
from metalearn.tasks.examples import LabelledSource, Labels, labels_of, split_names
from metalearn.tasks.location import FILE_BUILDERS, HUB_IDS, local_path, offline_reason

if TYPE_CHECKING:  # imported where data are opened: it takes 0.7 s
    from datasets import Dataset
    from PIL.Image import Image as PILImage

Splits = dict[str, Callable[[], "Dataset"]]

_BUNDLED = ("digits", "iris", "wine", "breast_cancer", "diabetes")
_LABEL_NAMES = ("label", "labels", "target", "targets", "class", "y")
_IMAGE_NAMES = ("image", "img", "images", "features", "x")


def open_dataset(
    path: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    split: str = "train",
    header: bool = True,
    also: str | None = None,
) -> "Dataset":
    """The rows of one split, found as this module's docstring says; of local data only that split's files are opened.

    Args:
        path: in-memory data set, bundled name, file (.parquet .csv .json .jsonl .txt .tokens .npz), folder, or hub id.
            A folder holds data files or class folders of images as `datasets` reads them, what ``save_to_disk`` wrote,
            or .tokens files.
        name: configuration of a folder or a hub data set that has several.
        revision: commit, branch or tag of a hub data set; without the hub, the commit that is in the cache.
        split: split name or slice, such as ``train[:10%]`` or ``train[:50]+test[:50]``.
        header: whether the first line of a .csv file names the columns; else they are named 0, 1, 2, ...
        also: a further split that must exist; it is not opened.

    Raises:
        ValueError: where there is no such data set (at once, also without a network) or split.
    """
    splits = _splits(path, name, revision, header)
    wanted = split_names(split)
    if unknown := [part for part in (*wanted, *split_names(also or "")) if part and part not in splits]:
        raise ValueError(
            f"split is {split!r}{f' and test {also!r}' if also else ''}, but {path!r} has no {unknown}; accepted: "
            f"{', '.join(splits)}, and slices of them"
        )
    return _cut({part: splits[part]() for part in wanted}, split)


def _cut(rows: Mapping[str, "Dataset"], split: str) -> "Dataset":
    from datasets import ReadInstruction, concatenate_datasets

    try:
        cuts = ReadInstruction.from_spec(split).to_absolute({part: len(dataset) for part, dataset in rows.items()})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"split is {split!r}: {error}; accepted: split names and slices, as 'train[:10%]'") from None
    taken = {part: np.zeros(len(dataset), dtype=bool) for part, dataset in rows.items()}
    pieces = []
    for cut in cuts:
        dataset, first, last = (
            rows[cut.splitname],
            cut.from_ or 0,
            len(rows[cut.splitname]) if cut.to is None else cut.to,
        )
        if taken[cut.splitname][first:last].any():
            raise ValueError(f"split is {split!r}, which has rows twice; accepted: slices that do not overlap")
        taken[cut.splitname][first:last] = True
        # A whole split stays as it is: its fingerprint is the key of the decoded images.
        pieces.append(dataset if last - first == len(dataset) else dataset.select(range(first, last)))
    return concatenate_datasets(pieces)


def _splits(path: Any, name: str | None, revision: str | None, header: bool) -> Splits:
    """How to open each split of a data set, by name; opens none of them."""
    from datasets import Dataset, DatasetDict

    if isinstance(path, Dataset):
        _refuse_options("an in-memory data set", name=name, revision=revision)
        return {"train": lambda: path}
    if isinstance(path, DatasetDict):
        _refuse_options("an in-memory data set", name=name, revision=revision)
        return {str(split): functools.partial(path.__getitem__, split) for split in path}
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"path is {path!r}; accepted: a non-empty text, a Path, a Dataset or a DatasetDict")
    if path in _BUNDLED:
        _refuse_options("a bundled data set", name=name, revision=revision)
        return {"train": lambda: _bundled(str(path))}
    local = local_path(path)
    if local is None:
        return _hub_splits(str(path), name, revision)
    if local.is_dir():
        return _folder_splits(local, name)
    _refuse_options("a file", name=name)
    return _file_splits(local, header)


def _refuse_options(place: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} is {value!r}, but the path is {place}; accepted: None")


def _file_splits(file: Path, header: bool) -> Splits:
    from datasets import Dataset

    if file.suffix == ".npz":
        return {"train": lambda: Dataset.from_dict(npz_columns(file))}
    if file.suffix not in FILE_BUILDERS:
        raise ValueError(f"path is {str(file)!r}; accepted: a folder, or a file in {', '.join(FILE_BUILDERS)}, .npz")
    if file.suffix == ".csv":
        return {"train": functools.partial(_csv, file, header)}
    return {"train": functools.partial(_load, FILE_BUILDERS[file.suffix], "train", data_files=str(file))}


def _csv(file: Path, header: bool) -> "Dataset":
    dataset = _load("csv", "train", data_files=str(file), **({} if header else {"header": None}))
    # Integers may be the names of columns (of pixels, say); fractions are a row of data that would be lost.
    if header and (numbers := [name for name in dataset.column_names if re.fullmatch(r"-?\d*\.\d+", name)]):
        raise ValueError(f"{str(file)!r} has columns named {numbers}; accepted: a first line of names, or header=False")
    return dataset


def _folder_splits(folder: Path, name: str | None) -> Splits:
    from datasets import load_dataset_builder

    if (folder / "dataset_dict.json").exists():
        saved = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return {split: functools.partial(_saved, folder / split) for split in saved}
    if (folder / "state.json").exists():
        return {"train": functools.partial(_saved, folder)}
    if tokens := sorted(folder.glob("*.tokens")):
        return {_split_of(file): functools.partial(_load, "text", "train", data_files=str(file)) for file in tokens}
    try:
        builder = load_dataset_builder(str(folder), name)
    except FileNotFoundError as error:
        raise ValueError(f"path is {str(folder)!r}: {error}; accepted: a folder of data files") from None
    # Given a folder, `datasets` would read the files of every split; given the files of one, it reads no other.
    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    options = {"features": builder.info.features, "verification_mode": "no_checks"}
    return {
        split: functools.partial(_load, str(folder), split, data_files={split: names}, **options)
        for split, names in files.items()
    }


def _split_of(file: Path) -> str:
    """``wiki.valid.tokens`` -> ``validation``."""
    stem = file.name.lower()
    return "test" if "test" in stem else "validation" if "valid" in stem else "train"


def _load(path: str, split: str, **options: Any) -> "Dataset":
    from datasets import Dataset, load_dataset

    dataset = load_dataset(path, split=split, **options)
    assert isinstance(dataset, Dataset)
    return dataset


def _saved(folder: Path) -> "Dataset":
    from datasets import Dataset

    return Dataset.load_from_disk(str(folder))


def _hub_splits(path: str, name: str | None, revision: str | None) -> Splits:
    from datasets import load_dataset_builder

    hub_id = HUB_IDS.get(path, path)
    address = f"hf://datasets/{hub_id}"  # `datasets` would take the bare id for a folder of the working directory
    offline = offline_reason()
    try:
        with _offline_mode(offline is not None):
            builder = load_dataset_builder(address, name, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(_not_found(path, hub_id, offline or str(error))) from None
    # The cache is looked up by name alone, and would answer with any commit.
    if offline and revision not in (None, builder.hash):
        raise ValueError(
            f"revision is {revision!r}, and {offline}; accepted: {builder.hash!r}, the commit in the cache"
        )

    def load(split: str) -> "Dataset":
        with _offline_mode(offline is not None):
            return _load(address, split, name=name, revision=revision)

    return {
        str(split): functools.partial(load, str(split))
        for split in builder.info.splits or builder.config.data_files or {}
    }


def _not_found(path: str, hub_id: str, reason: str) -> str:
    from datasets import config

    return (
        f"path is {path!r}: no data set of that name is on this machine, and {reason}. Two ways to provide it: put a "
        f"folder of its parquet files at $METALEARN_DATA/{path} or pass the absolute path of that folder; or go online "
        f"once, so that the hub's {hub_id!r} is cached in {config.HF_DATASETS_CACHE}"
    )


@contextmanager
def _offline_mode(offline: bool) -> Iterator[None]:
    """`datasets` answers from its cache. Its own variable is read when it is imported, which would be too late."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


@functools.cache
def _bundled(name: str) -> "Dataset":
    from datasets import Array2D, ClassLabel, Dataset, Features, Value

    columns, class_names = bundled_columns(name)
    features: dict[str, Any] = dict.fromkeys(columns, Value("float64"))
    if "image" in columns:
        features["image"] = Array2D((8, 8), "uint8")
    if class_names:
        features["label"] = ClassLabel(names=class_names)
    return Dataset.from_dict(columns, features=Features(features))


@dataclass(eq=False)
class ImageSource(LabelledSource):
    """Images with class labels, decoded once to bytes, cached on disk and flattened in the order channel, row, column.

    The cache is ``$METALEARN_CACHE``, by default ``~/.cache/metalearn``.

    Args:
        image_column: column of encoded images, or of integer arrays 0 ... 255; by default the only image column, or one
            named image, img, images, features or x.
        label_column: by default the only column of class labels, or one named label, labels, target, targets, class or
            y.
        image_size: edge in pixels, >= 1, that images are resized to: square, bilinear, antialiased; else as they are.
        channels: 1 (grey) or 3 (RGB); else as they are.
    """

    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            require_range("image_size", self.image_size, 1)
        require_choice("channels", self.channels, (None, 1, 3))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width). Reads ``split``."""
        channels, height, width = self._rows.inputs.shape[1:]
        return channels, height, width

    def _decode(self, split: str) -> tuple[Tensor, Labels]:
        from datasets import ClassLabel, Image

        dataset = open_dataset(self.path, name=self.name, revision=self.revision, split=split, also=self._separate_test)
        labels = _labels(
            dataset, find_column(dataset.features, "label_column", self.label_column, ClassLabel, _LABEL_NAMES)
        )
        column = find_column(dataset.features, "image_column", self.image_column, Image, _IMAGE_NAMES)
        content = json.dumps([dataset._fingerprint, column, self.image_size, self.channels])
        return cached(content, lambda: decode_images(_images(dataset, column), self.image_size, self.channels)), labels


@dataclass(eq=False)
class TableSource(LabelledSource):
    """Numeric feature columns with a class or a number to predict. A column may hold an array per row: an embedding.

    Args:
        feature_columns: by default every column but the target.
        target_column: by default the only column of class labels, or one named label, labels, target, targets, class or
            y, else the last column.
        task: ``classification``; or ``regression``, whose targets are the column's numbers as float32, as they are.
        header: whether the first line of a .csv file names the columns; else they are named 0, 1, 2, ...
    """

    normalise: str = "per_feature"
    feature_columns: list[str] | None = None
    target_column: str | None = None
    task: str = "classification"
    header: bool = True

    normalisations: ClassVar[tuple[str, ...]] = ("per_feature", "scalar", "per_pixel", "largest")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("task", self.task, ("classification", "regression"))
        if self.task == "regression" and self.classes is not None:
            raise ValueError(f"classes is {self.classes!r} with task 'regression'; accepted: None")

    def _decode(self, split: str) -> tuple[Tensor, Labels | Tensor]:
        from datasets import ClassLabel

        dataset = open_dataset(
            self.path, name=self.name, revision=self.revision, split=split, also=self._separate_test, header=self.header
        )
        last = dataset.column_names[-1]
        target = find_column(
            dataset.features, "target_column", self.target_column, ClassLabel, _LABEL_NAMES, default=last
        )
        inputs = self._inputs(dataset, [column for column in dataset.column_names if column != target])
        return inputs, _labels(dataset, target) if self.task == "classification" else _numbers(dataset, target)

    def _inputs(self, dataset: "Dataset", columns: list[str]) -> Tensor:
        chosen = columns if self.feature_columns is None else self.feature_columns
        if not chosen or set(chosen) - set(columns):
            raise ValueError(f"feature_columns is {self.feature_columns}; accepted: {', '.join(columns)}")
        values = _arrays(dataset, chosen)
        if unusable := [column for column, array in values.items() if not is_numeric(array)]:
            raise ValueError(f"columns {unusable} are not numeric or have missing values; accepted: finite numbers")
        blocks = [array.reshape(len(dataset), -1).astype(np.float64) for array in values.values()]
        return torch.from_numpy(np.concatenate(blocks, axis=1))


def _images(dataset: "Dataset", column: str) -> Iterator["PILImage"]:
    from datasets import Image

    encoded = isinstance(dataset.features[column], Image)
    rows = dataset.with_format(None if encoded else "numpy").select_columns(column)
    for row in map(dict, rows.cast_column(column, Image()) if encoded else rows):
        yield row[column] if encoded else as_image(row[column], column)


def _arrays(dataset: "Dataset", columns: list[str]) -> dict[str, np.ndarray]:
    rows = dataset.select_columns(columns).with_format("numpy")[:]
    return {column: np.asarray(rows[column]) for column in columns}


def _labels(dataset: "Dataset", column: str) -> Labels:
    return labels_of(_arrays(dataset, [column])[column], getattr(dataset.features[column], "names", None), column)


def _numbers(dataset: "Dataset", column: str) -> Tensor:
    values_N = _arrays(dataset, [column])[column]
    if values_N.ndim > 1 or not is_numeric(values_N):
        raise ValueError(f"target_column is {column!r}; accepted for regression: a column of finite numbers")
    return torch.from_numpy(values_N.astype(np.float32))
