"""metalearn: learn the parts of a training run that people usually design by hand."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metalearn.classifier import InContextClassifier
    from metalearn.losses.learned import LearnedLoss, load_loss
    from metalearn.regressor import InContextRegressor

_EXPORTS = {  # imported when first asked for: torch takes a second
    "InContextClassifier": "metalearn.classifier",
    "InContextRegressor": "metalearn.regressor",
    "LearnedLoss": "metalearn.losses.learned",
    "load_loss": "metalearn.losses.learned",
}

__all__ = ["InContextClassifier", "InContextRegressor", "LearnedLoss", "load_loss"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'metalearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
