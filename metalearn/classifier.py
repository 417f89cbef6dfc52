"""InContextClassifier: the scikit-learn face of an in-context learner of classes. Fitting is reading; nothing is optimised.

E ensemble members, N context rows, Q queries, F the user's features, D features the learner was meta-trained with, K
its classes, C the user's classes, G code digits, M = E·G sequences.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from metalearn.in_context import InContextEstimator


class InContextClassifier(ClassifierMixin, InContextEstimator):
    """Classify in context: ``fit`` reads the training set into the learner's state, ``predict_proba`` continues from it.

    Each of ``num_estimators`` members sees the training set through its own random projection to D features, its own
    assignment of classes to the learner's outputs and its own order of the rows; their probabilities are averaged. Rows
    are centred and scaled with statistics of fit's X alone, and cut off at 1000 standard deviations.

    - Any number of features: F are projected to D by A with entries N(0, 1/F), as in meta-training; with
      ``projection="pca"`` from the at most D leading principal components.
    - Fewer classes than K: the other outputs are masked. More: each class gets a code of G = ceil(log_K C) digits in
      base K, members learn each digit as a problem of its own, and P(class) is the normalised product of its digits'
      probabilities (digit decomposition, Ma et al. 2024, "TabDPT").
    - More rows than the T - 1 that come before the last one of a meta-training sequence: each member reads a random
      block of T - 1; together they cover every row when num_estimators is at least N / (T - 1).

    Args:
        checkpoint: a ``.ckpt`` or ``.safetensors`` file of in-context training, or one written by ``save``.
        num_estimators: members of the ensemble, at least 1.
        projection: "random" or "pca".
        scaling: "per_feature" (columns of unit variance: tables) or "scalar" (one scale for all: pixels, embeddings).
        query_batch_size: queries answered together, at least 1. Memory grows with it; answers do not depend on it, nor
            on how a caller splits them, up to rounding.
        device: torch device of the learner.
        dtype: "float32", "float64" or "bfloat16": the precision of the learner; answers come in X's floating type.
        trusted_classes: learner classes outside metalearn.models that a checkpoint may name.
        random_state: seed of projections, assignments and orders.

    Attributes: ``classes_``, ``n_features_in_``, ``feature_names_in_`` (data frames).

    Raises:
        ValueError: for a bad checkpoint, settings out of range, NaN or infinite values, other than F features, labels
            of several types, or a learner whose answers are not finite.
    """

    kind = "classifier"
    projections = ("random", "pca")
    fitted = (*InContextEstimator.fitted, "codes_EGC")

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Class probabilities (Q, C), columns in the order of ``classes_``."""
        return self._answers(X)

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row: (Q,)."""
        best_Q = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best_Q]

    @classmethod
    def _require_own(cls, path: str | Path, card: dict[str, Any]) -> None:
        if card["num_classes"] == 1:
            raise ValueError(
                f"{str(path)!r} holds a learner of numbers, for InContextRegressor; accepted: one of classes"
            )

    def _read_targets(self, y: NDArray[Any], card: dict[str, Any]) -> Tensor:
        self.classes_, labels_N = _classes(y)
        return torch.from_numpy(labels_N)

    def _assign(self, card: dict[str, Any], rng: np.random.RandomState) -> None:
        self._codes_EGC = _codes(len(self.classes_), card["num_classes"], self.num_estimators, rng)

    def _told(self, dtype: torch.dtype) -> Tensor:
        labels_EGN = self._labels_EN.unsqueeze(1).expand(-1, self._codes_EGC.shape[1], -1)
        return self._codes_EGC.gather(2, labels_EGN).flatten(0, 1)

    def _combine(self, logits_MQK: Tensor) -> Tensor:
        """Members' class probabilities, averaged: (Q, C)."""
        return class_probabilities(logits_MQK.unflatten(0, self._codes_EGC.shape[:2]), self._codes_EGC).mean(0)

    @property
    def _num_answers(self) -> int:
        return len(self.classes_)

    def _description(self) -> dict[str, Any]:
        kind = self.classes_.dtype
        if kind.kind not in "OUbiuf":
            raise ValueError(f"classes are {kind}; accepted for save: strings, integers, floats, booleans")
        return {"classes": self.classes_.tolist(), "kind": kind.str}

    def _restore_targets(self, fit: dict[str, Any]) -> None:
        self.classes_ = np.array(fit["classes"], dtype=fit["kind"])


def class_probabilities(logits_EGQK: Tensor, codes_EGC: Tensor) -> Tensor:
    """P(c) ∝ prod_g exp(logit of digit g at code (g, c)): (E, Q, C); outputs that no class uses are masked thereby."""
    index_EGQC = codes_EGC.unsqueeze(2).expand(-1, -1, logits_EGQK.shape[2], -1)
    return logits_EGQK.gather(3, index_EGQC).sum(1).softmax(-1)


def _classes(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The classes (C,) in sorted order, and the class number of every row (N,)."""
    try:
        check_classification_targets(y)
        return np.unique(y, return_inverse=True)
    except TypeError as error:
        raise ValueError(f"y has labels of {y.dtype}: {error}; accepted: strings, numbers or booleans") from error


def _codes(num_classes: int, outputs: int, members: int, rng: np.random.RandomState) -> Tensor:
    """Digits (E, G, C) of distinct random code words in base ``outputs``, every digit's values permuted at random."""
    digits = 1
    while outputs**digits < num_classes:
        digits += 1
    codes = np.empty((members, digits, num_classes), dtype=np.int64)
    for member in range(members):
        order = rng.permutation(num_classes)
        for digit in range(digits):
            codes[member, digit] = rng.permutation(outputs)[order // outputs**digit % outputs]
    return torch.from_numpy(codes)
