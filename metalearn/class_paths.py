"""Classes by their names in files that come from strangers."""

import importlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def class_path(kind: type) -> str:
    """Module and name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def trusted_class(path: str, package: str, base: type[T], trusted_classes: Sequence[type[T]] = ()) -> type[T] | None:
    """The class that a file names, where that is one of ``trusted_classes`` or stands under ``package``; else None.

    Nothing outside ``package`` is imported, and nothing but a subclass of ``base`` is returned.
    """
    if given := {class_path(kind): kind for kind in trusted_classes}.get(path):
        return given
    module, _, name = path.rpartition(".")
    if not module.startswith(package + ".") or not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        kind = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
    owned = isinstance(kind, type) and issubclass(kind, base) and class_path(kind) == path
    return kind if owned else None
