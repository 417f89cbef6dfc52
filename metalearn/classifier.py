"""InContextClassifier: the scikit-learn face of an in-context learner. Fitting is reading; nothing is optimised.

E ensemble members, N context rows, Q queries, F the user's features, D features the learner was meta-trained with, K
its classes, C the user's classes, G code digits.
"""

import copy
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional

from metalearn.base import Learner, State, require_choice, require_range
from metalearn.models.saving import load_learner, save_learner
from metalearn.models.tokens import Tokens

_LARGEST = 1e3  # standard deviations: keeps any finite input finite inside the learner
_FITTED = ("centre_F", "scale_F", "basis_EFD", "context_END", "codes_EGC", "labels_EN")


class InContextClassifier(ClassifierMixin, BaseEstimator):
    """Classify in context: ``fit`` reads the training set into the learner's state, ``predict_proba`` continues from it.

    Each of ``num_estimators`` members sees the training set through its own random projection to D features, its own
    assignment of classes to
    the learner's outputs and its own order of the rows; their probabilities are averaged. Rows are centred and scaled
    with statistics of fit's X alone.

    - Any number of features: F are projected to D by A with entries N(0, 1/F), as in meta-training; with
      ``projection="pca"`` from the at most D leading principal components.
    - Fewer classes than K: the other outputs are masked. More: each class gets a code of G = ceil(log_K C) digits in
      base K, members learn
      each digit as a problem of its own, and P(class) is the normalised product of its digits' probabilities (digit
      decomposition, Ma et al. 2024, "TabDPT").
    - More rows than a meta-training sequence had: each member reads a seeded block of that length; together they
      cover every row when num_estimators is at least N / length.

    Args:
        checkpoint: a ``.ckpt`` or ``.safetensors`` file of in-context training, or one written by ``save``.
        num_estimators: members of the ensemble, at least 1.
        projection: "random" or "pca".
        scaling: "per_feature" (columns of unit variance: tables) or "scalar" (one scale for all: pixels, embeddings).
        query_batch_size: queries answered together, at least 1. Answers do not depend on it, nor on how a caller
            splits them, up to rounding.
        device: torch device of the learner.
        dtype: "float32", "float64" or "bfloat16": the precision of the learner; answers come in X's floating type.
        trusted_classes: learner classes outside metalearn.models that a checkpoint may name.
        random_state: seed of projections, assignments and orders.

    Attributes: ``classes_``, ``n_features_in_``, ``feature_names_in_`` (data frames).

    Raises:
        ValueError: for a bad checkpoint, settings out of range, NaN or infinite values, or other than F features.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        num_estimators: int = 8,
        projection: str = "random",
        scaling: str = "per_feature",
        query_batch_size: int = 256,
        device: str = "cpu",
        dtype: str = "float32",
        trusted_classes: Sequence[type[Learner]] = (),
        random_state: Any = 0,
    ):
        self.checkpoint = checkpoint
        self.num_estimators = num_estimators
        self.projection = projection
        self.scaling = scaling
        self.query_batch_size = query_batch_size
        self.device = device
        self.dtype = dtype
        self.trusted_classes = trusted_classes
        self.random_state = random_state

    @classmethod
    def from_checkpoint(cls, path: str | Path, **settings: Any) -> Self:
        """A classifier on the learner in ``path``, fitted if ``save`` wrote it fitted; ``settings`` are constructor arguments."""
        _, card, tensors = _read(path, settings.get("trusted_classes", ()))
        classifier = cls(path, **(card.get("settings", {}) | settings))
        if "fit" in card:
            classifier._restore(card["fit"], tensors)
        return classifier

    def save(self, path: str | Path) -> None:
        """Write learner, settings and, after ``fit``, the fitted state to a ``.safetensors`` file: no pickle."""
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path is {str(path)!r}; accepted: a name that ends in .safetensors")
        learner, card, _ = _read(self.checkpoint, self.trusted_classes)
        settings = {
            k: v for k, v in self.get_params().items() if k not in ("checkpoint", "trusted_classes", "random_state")
        }
        card = {k: v for k, v in card.items() if k != "fit"} | {"settings": settings}
        tensors: dict[str, Tensor] = {}
        if hasattr(self, "classes_"):
            if self.classes_.dtype.kind not in "OUbiuf":
                raise ValueError(
                    f"classes are {self.classes_.dtype}; accepted for save: strings, integers, floats, booleans"
                )
            card["fit"] = {
                "classes": self.classes_.tolist(),
                "kind": self.classes_.dtype.str,
                "features": self.n_features_in_,
            }
            tensors = {f"fit.{name}": getattr(self, f"_{name}") for name in _FITTED}
        save_learner(path, learner, card, tensors)

    def fit(self, X: Any, y: Any) -> Self:
        """Read the training set (N, F) with labels (N,) of any type into the learner's state."""
        require_range("num_estimators", self.num_estimators, 1)
        require_range("query_batch_size", self.query_batch_size, 1)
        require_choice("projection", self.projection, ("random", "pca"))
        require_choice("scaling", self.scaling, ("per_feature", "scalar"))
        require_choice("dtype", self.dtype, ("float32", "float64", "bfloat16"))
        _, card, _ = _read(self.checkpoint, self.trusted_classes)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, targets_N = np.unique(y, return_inverse=True)
        rng = check_random_state(self.random_state)
        x_NF = torch.from_numpy(np.array(X, dtype=np.float64))
        self._centre_F, self._scale_F = _statistics(x_NF, self.scaling)
        z_NF = self._standardise(x_NF)
        self._basis_EFD = self._bases(z_NF, card["num_features"], rng)
        self._codes_EGC = _codes(len(self.classes_), card["num_classes"], self.num_estimators, rng)
        rows_EN = _blocks(len(z_NF), card["length"] - 1, self.num_estimators, rng)
        self._context_END = z_NF[rows_EN] @ self._basis_EFD
        self._labels_EN = torch.from_numpy(targets_N)[rows_EN]
        self._prefill()
        return self

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Class probabilities (Q, C), columns in the order of ``classes_``."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        x_QF, size = torch.from_numpy(np.array(X, dtype=np.float64)), self.query_batch_size
        # Every chunk has the same shape, so that a row's sums are taken in the same order wherever it stands.
        parts = [self._answer(functional.pad(c, (0, 0, 0, size - len(c))))[: len(c)] for c in x_QF.split(size)]
        return torch.cat(parts).numpy().astype(X.dtype)

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row: (Q,)."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def _prefill(self) -> None:
        """The state (E·G sequences) after the context, once for all queries."""
        learner, card, _ = _read(self.checkpoint, self.trusted_classes)
        dtype, members = getattr(torch, self.dtype), self._codes_EGC.shape[0] * self._codes_EGC.shape[1]
        self._learner = _on(learner, self.device, dtype)
        self._tokens = Tokens(card["tokens"], card["num_features"], card["num_classes"])
        digits = self._codes_EGC.shape[1]
        x_MND = self._context_END.repeat_interleave(digits, 0).to(self.device, dtype)
        y_MN = (
            self._codes_EGC.gather(2, self._labels_EN.unsqueeze(1).expand(-1, digits, -1)).flatten(0, 1).to(self.device)
        )
        self._context: tuple[Tensor, Tensor] = x_MND, y_MN
        state = self._learner.init_state(members, self.device, dtype)
        with torch.inference_mode():
            context = self._tokens.context(x_MND, y_MN)
            self._state: State = self._learner.prefill(context, state)[1] if context.shape[1] else state

    def _answer(self, x_QF: Tensor) -> Tensor:
        """Probabilities (Q, C) in float64: members' class probabilities, averaged."""
        queries_EQD = self._standardise(x_QF) @ self._basis_EFD
        members, digits, _ = self._codes_EGC.shape
        with torch.inference_mode():
            queries_MQD = queries_EQD.repeat_interleave(digits, 0).to(self._context[0])
            logits_MQK = self._learner.branch(self._tokens.query(queries_MQD, *self._context), self._state)
        return class_probabilities(logits_MQK.double().cpu().unflatten(0, (members, digits)), self._codes_EGC).mean(0)

    def _standardise(self, x_QF: Tensor) -> Tensor:
        return ((x_QF - self._centre_F) / self._scale_F).clamp_(-_LARGEST, _LARGEST)

    def _bases(self, z_NF: Tensor, num_features: int, rng: np.random.RandomState) -> Tensor:
        """A projection (F, D) for each member: Gaussian, or Gaussian after the leading principal components."""
        features = z_NF.shape[1]
        if self.projection == "random":
            drawn = rng.standard_normal((self.num_estimators, features, num_features))
            return torch.from_numpy(drawn) / math.sqrt(features)
        _, spread, directions = torch.linalg.svd(z_NF - z_NF.mean(0), full_matrices=False)
        kept = directions[:num_features].T  # (F, R)
        drawn = torch.from_numpy(rng.standard_normal((self.num_estimators, kept.shape[1], num_features)))
        energy = spread[:num_features].square().sum() / len(z_NF)  # so that projected features have unit variance
        return kept @ drawn / math.sqrt(max(float(energy), 1e-12))

    def _restore(self, fit: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.classes_ = np.array(fit["classes"], dtype=fit["kind"])
        self.n_features_in_ = int(fit["features"])
        for name in _FITTED:
            setattr(self, f"_{name}", tensors[f"fit.{name}"])
        self._prefill()

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_state")

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and joblib: the learner and its state are rebuilt from the checkpoint, not copied."""
        return {
            k: v for k, v in super().__getstate__().items() if k not in ("_learner", "_state", "_context", "_tokens")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "classes_"):
            self._prefill()


def class_probabilities(logits_EGQK: Tensor, codes_EGC: Tensor) -> Tensor:
    """P(c) ∝ prod_g softmax over the outputs in use of digit g at code (g, c): (E, Q, C). With one digit, a masked softmax."""
    used_EGK = torch.zeros(*codes_EGC.shape[:2], logits_EGQK.shape[-1], dtype=torch.bool)
    used_EGK.scatter_(2, codes_EGC, True)
    log_EGQK = logits_EGQK.masked_fill(~used_EGK.unsqueeze(2), -torch.inf).log_softmax(-1)
    index = codes_EGC.unsqueeze(2).expand(-1, -1, logits_EGQK.shape[2], -1)
    return log_EGQK.gather(3, index).sum(1).softmax(-1)


def _statistics(x_NF: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean (F,) and standard deviation, (F,) or one for all; a constant column is only centred."""
    centre_F = x_NF.mean(0)
    spread_F = (x_NF - centre_F).square().mean(0)
    scale = spread_F.sqrt() if scaling == "per_feature" else spread_F.mean().sqrt().expand(x_NF.shape[1])
    negligible = scale <= 1e-12 * (1 + centre_F.abs())  # what rounding leaves of a constant column
    return centre_F, torch.where(negligible, 1.0, scale).contiguous()


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


def _blocks(rows: int, longest: int, members: int, rng: np.random.RandomState) -> Tensor:
    """Row numbers (E, min(rows, longest)): whole permutations, or successive blocks of permutations of all rows."""
    size = min(rows, max(1, longest))
    per_round = rows // size
    rounds = [
        rng.permutation(rows)[: per_round * size].reshape(per_round, size) for _ in range(-(-members // per_round))
    ]
    return torch.from_numpy(np.concatenate(rounds)[:members])


def _read(
    path: str | Path | None, trusted: Sequence[type[Learner]]
) -> tuple[Learner, dict[str, Any], dict[str, Tensor]]:
    """Learner, card and further tensors of a checkpoint, one copy in memory however many classifiers use it."""
    if path is None:
        raise ValueError("checkpoint is None; accepted: the path of a .ckpt or .safetensors file written by metalearn")
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}; accepted: a .ckpt or .safetensors file written by metalearn")
    return _load(str(path), os.stat(path).st_mtime_ns, tuple(trusted))


@functools.lru_cache(maxsize=4)
def _load(
    path: str, modified: int, trusted: tuple[type[Learner], ...]
) -> tuple[Learner, dict[str, Any], dict[str, Tensor]]:
    del modified  # part of the cache's key
    return load_learner(path, trusted)


def _on(learner: Learner, device: str, dtype: torch.dtype) -> Learner:
    """The learner itself where it already is as asked, else a copy."""
    parameter = next(learner.parameters())
    if parameter.dtype == dtype and parameter.device == torch.device(device):
        return learner
    return _converted(learner, device, dtype)


@functools.lru_cache(maxsize=4)
def _converted(learner: Learner, device: str, dtype: torch.dtype) -> Learner:
    return copy.deepcopy(learner).to(device, dtype)
