"""A learned rule small enough to be meta-trained by evolution strategies within minutes.

Letters: P parameters of all tensors together; ``…`` leading axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn.base import Params, Tree
from metalearn.optim.features import TIME_SCALES, running_mean, weights_held
from metalearn.optim.layout import Layout
from metalearn.optim.learned import count
from metalearn.optim.mlp import CoordinateMLP

DECAYS = (0.5, 0.9, 0.99)
SQUARE_DECAY = 0.999
SQUARE_EPS = 1e-10


class SmallMLP(CoordinateMLP):
    """15 features of a parameter and an MLP of two hidden layers of 8 units: 218 weights.

    Features: gradient g, parameter p, and running means m of the gradient with decays .5, .9 and .99, these five normalised
    over their tensor; ``g / sqrt(v + 1e-10)`` and the three ``m / sqrt(v + 1e-10)``, which have a scale of their own and are
    not, where v is the running mean of g^2 with decay .999 and v and m are corrected for their start at 0; time at the six
    scales 1, 3, 10, 30, 100 and 300. Direction ``c d exp(e m)`` of the two outputs d and m. State: four numbers per parameter.

    The last layer begins small, so that an update before meta-training moves a parameter by about ``c output_std``.

    Args:
        hidden_sizes: Units of each hidden layer, at least one layer.
        step_mult: c > 0.
        exp_mult: e >= 0.
        output_std: Standard deviation of the last layer's weights before meta-training, >= 0, in units of
            ``1 / sqrt(inputs)``, which is that of the other layers' weights.

    Raises:
        ValueError: A value is out of range.

    Source: after Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers",
    and "Understanding and correcting pathologies in the training of learned optimizers" of 2019.
    """

    num_features = 3 + 2 * len(DECAYS)
    num_normalised = 2 + len(DECAYS)
    time_scales = TIME_SCALES[:6]

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (8, 8),
        step_mult: float = 0.01,
        exp_mult: float = 0.01,
        output_std: float = 0.1,
    ) -> None:
        super().__init__(hidden_sizes, step_mult, exp_mult, output_std)

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        return {
            "step": count(params_P),
            "momentum": {str(kept): torch.zeros_like(params_P) for kept in DECAYS},
            "square": torch.zeros_like(params_P),
        }

    def observe(self, grads_P: Tensor, state: Tree, params_P: Tensor) -> tuple[list[Tensor], Tensor, Tree]:
        step = state["step"] + 1
        means = {str(kept): running_mean(state["momentum"][str(kept)], grads_P, kept) for kept in DECAYS}
        square_P = running_mean(state["square"], grads_P.square(), SQUARE_DECAY)
        held, *held_of_means = weights_held(step, (SQUARE_DECAY, *DECAYS), grads_P.dtype).split(1, -1)
        # sqrt(held) / sqrt(v + eps held) is 1 / sqrt(v / held + eps): one pass less.
        inverse_P = (square_P + SQUARE_EPS * held).rsqrt()
        factors = held.sqrt() / torch.cat([torch.ones_like(held), *held_of_means], -1)
        features = [grads_P, params_P, *means.values(), *(x_P * inverse_P for x_P in (grads_P, *means.values()))]
        return features, factors, {"step": step, "momentum": means, "square": square_P}
