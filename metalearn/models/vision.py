"""Small classifiers of flat inputs: what inner problems train."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from metalearn.base import require_choice, require_range

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Args:
        num_inputs: features D, at least 1.
        num_outputs: classes K, at least 1.
        hidden: widths of the hidden layers, each at least 1; none for a linear model.
        activation: "tanh", "relu" or "gelu".
        dropout: probability in [0, 1] that a hidden unit is left out of a training step; 0 builds no such layer.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        hidden: Sequence[int] = (64,),
        activation: str = "tanh",
        dropout: float = 0.0,
    ):
        require_choice("activation", activation, ACTIVATIONS)
        require_range("dropout", dropout, 0, 1)
        widths = [num_inputs, *hidden, num_outputs]
        for width in widths:
            require_range("width", width, 1)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, nn.Linear(widths[-2], num_outputs))


class LeNet(nn.Module):
    """Two convolutions of 5 x 5 pixels, each averaged over 2 x 2, and three linear layers, on square grey images given flat.

    Args:
        num_inputs: pixels D of an image, the square of its side, which is at least 4.
        num_outputs: classes K, at least 1.
        channels: of the two convolutions, each at least 1.
        widths: of the two hidden linear layers, each at least 1.
        activation: "tanh", "relu" or "gelu".

    Raises:
        ValueError: for values out of range, or images that are not square.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", section II.B.
    Differs from the paper: both convolutions are padded, so that 8 x 8 pixels leave something; every map of the second
    sees every map of the first; a linear last layer instead of radial basis functions; averages without weights.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        channels: tuple[int, int] = (6, 16),
        widths: tuple[int, int] = (120, 84),
        activation: str = "tanh",
    ):
        super().__init__()
        require_choice("activation", activation, ACTIVATIONS)
        require_range("num_outputs", num_outputs, 1)
        self.side = math.isqrt(num_inputs)
        if self.side**2 != num_inputs or self.side < 4:
            raise ValueError(f"num_inputs is {num_inputs}; accepted: the square of a side of at least 4 pixels")
        for size in (*channels, *widths):
            require_range("size", size, 1)
        act = ACTIVATIONS[activation]
        self.features = nn.Sequential(
            *(nn.Conv2d(1, channels[0], 5, padding=2), act(), nn.AvgPool2d(2)),
            *(nn.Conv2d(channels[0], channels[1], 5, padding=2), act(), nn.AvgPool2d(2)),
            nn.Flatten(-3),
        )
        pooled = channels[1] * (self.side // 4) ** 2
        self.head = MLP(pooled, num_outputs, widths, activation)

    def forward(self, inputs_ND: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.head(self.features(inputs_ND.unflatten(-1, (1, self.side, self.side))))
