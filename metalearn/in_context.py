"""What the scikit-learn faces of in-context learners share: an ensemble that reads the training set once and answers queries.

E ensemble members, N context rows, Q queries, F the user's features, D features the learner was meta-trained with, K
its outputs, C answers per row, M sequences, a fixed number for each member.
"""

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn import functional

from metalearn.base import Learner, State, require_choice, require_range
from metalearn.models.saving import load_learner, save_learner
from metalearn.models.tokens import Tokens

Checkpoint = tuple[Learner, dict[str, Any], dict[str, Tensor]]

_LARGEST = 1e3  # standard deviations: keeps any finite input finite inside the learner
_TILE = 16  # rows: batches of whole tiles meet the same kernels, so that a row's answer hardly depends on the others
_PREFILLED = ("_learner", "_tokens", "_context", "_state")


class InContextEstimator(BaseEstimator, ABC):
    """An ensemble of one learner, each member of which reads the training set through a projection of its own.

    A face says what its targets are to the learner, and how it makes answers of the learner's outputs. Attributes of a fit
    whose names are in ``fitted`` are tensors and travel in a checkpoint; the rest of the state is computed from them.
    """

    kind: ClassVar[str]  # what the face is called in messages
    projections: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = (
        "num_estimators",
        "projection",
        "scaling",
        "query_batch_size",
        "dtype",
        "random_state",
    )
    fitted: ClassVar[tuple[str, ...]] = ("centre_F", "scale_F", "basis_EFD", "context_END", "labels_EN")

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

    # -- what a face says ----------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _require_own(cls, path: str | Path, card: dict[str, Any]) -> None:
        """Raise ``ValueError`` unless the checkpoint's learner is of the face's kind."""

    @abstractmethod
    def _read_targets(self, y: NDArray[Any], card: dict[str, Any]) -> Tensor:
        """Each row's label (N,), a class number or a number, after keeping what turns answers back into targets."""

    def _assign(self, card: dict[str, Any], rng: np.random.RandomState) -> None:
        """Draw what members make of labels, between their projections and their rows; by default nothing."""
        return

    @abstractmethod
    def _told(self, dtype: torch.dtype) -> Tensor:
        """The labels (M, N) that sequences tell the learner."""

    @abstractmethod
    def _combine(self, logits_MQK: Tensor) -> Tensor:
        """Answers (Q, C) from the learner's outputs in float64."""

    @property
    @abstractmethod
    def _num_answers(self) -> int:
        """Answers C per row."""

    @abstractmethod
    def _description(self) -> dict[str, Any]:
        """What ``_restore_targets`` needs beside the fitted tensors: builtins only."""

    @abstractmethod
    def _restore_targets(self, fit: dict[str, Any]) -> None:
        """Take back what ``_description`` said."""

    # -- reading and answering -----------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: str | Path, **settings: Any) -> Self:
        """An estimator on the learner in ``path``, fitted if ``save`` wrote it fitted; ``settings`` are constructor arguments."""
        learner, card, tensors = cls._load(path, settings.get("trusted_classes", ()))
        saved = card.get("settings", {})
        if not isinstance(saved, dict) or not saved.keys() <= set(cls.settings):
            raise ValueError(f"{str(path)!r} has settings {saved!r}; accepted: {', '.join(cls.settings)}")
        estimator = cls(path, **(saved | settings))
        if "fit" in card:
            estimator._restore(learner, card, tensors)
        return estimator

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
        learner, card = self._source if fitted else self._load(self.checkpoint, self.trusted_classes)[:2]
        card = {name: value for name, value in card.items() if name != "fit"}
        card["settings"] = {name: getattr(self, name) for name in self.settings}
        if fitted:
            names = getattr(self, "feature_names_in_", None)
            sizes = {"features": self.n_features_in_, "names": None if names is None else names.tolist()}
            card["fit"] = self._description() | sizes
        tensors = {f"fit.{name}": getattr(self, f"_{name}") for name in self.fitted} if fitted else None
        save_learner(path, learner, card, tensors)

    def fit(self, X: Any, y: Any) -> Self:
        """Read the training set (N, F) with its targets (N,) into the learner's state."""
        self._check_settings()
        learner, card, _ = self._load(self.checkpoint, self.trusted_classes)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        labels_N, rng = self._read_targets(y, card), check_random_state(self.random_state)
        x_NF = torch.from_numpy(np.array(X, dtype=np.float64))
        self._centre_F, self._scale_F = statistics(x_NF, self.scaling)
        z_NF = self._standardise(x_NF)
        self._basis_EFD = self._bases(z_NF, card["num_features"], rng)
        self._assign(card, rng)
        rows_EN = draw_blocks(len(z_NF), card["length"] - 1, self.num_estimators, rng)
        pairs = zip(rows_EN, self._basis_EFD, strict=True)
        self._context_END = torch.stack([z_NF[rows_N] @ basis_FD for rows_N, basis_FD in pairs])
        self._labels_EN = labels_N[rows_EN]
        self._prefill(learner, card)
        return self

    def _answers(self, X: Any) -> NDArray[Any]:
        """Answers (Q, C) in X's floating type, a chunk of queries at a time."""
        check_is_fitted(self)
        require_range("query_batch_size", self.query_batch_size, 1)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        chunks = (X[i : i + self.query_batch_size] for i in range(0, len(X), self.query_batch_size))
        answers_QC = torch.cat([self._answer(torch.from_numpy(np.array(c, dtype=np.float64))) for c in chunks])
        if not answers_QC.isfinite().all():
            raise ValueError(f"the learner's answers are not finite: {self.checkpoint} may come from a diverged run")
        return answers_QC.numpy().astype(X.dtype)

    def _check_settings(self) -> None:
        require_range("num_estimators", self.num_estimators, 1)
        require_range("query_batch_size", self.query_batch_size, 1)
        require_choice("projection", self.projection, self.projections)
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
        y_MN = self._told(dtype).to(self.device)
        self._context = self._per_sequence(self._context_END, len(y_MN), dtype).to(self.device), y_MN
        with torch.inference_mode():
            empty = self._learner.init_state(len(y_MN), self.device, dtype)
            self._state: State = self._learner.prefill(self._tokens.context(*self._context), empty)[1]

    def _answer(self, x_QF: Tensor) -> Tensor:
        """Answers (Q, C) in float64."""
        (seen_MND, _), queries = self._context, len(x_QF)
        queries_EQD = self._standardise(functional.pad(x_QF, (0, 0, 0, -queries % _TILE))) @ self._basis_EFD
        with torch.inference_mode():
            queries_MQD = self._per_sequence(queries_EQD, len(seen_MND), seen_MND.dtype).to(seen_MND.device)
            logits_MQK = self._learner.branch(self._tokens.query(queries_MQD, *self._context), self._state)
            return self._combine(logits_MQK[:, :queries].cpu().double())

    def _per_sequence(self, x_END: Tensor, sequences: int, dtype: torch.dtype) -> Tensor:
        """Each member's rows for each of its sequences: (M, N, D) in the learner's precision."""
        return x_END.to(dtype).repeat_interleave(sequences // len(x_END), 0)

    def _standardise(self, x_QF: Tensor) -> Tensor:
        return ((x_QF - self._centre_F) / self._scale_F).clamp_(-_LARGEST, _LARGEST)

    def _bases(self, z_NF: Tensor, num_features: int, rng: np.random.RandomState) -> Tensor:
        """A projection (F, D) for each member, under which features of unit variance keep it (on average over members)."""
        features = z_NF.shape[1]
        if self.projection == "pca":
            return self._principal_bases(z_NF, num_features, rng)
        drawn = rng.standard_normal((self.num_estimators, features, num_features))
        if self.projection == "random":
            return torch.from_numpy(drawn) / math.sqrt(features)
        left_EFR, _, right_ERD = torch.linalg.svd(torch.from_numpy(drawn), full_matrices=False)
        return left_EFR @ right_ERD * math.sqrt(max(1.0, num_features / features))

    def _principal_bases(self, z_NF: Tensor, num_features: int, rng: np.random.RandomState) -> Tensor:
        """Gaussian projections (F, D) of the leading principal components."""
        _, spread_R, directions_RF = torch.linalg.svd(z_NF, full_matrices=False)
        kept_FR = directions_RF[:num_features].T
        drawn = torch.from_numpy(rng.standard_normal((self.num_estimators, kept_FR.shape[1], num_features)))
        energy = float(spread_R[:num_features].square().sum()) / len(z_NF)  # what projected features' variance would be
        return kept_FR @ drawn / math.sqrt(energy if energy > 1e-6 else 1.0)

    def _restore(self, learner: Learner, card: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Become the fitted estimator of a checkpoint, if a trial query shows that its parts fit together."""
        self._check_settings()
        try:
            fit = card["fit"]
            self._restore_targets(fit)
            self.n_features_in_ = int(fit["features"])
            if fit["names"] is not None:
                self.feature_names_in_ = np.array(fit["names"], dtype=object)
            for name in self.fitted:
                setattr(self, f"_{name}", tensors[f"fit.{name}"])
            self._prefill(learner, card)
            trial_QC = self._answer(torch.zeros(1, self.n_features_in_, dtype=torch.float64))
            require_choice("its number of answers", trial_QC.shape[1], (self._num_answers,))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{str(self.checkpoint)!r} does not hold a fitted {self.kind}: {error!r}") from error

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_state")

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and joblib: the fitted state goes without what can be computed again, wherever that stood."""
        return {name: value for name, value in vars(self).items() if name not in _PREFILLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_source" in state:
            self._prefill(*self._source)

    @classmethod
    def _load(cls, path: str | Path | None, trusted: Sequence[type[Learner]]) -> Checkpoint:
        """A checkpoint of the face's own kind."""
        found = read_checkpoint(path, trusted)
        assert path is not None
        cls._require_own(path, found[1])
        return found


def statistics(x_NF: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean (F,) and standard deviation, (F,) or one for all; a constant column is only centred."""
    peak_F = x_NF.abs().amax(0) if scaling == "per_feature" else x_NF.abs().max().expand(x_NF.shape[1])
    unit_NF = x_NF / torch.where(peak_F > 0, peak_F, 1.0)  # no square of which overflows
    centre_F = unit_NF.mean(0).clamp_(-1, 1)
    variance_F = (unit_NF - centre_F).square().mean(0)
    scale_F = peak_F * (variance_F if scaling == "per_feature" else variance_F.mean()).sqrt()
    negligible = scale_F <= 1e-12 * peak_F  # what rounding leaves of a constant column
    return centre_F * peak_F, torch.where(negligible, 1.0, scale_F)


def draw_blocks(rows: int, longest: int, members: int, rng: np.random.RandomState) -> Tensor:
    """Row numbers (E, min(rows, longest)): successive blocks of permutations of all rows, whose last block starts over."""
    size = max(1, min(rows, longest))
    per_round = math.ceil(rows / size)
    rounds = [np.resize(rng.permutation(rows), (per_round, size)) for _ in range(math.ceil(members / per_round))]
    return torch.from_numpy(np.concatenate(rounds)[:members])


def read_checkpoint(path: str | Path | None, trusted: Sequence[type[Learner]]) -> Checkpoint:
    """Learner, card and further tensors of a checkpoint, one copy in memory however many estimators use it."""
    if path is None:
        raise ValueError("checkpoint is None; accepted: the path of a .ckpt or .safetensors file written by metalearn")
    file = Path(path).stat() if Path(path).is_file() else None
    version = (file.st_ino, file.st_mtime_ns, file.st_size) if file else ()
    return _read(str(path), version, tuple(trusted))


@functools.lru_cache(maxsize=4)
def _read(path: str, version: tuple[int, ...], trusted: tuple[type[Learner], ...]) -> Checkpoint:
    del version  # part of the cache's key
    return load_learner(path, trusted)


@functools.lru_cache(maxsize=4)
def _on(learner: Learner, device: str, dtype: torch.dtype) -> Learner:
    """The learner itself where it already is as asked, else a copy, one for all estimators that ask for it."""
    as_asked = all(p.dtype == dtype and p.device == torch.device(device) for p in learner.parameters())
    return learner if as_asked else copy.deepcopy(learner).to(device, dtype)
