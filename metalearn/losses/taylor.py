"""TaylorGLO's loss: a third-order polynomial around a learned centre.

Shape letters: N examples, K classes or outputs.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metalearn.losses.elementwise import WeightedLoss

NUM_WEIGHTS = 8


class TaylorLoss(WeightedLoss):
    """A third-order polynomial in target y and output p around the centre (t0, t1), terms without p left out.

    With u = y - t0 and v = p - t1::

        l(y, p) = -(t2 v + t3 v^2 / 2 + t4 v^3 / 6 + t5 u v + t6 u v^2 / 2 + t7 u^2 v / 2)

    summed over outputs, averaged over examples. Its only parameter, ``weights``, is (t0, ..., t7).

    Args:
        weights: the eight numbers; null for zeros, where the paper's search begins.
        trainable: whether ``weights`` requires a gradient.
        options: those of ``ElementwiseLoss``.

    Raises:
        ValueError: for weights that are not eight finite numbers.

    Source: Gonzalez and Miikkulainen 2021, "Optimizing Loss Functions Through Multivariate Taylor Polynomial
    Parameterization", section 3 (from memory), where x is the label and y the output. The mean over outputs is a sum
    here. Differs from the public code of EvoMAL: there label and output have changed places, so that the polynomial
    drops the terms without the label, and the last term's centre is t0 twice.
    """

    kind = "taylor"

    def __init__(self, weights: Sequence[float] | Tensor | None = None, trainable: bool = False, **options: Any):
        super().__init__(**options)
        self._set_weights([0.0] * NUM_WEIGHTS if weights is None else weights, NUM_WEIGHTS, trainable)

    def terms(self, prediction_NK: Tensor, target_NK: Tensor) -> Tensor:
        t0, t1, t2, t3, t4, t5, t6, t7 = self.weights.unbind()
        u, v = target_NK - t0, self.probabilities(prediction_NK) - t1
        return -v * (t2 + u * (t5 + t7 / 2 * u) + v * (t3 / 2 + t6 / 2 * u + t4 / 6 * v))
