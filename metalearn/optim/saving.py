"""Learned optimizers on disk: weights, and a card that says how to rebuild the rule, in one safetensors file.

The card stands in the file's metadata under ``metalearn`` as JSON: ``rule`` (class path, version, settings) and
``provenance`` (what meta-training says of itself). Rules that come with the package are such files, too.
"""

import copy
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from metalearn.base import Params
from metalearn.class_paths import class_path, trusted_class
from metalearn.files import write_whole
from metalearn.optim.learned import LearnedRule

CARD = "metalearn"
PACKAGED = Path(__file__).parent / "rules"
SUFFIX = ".safetensors"


def describe(rule: LearnedRule) -> dict[str, Any]:
    """Class path, version and settings of a rule, as JSON has them.

    Raises:
        ValueError: The settings are not numbers, texts, lists and dictionaries of these.
    """
    kind = type(rule)
    try:
        settings = json.loads(json.dumps(rule.settings, default=operator.index))
    except TypeError as error:
        raise ValueError(f"settings of {kind.__name__} are {rule.settings!r}; accepted: builtins ({error})") from None
    return {"class_path": class_path(kind), "version": kind.version, "settings": settings}


def save_rule(path: str | Path, rule: LearnedRule, meta: Params | None = None, **provenance: Any) -> None:
    """Write a rule to a ``.safetensors`` file, whole or not at all.

    Args:
        path: Its folder is made where it is missing.
        rule: What ``load_rule`` shall give back.
        meta: Its weights, where these are not ``rule.weights``; without leading axes.
        provenance: Where the weights come from, by name, as numbers, texts, lists and dictionaries of these.

    Raises:
        ValueError: The path ends otherwise, weights have other shapes than the rule's, or something is not JSON's.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"path is {str(path)!r}; accepted: a name that ends in {SUFFIX}")
    weights = rule.weights if meta is None else with_weights(rule, meta).weights
    # Copies: weights may be pieces of one vector, and safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    card = {"rule": describe(rule), "provenance": provenance}
    try:
        content = save(tensors, {CARD: json.dumps(card, default=operator.index)})
    except TypeError as error:
        raise ValueError(f"provenance is {provenance!r}; accepted: builtins ({error})") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def load_rule(rule: str | Path, trusted_classes: Sequence[type[LearnedRule]] = ()) -> LearnedRule:
    """The rule in a file, with the weights that were saved as its ``weights``. Reads one file, and nothing from a network.

    Args:
        rule: A path that ends in ``.safetensors``, or the bare name of a rule that comes with the package ("digits_mlp").
        trusted_classes: Classes outside ``metalearn.optim`` that a file may name. Files come from strangers: no other
            class is looked for, and nothing but a learned rule is built.

    Raises:
        ValueError: There is no such rule, the file is of another kind, names a class that is not trusted or another
            version of it, its settings or weights do not fit that class, or weights are not finite.
    """
    path = _find(rule)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(CARD, "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from error
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"{str(path)!r} has weights {broken} that are not finite: its meta-training diverged")
    described = card.get("rule") if isinstance(card, dict) else None
    if not isinstance(described, dict):
        raise ValueError(f"{str(path)!r} does not say which rule it holds; accepted: a file written by save_rule")
    try:
        return with_weights(_rebuild(described, trusted_classes), weights)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def with_weights(rule: LearnedRule, weights: dict[str, Tensor]) -> LearnedRule:
    """The same rule with other weights; ``rule`` keeps its own. ``ValueError`` where their names or shapes differ."""
    other = copy.copy(rule)
    other.weights = weights
    return other


def _find(rule: str | Path) -> Path:
    path = Path(rule)
    if isinstance(rule, str) and path.name == rule and path.suffix != SUFFIX:
        path = PACKAGED / (rule + SUFFIX)
        if not path.is_file():
            names = ", ".join(repr(file.stem) for file in sorted(PACKAGED.glob("*" + SUFFIX)))
            raise ValueError(f"rule is {rule!r}; accepted: {names or 'no name'}, or the path of a {SUFFIX} file")
    elif not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; accepted: a {SUFFIX} file written by save_rule")
    return path


def _rebuild(described: dict[str, Any], trusted_classes: Sequence[type[LearnedRule]]) -> LearnedRule:
    path, settings = str(described.get("class_path")), described.get("settings")
    kind = trusted_class(path, "metalearn.optim", LearnedRule, trusted_classes)
    if kind is None:
        raise ValueError(
            f"the rule's class is {path!r}; accepted: a LearnedRule under metalearn.optim, or one passed in trusted_classes"
        )
    if described.get("version") != kind.version:
        raise ValueError(
            f"the rule is version {described.get('version')!r} of {path}; accepted: version {kind.version}"
        )
    try:
        return kind(**settings)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the rule is {path} with {settings!r}, which fails: {error}") from error
