"""Learners on disk: weights and a card that says how to rebuild them, read without pickle and without Lightning.

A card is a dictionary of builtins: ``learner`` (class path and constructor arguments), ``tokens``, ``num_features``,
``num_classes`` and ``length`` (examples per sequence in meta-training). It travels in the metadata of a
``.safetensors`` file, or under the key ``metalearn`` of a Lightning ``.ckpt``, whose weights stand under
``state_dict`` with the prefix ``learner.``.
"""

import inspect
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from metalearn.base import Learner
from metalearn.class_paths import class_path, trusted_class
from metalearn.models.tokens import Tokens

CARD = "metalearn"
PREFIX = "learner."
_CARD_TYPES = {"learner": dict, "tokens": str, "num_features": int, "num_classes": int, "length": int}


def describe(learner: Learner) -> dict[str, Any]:
    """Class path and constructor arguments of ``learner``, read from its attributes of the same names."""
    names = list(inspect.signature(type(learner)).parameters)
    return {"class_path": class_path(type(learner)), "init_args": {name: getattr(learner, name) for name in names}}


def rebuild(description: dict[str, Any], trusted_classes: Sequence[type[Learner]] = ()) -> Learner:
    """The learner that ``describe`` described, with fresh weights.

    Checkpoints come from strangers, so a class path is looked up among the ``trusted_classes`` and under
    ``metalearn.models`` only, and nothing but a Learner is built.

    Raises:
        ValueError: for any other class path, or arguments that the class does not take.
    """
    path, arguments = str(description.get("class_path")), description.get("init_args")
    kind = trusted_class(path, "metalearn.models", Learner, trusted_classes)
    if kind is None:
        raise ValueError(
            f"the checkpoint's learner is {path!r}; accepted: a Learner under metalearn.models, or one passed in trusted_classes"
        )
    try:
        return kind(**arguments)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"the checkpoint's learner is {path} with {arguments!r}, which fails: {error}") from error


def save_learner(
    path: str | Path, learner: Learner, card: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> None:
    """Write weights, card and further ``tensors`` to a ``.safetensors`` file, whole or not at all."""
    weights = {PREFIX + name: value for name, value in learner.state_dict().items()}
    save_weights(path, weights | (tensors or {}), card)


def save_weights(path: str | Path, weights: dict[str, Tensor], card: dict[str, Any]) -> None:
    """``save_learner`` for weights that already carry their prefix, such as those that a strategy gathers from its ranks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(card, default=operator.index)  # numpy's integers are not JSON's
    partial = path.with_name(path.name + ".partial")
    save_file({n: v.detach().cpu().contiguous() for n, v in weights.items()}, partial, metadata={CARD: text})
    partial.replace(path)


def load_learner(
    path: str | Path, trusted_classes: Sequence[type[Learner]] = ()
) -> tuple[Learner, dict[str, Any], dict[str, Tensor]]:
    """The learner in a ``.safetensors`` or Lightning ``.ckpt`` file, in evaluation mode on the CPU, its card, and further tensors.

    Raises:
        ValueError: if the file is missing, is neither, has no card, names a class that is not trusted, or its parts
        do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}; accepted: a .ckpt or .safetensors file written by metalearn")
    tensors, card = _read_safetensors(path) if path.suffix == ".safetensors" else _read_lightning(path)
    if not isinstance(card, dict) or any(not isinstance(card.get(k), kind) for k, kind in _CARD_TYPES.items()):
        raise ValueError(
            f"{str(path)!r} does not say which learner it holds; accepted: a checkpoint of in-context training"
        )
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    learner = _filled(card, weights, trusted_classes)
    return learner, card, {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}


def _filled(card: dict[str, Any], weights: dict[str, Tensor], trusted_classes: Sequence[type[Learner]]) -> Learner:
    """The card's learner with these weights, if they and the card's sizes fit it."""
    with torch.random.fork_rng(devices=[]):  # the fresh weights leave the caller's random numbers as they were
        learner = rebuild(card["learner"], trusted_classes)
    width, num_classes = Tokens(card["tokens"], card["num_features"], card["num_classes"]).width, card["num_classes"]
    if (learner.num_inputs, learner.num_outputs) != (width, num_classes):
        raise ValueError(
            f"the checkpoint's learner takes {learner.num_inputs} inputs to {learner.num_outputs} outputs; "
            f"accepted with its tokens: {width} to {num_classes}"
        )
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's weights are of another learner: {error}") from error
    return learner.eval()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(CARD, "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 (not a dictionary)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from error


def _read_lightning(path: Path) -> tuple[dict[str, Tensor], Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean the same to the user
        raise ValueError(f"{str(path)!r} is not a checkpoint that loads with weights_only=True: {error}") from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in weights.items()):
        return {}, None
    return weights, checkpoint.get(CARD)
