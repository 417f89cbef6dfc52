"""Bytes as arrays: images as cached uint8 tensors, `.npz` archives and scikit-learn's bundled sets as columns."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB"}
_OWN_MODE = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}


def cached(content: str, decode: Callable[[], Tensor]) -> Tensor:
    """The tensor that ``decode`` returned when it was first called for ``content``, kept in ``$METALEARN_CACHE``.

    Raises:
        ValueError: where that folder cannot be written.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(os.environ.get("METALEARN_CACHE", "~/.cache/metalearn")).expanduser()
    file = folder / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"
    if not file.exists():
        tensor = decode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Renamed when complete, so that another process sees all of the file or none.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                save_file({"content": tensor}, Path(scratch) / file.name)
                (Path(scratch) / file.name).replace(file)
        except OSError as error:
            raise ValueError(
                f"METALEARN_CACHE is {str(folder)!r}: {error}; accepted: a folder that can be written"
            ) from None
    return load_file(file)["content"]


def decode_images(images: "Iterable[Image]", image_size: int | None, channels: int | None) -> Tensor:
    """uint8 (N, C, H, W), resized to ``image_size`` squared and converted to ``channels`` where these are given.

    Raises:
        ValueError: where images differ in size or channels, or have more than 8 bits per channel.
    """
    arrays: list[np.ndarray] = []
    for image in images:
        arrays.append(_decode(image, image_size, channels))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"images have shapes {arrays[0].shape} and {arrays[-1].shape}; accepted: equal shapes, or "
                "image_size and channels"
            )
    if not arrays:
        raise ValueError("the split has 0 images; accepted: at least one")
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays)))


def _decode(image: "Image", image_size: int | None, channels: int | None) -> np.ndarray:
    from PIL.Image import Resampling

    if image.mode not in _OWN_MODE:
        raise ValueError(f"an image has mode {image.mode!r}; accepted: {', '.join(_OWN_MODE)}")
    mode = _OWN_MODE[image.mode] if channels is None else _MODES[channels]
    image = image if image.mode == mode else image.convert(mode)
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Resampling.BILINEAR)  # Pillow antialiases when it shrinks
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def as_image(array: np.ndarray, column: str) -> "Image":
    """An image of integers 0 ... 255, of shape (H, W), (1, H, W), (3, H, W), (H, W, 1) or (H, W, 3).

    Raises:
        ValueError: where it is another array.
    """
    from PIL.Image import fromarray

    pixels = np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[2] not in _MODES:
        pixels = pixels.transpose(1, 2, 0)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype.kind not in "iu" or pixels.ndim not in (2, 3) or channels not in _MODES:
        raise ValueError(
            f"column {column!r} holds {pixels.dtype} {np.shape(array)}; accepted: images, integer arrays of that shape"
        )
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"column {column!r} holds {pixels.min()} ... {pixels.max()}; accepted: 0 ... 255")
    return fromarray(
        pixels.astype(np.uint8).squeeze(2) if pixels.ndim == 3 and channels == 1 else pixels.astype(np.uint8)
    )


def bundled_columns(name: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Columns and class names of one of scikit-learn's sets: ``label``, or ``target`` where there are no classes.

    The pixels of ``digits``, 0 ... 16, are multiplied by 15: exact, and visible as bytes.
    """
    import sklearn.datasets

    content = getattr(sklearn.datasets, f"load_{name}")()
    if name == "digits":
        columns = {"image": (content.images * 15).astype(np.uint8)}
    else:
        columns = dict(zip((str(feature) for feature in content.feature_names), content.data.T, strict=True))
    class_names = [str(label) for label in content.get("target_names", [])]
    return columns | {"label" if class_names else "target": content.target}, class_names


def npz_columns(file: Path) -> dict[str, np.ndarray]:
    """Columns ``features`` and ``target`` of two named arrays, or of one 2-D array whose last column is the target.

    Raises:
        ValueError: where the archive holds other arrays.
    """
    with np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    inputs = next((arrays[name] for name in ("x", "X", "features", "embeddings") if name in arrays), None)
    targets = next((arrays[name] for name in ("y", "labels", "targets") if name in arrays), None)
    if len(arrays) == 1 and (table := next(iter(arrays.values()))).ndim == 2:
        inputs, targets = table[:, :-1], table[:, -1]
    if inputs is None or targets is None or inputs.ndim < 2 or targets.shape != inputs.shape[:1]:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(
            f"{str(file)!r} has arrays {shapes}; accepted: x, X, features or embeddings (N, ...) with y, labels or "
            "targets (N,), or one array (N, D + 1) whose last column is the target"
        )
    return {"features": inputs, "target": targets}


def find_column(
    columns: Mapping[str, object],
    option: str,
    given: str | None,
    kind: type,
    names: tuple[str, ...],
    default: str | None = None,
) -> str:
    """The column ``given``, else the only one of feature type ``kind``, else the first of the usual ``names``.

    Where none has a usual name, it is ``default``.

    Raises:
        ValueError: where ``given`` is no column, or nothing tells which one is meant.
    """
    typed = [column for column, feature in columns.items() if isinstance(feature, kind)]
    named = [column for usual in names for column in (typed or columns) if column.lower() == usual]
    found = given or (typed[0] if len(typed) == 1 else named[0] if named else default)
    if found is None or found not in columns:
        raise ValueError(f"{option} is {given!r}; accepted: {', '.join(columns)} (None where it can be told from them)")
    return found


def is_numeric(array: np.ndarray) -> bool:
    """Finite numbers or booleans only."""
    return array.dtype.kind in "iub" or (array.dtype.kind == "f" and bool(np.isfinite(array).all()))
