"""InContextRegressor: the scikit-learn face of an in-context learner of numbers. Fitting is reading; nothing is optimised.

E ensemble members, N context rows, Q queries, F the user's features, D features the learner was meta-trained with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from torch import Tensor

from metalearn.base import Learner, require_range
from metalearn.in_context import InContextEstimator, statistics


class InContextRegressor(RegressorMixin, InContextEstimator):
    """Predict numbers in context: ``fit`` reads the training set into the learner's state, ``predict`` continues from it.

    A learner knows the law of its meta-training only: features of mean 0 and variance 1, targets of mean 0 and mean square
    s² (``LinearRegression``: s² = D + noise²; its weights are then about 1). So fit's X is centred and scaled to unit
    variance, cut off at 1000 standard deviations, and each member projects it to D features of unit variance; fit's y is
    centred and scaled to mean square s², and answers are scaled back. Scaled so, data are read with the noise of
    meta-training: about the share noise² / s² of the targets' variance. A constant y is answered as it is. Members'
    predictions are averaged.

    - Projections: "orthogonal" are random rotations: with F = D uncorrelated features stay so, as in meta-training, and a
      learner that has no favourite directions gives every member the same answer. With F < D the rest of the D
      dimensions stays empty. "random" are Gaussian matrices, as in ``ProjectedImages``; "pca" are such of the at most D
      leading principal components.
    - More than D features: what a member's D directions do not show is noise to it, so that predictions shrink towards the mean,
      for uncorrelated features to about D / F of the effect. Prefer a learner with D >= F, or "pca".
    - More rows than the T - 1 that come before the last one of a meta-training sequence: each member reads a random
      block of T - 1; together they cover every row when num_estimators is at least N / (T - 1).

    Args:
        checkpoint: a ``.ckpt`` or ``.safetensors`` file of in-context training on numbers, or one written by ``save``.
        num_estimators: members of the ensemble, at least 1.
        projection: "orthogonal", "random" or "pca".
        scaling: "per_feature" (columns of unit variance: tables) or "scalar" (one scale for all: pixels, embeddings).
        target_scale: root mean square s > 0 of the targets in meta-training; None takes the checkpoint's own
            ``target_scale``.
        query_batch_size: queries answered together, at least 1. Memory grows with it; answers do not depend on it, nor
            on how a caller splits them, up to rounding.
        device: torch device of the learner.
        dtype: "float32", "float64" or "bfloat16": the precision of the learner; answers come in X's floating type.
        trusted_classes: learner classes outside metalearn.models that a checkpoint may name.
        random_state: seed of projections and orders.

    Attributes: ``n_features_in_``, ``feature_names_in_`` (data frames).

    Raises:
        ValueError: for a bad checkpoint or one of classes, settings out of range, NaN or infinite values, other than F
            features, several targets per row, or a learner whose answers are not finite.
    """

    kind = "regressor"
    projections = ("orthogonal", "random", "pca")
    settings = (*InContextEstimator.settings, "target_scale")
    fitted = (*InContextEstimator.fitted, "units_3")

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        *,
        num_estimators: int = 8,
        projection: str = "orthogonal",
        scaling: str = "per_feature",
        target_scale: float | None = None,
        query_batch_size: int = 256,
        device: str = "cpu",
        dtype: str = "float32",
        trusted_classes: Sequence[type[Learner]] = (),
        random_state: Any = 0,
    ):
        super().__init__(
            checkpoint,
            num_estimators=num_estimators,
            projection=projection,
            scaling=scaling,
            query_batch_size=query_batch_size,
            device=device,
            dtype=dtype,
            trusted_classes=trusted_classes,
            random_state=random_state,
        )
        self.target_scale = target_scale

    def predict(self, X: Any) -> NDArray[Any]:
        """The predicted target of each row: (Q,)."""
        return self._answers(X)[:, 0]

    @classmethod
    def _require_own(cls, path: str | Path, card: dict[str, Any]) -> None:
        if card["num_classes"] != 1:
            raise ValueError(
                f"{str(path)!r} holds a learner of {card['num_classes']} classes, for InContextClassifier; accepted: one of numbers"
            )

    def _read_targets(self, y: NDArray[Any], card: dict[str, Any]) -> Tensor:
        try:
            y_N = torch.from_numpy(np.array(y, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(f"y has targets of {y.dtype}: {error}; accepted: numbers") from error
        if not y_N.isfinite().all():
            raise ValueError("y has targets that are missing or infinite; accepted: finite numbers")
        (mean,), (spread,) = statistics(y_N.unsqueeze(1), "per_feature")
        constant = (y_N - mean).abs().max() <= 1e-12 * y_N.abs().max()
        self._units_3 = torch.stack([mean, torch.where(constant, 0.0, spread), spread.new_tensor(self._scale(card))])
        return (y_N - mean) / spread

    def _scale(self, card: dict[str, Any]) -> float:
        scale = card.get("target_scale") if self.target_scale is None else self.target_scale
        if scale is None:
            raise ValueError(
                f"{str(self.checkpoint)!r} does not say how large its targets were; accepted: target_scale, their root mean square"
            )
        require_range("target_scale", scale, 1e-6, 1e6)
        return float(scale)

    def _told(self, dtype: torch.dtype) -> Tensor:
        return (self._labels_EN * self._units_3[2]).to(dtype)

    def _combine(self, logits_MQK: Tensor) -> Tensor:
        """Members' numbers, averaged, in the user's units: (Q, 1)."""
        mean, spread, scale = self._units_3
        return mean + logits_MQK.mean(0) / scale * spread

    @property
    def _num_answers(self) -> int:
        return 1

    def _description(self) -> dict[str, Any]:
        return {}

    def _restore_targets(self, fit: dict[str, Any]) -> None:
        return
