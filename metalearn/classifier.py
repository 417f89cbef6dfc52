"""InContextClassifier: the scikit-learn face of an in-context learner. Fitting is reading; nothing is optimised.

E ensemble members, N context rows, Q queries, F the user's features, D features the learner was meta-trained with, K
its classes, C the user's classes, G code digits, M = E·G sequences.
"""

import copy
import functools
import math
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

Checkpoint = tuple[Learner, dict[str, Any], dict[str, Tensor]]

_LARGEST = 1e3  # standard deviations: keeps any finite input finite inside the learner
_TILE = 16  # rows: batches of whole tiles meet the same kernels, so that a row's answer hardly depends on the others
_SETTINGS = ("num_estimators", "projection", "scaling", "query_batch_size", "dtype", "random_state")
_FITTED = ("centre_F", "scale_F", "basis_EFD", "context_END", "codes_EGC", "labels_EN")
_PREFILLED = ("_learner", "_tokens", "_context", "_state")


class InContextClassifier(ClassifierMixin, BaseEstimator):
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
        learner, card, tensors = _read(path, settings.get("trusted_classes", ()))
        saved = card.get("settings", {})
        if not isinstance(saved, dict) or not saved.keys() <= set(_SETTINGS):
            raise ValueError(f"{str(path)!r} has settings {saved!r}; accepted: {', '.join(_SETTINGS)}")
        classifier = cls(path, **(saved | settings))
        if "fit" in card:
            classifier._restore(learner, card, tensors)
        return classifier

    def save(self, path: str | Path) -> None:
        """Write learner, settings and, after ``fit``, the fitted state to a ``.safetensors`` file: no pickle.

        The device and the trusted classes stay behind: they are the reader's to choose.

        Raises:
            ValueError: for another suffix, a ``random_state`` that is neither integer nor None, or classes that are
                not strings, integers, floats or booleans.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"path is {str(path)!r}; accepted: a name that ends in .safetensors")
        if not isinstance(self.random_state, int | np.integer | None):
            raise ValueError(f"random_state is {self.random_state!r}; accepted for save: an integer or None")
        fitted = self.__sklearn_is_fitted__()
        learner, card = self._source if fitted else _read(self.checkpoint, self.trusted_classes)[:2]
        card = {name: value for name, value in card.items() if name != "fit"}
        card["settings"] = {name: getattr(self, name) for name in _SETTINGS}
        if fitted:
            card["fit"] = self._description()
        save_learner(path, learner, card, {f"fit.{n}": getattr(self, f"_{n}") for n in _FITTED} if fitted else None)

    def fit(self, X: Any, y: Any) -> Self:
        """Read the training set (N, F) with labels (N,) of any one type into the learner's state."""
        self._check_settings()
        learner, card, _ = _read(self.checkpoint, self.trusted_classes)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        self.classes_, targets_N = _classes(y)
        rng = check_random_state(self.random_state)
        x_NF = torch.from_numpy(np.array(X, dtype=np.float64))
        self._centre_F, self._scale_F = _statistics(x_NF, self.scaling)
        z_NF = self._standardise(x_NF)
        self._basis_EFD = self._bases(z_NF, card["num_features"], rng)
        self._codes_EGC = _codes(len(self.classes_), card["num_classes"], self.num_estimators, rng)
        rows_EN = _blocks(len(z_NF), card["length"] - 1, self.num_estimators, rng)
        pairs = zip(rows_EN, self._basis_EFD, strict=True)
        self._context_END = torch.stack([z_NF[rows_N] @ basis_FD for rows_N, basis_FD in pairs])
        self._labels_EN = torch.from_numpy(targets_N)[rows_EN]
        self._prefill(learner, card)
        return self

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Class probabilities (Q, C), columns in the order of ``classes_``."""
        check_is_fitted(self)
        require_range("query_batch_size", self.query_batch_size, 1)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        chunks = (X[i : i + self.query_batch_size] for i in range(0, len(X), self.query_batch_size))
        answers_QC = torch.cat([self._answer(torch.from_numpy(np.array(c, dtype=np.float64))) for c in chunks])
        if not answers_QC.isfinite().all():
            raise ValueError(f"the learner's answers are not finite: {self.checkpoint} may come from a diverged run")
        return answers_QC.numpy().astype(X.dtype)

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row: (Q,)."""
        best_Q = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best_Q]

    def _check_settings(self) -> None:
        require_range("num_estimators", self.num_estimators, 1)
        require_range("query_batch_size", self.query_batch_size, 1)
        require_choice("projection", self.projection, ("random", "pca"))
        require_choice("scaling", self.scaling, ("per_feature", "scalar"))
        require_choice("dtype", self.dtype, ("float32", "float64", "bfloat16"))
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device is {self.device!r}; accepted: a torch device of this machine ({error})"
            ) from error

    def _prefill(self, learner: Learner, card: dict[str, Any]) -> None:
        """Read the context into M sequences, once for all queries."""
        self._source = learner, card  # what save and pickle keep, whatever becomes of the file
        dtype = getattr(torch, self.dtype)
        self._learner = _on(learner, self.device, dtype)
        self._tokens = Tokens(card["tokens"], card["num_features"], card["num_classes"])
        labels_EGN = self._labels_EN.unsqueeze(1).expand(-1, self._codes_EGC.shape[1], -1)
        y_MN = self._codes_EGC.gather(2, labels_EGN).flatten(0, 1).to(self.device)
        self._context = self._per_sequence(self._context_END, dtype).to(self.device), y_MN
        with torch.inference_mode():
            empty = self._learner.init_state(len(y_MN), self.device, dtype)
            self._state: State = self._learner.prefill(self._tokens.context(*self._context), empty)[1]

    def _answer(self, x_QF: Tensor) -> Tensor:
        """Probabilities (Q, C) in float64: members' class probabilities, averaged."""
        (seen_MND, _), queries = self._context, len(x_QF)
        queries_EQD = self._standardise(functional.pad(x_QF, (0, 0, 0, -queries % _TILE))) @ self._basis_EFD
        with torch.inference_mode():
            queries_MQD = self._per_sequence(queries_EQD, seen_MND.dtype).to(seen_MND.device)
            logits_MQK = self._learner.branch(self._tokens.query(queries_MQD, *self._context), self._state)
            logits_EGQK = logits_MQK[:, :queries].cpu().double().unflatten(0, self._codes_EGC.shape[:2])
            return class_probabilities(logits_EGQK, self._codes_EGC).mean(0)

    def _per_sequence(self, x_END: Tensor, dtype: torch.dtype) -> Tensor:
        """Each member's rows for each of its G digits: (M, N, D) in the learner's precision."""
        return x_END.to(dtype).repeat_interleave(self._codes_EGC.shape[1], 0)

    def _standardise(self, x_QF: Tensor) -> Tensor:
        return ((x_QF - self._centre_F) / self._scale_F).clamp_(-_LARGEST, _LARGEST)

    def _bases(self, z_NF: Tensor, num_features: int, rng: np.random.RandomState) -> Tensor:
        """A projection (F, D) for each member: Gaussian, or Gaussian after the leading principal components."""
        features = z_NF.shape[1]
        if self.projection == "random":
            drawn = rng.standard_normal((self.num_estimators, features, num_features))
            return torch.from_numpy(drawn) / math.sqrt(features)
        _, spread_R, directions_RF = torch.linalg.svd(z_NF, full_matrices=False)
        kept_FR = directions_RF[:num_features].T
        drawn = torch.from_numpy(rng.standard_normal((self.num_estimators, kept_FR.shape[1], num_features)))
        energy = float(spread_R[:num_features].square().sum()) / len(z_NF)  # what projected features' variance would be
        return kept_FR @ drawn / math.sqrt(energy if energy > 1e-6 else 1.0)

    def _description(self) -> dict[str, Any]:
        """What ``_restore`` needs beside the fitted tensors: builtins only."""
        kind, names = self.classes_.dtype, getattr(self, "feature_names_in_", None)
        if kind.kind not in "OUbiuf":
            raise ValueError(f"classes are {kind}; accepted for save: strings, integers, floats, booleans")
        sizes = {"features": self.n_features_in_, "names": None if names is None else names.tolist()}
        return {"classes": self.classes_.tolist(), "kind": kind.str} | sizes

    def _restore(self, learner: Learner, card: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Become the fitted classifier of a checkpoint, if a trial query shows that its parts fit together."""
        self._check_settings()
        try:
            fit = card["fit"]
            self.classes_ = np.array(fit["classes"], dtype=fit["kind"])
            self.n_features_in_ = int(fit["features"])
            if fit["names"] is not None:
                self.feature_names_in_ = np.array(fit["names"], dtype=object)
            for name in _FITTED:
                setattr(self, f"_{name}", tensors[f"fit.{name}"])
            self._prefill(learner, card)
            trial_QC = self._answer(torch.zeros(1, self.n_features_in_, dtype=torch.float64))
            require_choice("its number of answers", trial_QC.shape[1], (len(self.classes_),))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{str(self.checkpoint)!r} does not hold a fitted classifier: {error!r}") from error

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_state")

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and joblib: the fitted state goes without what can be computed again, wherever that stood."""
        return {name: value for name, value in vars(self).items() if name not in _PREFILLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_source" in state:
            self._prefill(*self._source)


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


def _statistics(x_NF: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean (F,) and standard deviation, (F,) or one for all; a constant column is only centred."""
    peak_F = x_NF.abs().amax(0) if scaling == "per_feature" else x_NF.abs().max().expand(x_NF.shape[1])
    unit_NF = x_NF / torch.where(peak_F > 0, peak_F, 1.0)  # no square of which overflows
    centre_F = unit_NF.mean(0).clamp_(-1, 1)
    variance_F = (unit_NF - centre_F).square().mean(0)
    scale_F = peak_F * (variance_F if scaling == "per_feature" else variance_F.mean()).sqrt()
    negligible = scale_F <= 1e-12 * peak_F  # what rounding leaves of a constant column
    return centre_F * peak_F, torch.where(negligible, 1.0, scale_F)


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
    """Row numbers (E, min(rows, longest)): successive blocks of permutations of all rows, whose last block starts over."""
    size = max(1, min(rows, longest))
    per_round = math.ceil(rows / size)
    rounds = [np.resize(rng.permutation(rows), (per_round, size)) for _ in range(math.ceil(members / per_round))]
    return torch.from_numpy(np.concatenate(rounds)[:members])


def _read(path: str | Path | None, trusted: Sequence[type[Learner]]) -> Checkpoint:
    """Learner, card and further tensors of a checkpoint, one copy in memory however many classifiers use it."""
    if path is None:
        raise ValueError("checkpoint is None; accepted: the path of a .ckpt or .safetensors file written by metalearn")
    file = Path(path).stat() if Path(path).is_file() else None
    version = (file.st_ino, file.st_mtime_ns, file.st_size) if file else ()
    return _load(str(path), version, tuple(trusted))


@functools.lru_cache(maxsize=4)
def _load(path: str, version: tuple[int, ...], trusted: tuple[type[Learner], ...]) -> Checkpoint:
    del version  # part of the cache's key
    return load_learner(path, trusted)


@functools.lru_cache(maxsize=4)
def _on(learner: Learner, device: str, dtype: torch.dtype) -> Learner:
    """The learner itself where it already is as asked, else a copy, one for all classifiers that ask for it."""
    as_asked = all(p.dtype == dtype and p.device == torch.device(device) for p in learner.parameters())
    return learner if as_asked else copy.deepcopy(learner).to(device, dtype)
