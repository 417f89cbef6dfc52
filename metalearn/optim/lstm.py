"""An optimizer that is an LSTM, the same for every coordinate.

Letters: P parameters of all tensors together; F inputs of a coordinate; H hidden units; ``…`` leading axes, of tasks and of
particles.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import Params, Tree, require_choice, require_whole
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule, weight

PREPROCESSING = ("none", "paper", "released")
FORGET_BIAS = 1.0


class CoordinateLSTM(LearnedRule):
    """An LSTM that reads a coordinate's gradient and says its update; coordinates share weights and see nothing of each other.

    Layer by layer with x the input and h, c the state: ``(i, f, o, j) = (x, h) W + b``,
    ``c <- sigmoid(f) c + sigmoid(i) tanh(j)``, ``h <- sigmoid(o) tanh(c)``; after the last,
    ``p <- p + scale (h w + b)``. The first input is the gradient g itself ("none") or two functions of it, with p = 10
    ``(log|g| / p, sign g)`` where ``|g| >= e^-p``, else ``(-1, e^p g)`` ("paper"), or the same with p = 5 and 1.2e-7 added
    to |g| under the logarithm ("released"). With two inputs and layers (20, 20) there are 5141 weights.

    Weights and biases begin as normal numbers of standard deviation 1 / sqrt(inputs), those beyond two of them left out;
    biases of forget gates 1 higher.

    Args:
        layers: hidden units of each layer, each at least 1; empty for a linear function of the input.
        preprocessing: "none", "paper" or "released".
        scale: what the output is multiplied by, above 0.

    Raises:
        ValueError: for values out of range.

    Source: Andrychowicz et al. 2016, "Learning to Learn by Gradient Descent by Gradient Descent", section 2.1 and
    appendix A; sizes, scale and initial weights are those of google-deepmind/learning-to-learn. Differs from it: what it
    adds to a forget gate is in the initial bias.
    """

    def __init__(self, layers: Sequence[int] = (20, 20), preprocessing: str = "released", scale: float = 0.01) -> None:
        super().__init__()
        for size in layers:
            require_whole("size of a layer", size, 1)
        require_choice("preprocessing", preprocessing, PREPROCESSING)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale!r}; accepted: 0 < scale < inf")
        self.layers, self.preprocessing, self.scale = list(layers), preprocessing, scale

    @property
    def num_inputs(self) -> int:
        """Inputs F of a coordinate."""
        return 1 if self.preprocessing == "none" else 2

    def init_meta(self, key: Tensor) -> Params:
        sizes, weights, drawn = [self.num_inputs, *self.layers], {}, random.truncated_normal
        for layer, (below, size) in enumerate(zip(sizes, self.layers, strict=False)):
            own, scale = random.fold(key, layer), 1 / math.sqrt(below + size)
            forgets = torch.arange(4 * size, device=key.device) // size == 1
            weights[f"{layer}/weight"] = scale * drawn(random.fold(own, "weight"), (below + size, 4 * size))
            weights[f"{layer}/bias"] = scale * drawn(random.fold(own, "bias"), (4 * size,)) + FORGET_BIAS * forgets
        own, scale = random.fold(key, "head"), 1 / math.sqrt(sizes[-1])
        weights["head/weight"] = scale * drawn(random.fold(own, "weight"), (sizes[-1], 1))
        weights["head/bias"] = scale * drawn(random.fold(own, "bias"), (1,))
        return weights

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        *leading, num_params = params_P.shape
        sizes = {str(layer): (*leading, size, num_params) for layer, size in enumerate(self.layers)}
        return {part: {layer: params_P.new_zeros(size) for layer, size in sizes.items()} for part in ("hidden", "cell")}

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        x_PF, state = self.read(grads_P, state, params_P)
        hidden, cells = {}, {}
        for layer in state["hidden"]:
            gates = meta[f"{layer}/weight"], weight(meta, f"{layer}/bias", 1)
            x_PF, c_PH = lstm_cell(*gates, x_PF, state["hidden"][layer].mT, state["cell"][layer].mT)
            hidden[layer], cells[layer] = x_PF.mT, c_PH.mT  # parameters last, as in all states
        output_P = (x_PF @ meta["head/weight"] + weight(meta, "head/bias", 1)).squeeze(-1)
        return -self.scale * output_P, {**state, "hidden": hidden, "cell": cells}

    def read(self, grads_P: Tensor, state: Tree, params_P: Tensor) -> tuple[Tensor, Tree]:
        """What the first layer is given (…, P, F), and the state after."""
        if self.preprocessing == "none":
            return grads_P.unsqueeze(-1), state
        if self.preprocessing == "paper":
            return log_and_sign(grads_P, 10.0), state
        return log_and_sign(grads_P, 5.0, torch.finfo(torch.float32).eps), state


def lstm_cell(W: Tensor, b: Tensor, x_PF: Tensor, h_PH: Tensor, c_PH: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: the hidden values and the cells after, each (…, P, H).

    Args:
        W: (…, F + H, 4 H), the gates in the order input, forget, output, new.
        b: (…, 1, 4 H).
        x_PF: inputs (…, P, F).
        h_PH: hidden values before, (…, P, H).
        c_PH: cells before, (…, P, H).

    Source: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000.
    """
    size = h_PH.shape[-1]
    gates = torch.cat([x_PF, h_PH], -1) @ W + b
    i, f, o = gates[..., : 3 * size].sigmoid().chunk(3, -1)
    c_PH = f * c_PH + i * gates[..., 3 * size :].tanh()
    return o * c_PH.tanh(), c_PH


def log_and_sign(values: Tensor, p: float, added: float = 0.0) -> Tensor:
    """Two numbers of size 1 that tell a number v of any size: (…, 2).

    ``(log|v| / p, sign v)`` where ``|v| >= e^-p``, else ``(-1, e^p v)``, with ``added`` to |v| under the logarithm.

    Source: Andrychowicz et al. 2016, appendix A.
    """
    size = (values.abs() + added).clamp(min=math.exp(-p))
    return torch.stack([size.log() / p, (values * math.exp(p)).clamp(-1, 1)], -1)
