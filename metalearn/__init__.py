"""metalearn: learn the parts of a training run that people usually design by hand."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metalearn.classifier import InContextClassifier
    from metalearn.losses.learned import LearnedLoss, load_loss
    from metalearn.optim.guard import GL2O, LossGuard
    from metalearn.optim.torch_face import LearnedOptimizer
    from metalearn.regressor import InContextRegressor

_EXPORTS = {  # imported when first asked for: torch takes a second
    "InContextClassifier": "metalearn.classifier",
    "InContextRegressor": "metalearn.regressor",
    "GL2O": "metalearn.optim.guard",
    "LearnedLoss": "metalearn.losses.learned",
    "LearnedOptimizer": "metalearn.optim.torch_face",
    "LossGuard": "metalearn.optim.guard",
    "load_loss": "metalearn.losses.learned",
}

__all__ = [
    "GL2O",
    "InContextClassifier",
    "InContextRegressor",
    "LearnedLoss",
    "LearnedOptimizer",
    "LossGuard",
    "load_loss",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'metalearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
