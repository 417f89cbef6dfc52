"""Small classifiers of flat inputs: what inner problems train."""

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from metalearn.base import require_choice, require_range

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Args:
        num_inputs: features D, at least 1.
        num_outputs: classes K, at least 1.
        hidden: widths of the hidden layers, each at least 1; none for a linear model.
        activation: "tanh", "relu", "gelu" or "sigmoid".
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
    """Two convolutions of 5 x 5 pixels, each averaged over 2 x 2, and three linear layers, on square images given flat.

    Args:
        num_inputs: numbers D of an image, ``image_channels`` times the square of its side, which is at least 4.
        num_outputs: classes K, at least 1.
        channels: of the two convolutions, each at least 1.
        widths: of the two hidden linear layers, each at least 1.
        activation: "tanh", "relu", "gelu" or "sigmoid".
        image_channels: numbers of a pixel, at least 1; inputs are in the order channel, row, column, as ``ImageSource`` has them.

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
        image_channels: int = 1,
    ):
        super().__init__()
        require_choice("activation", activation, ACTIVATIONS)
        require_range("num_outputs", num_outputs, 1)
        self.image_channels, self.side = image_channels, _side(num_inputs, image_channels)
        for size in (*channels, *widths):
            require_range("size", size, 1)
        act = ACTIVATIONS[activation]
        self.features = nn.Sequential(
            *(nn.Conv2d(image_channels, channels[0], 5, padding=2), act(), nn.AvgPool2d(2)),
            *(nn.Conv2d(channels[0], channels[1], 5, padding=2), act(), nn.AvgPool2d(2)),
            nn.Flatten(-3),
        )
        pooled = channels[1] * (self.side // 4) ** 2
        self.head = MLP(pooled, num_outputs, widths, activation)

    def forward(self, inputs_ND: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.head(self.features(_pixels(inputs_ND, self.image_channels, self.side)))


class SmallResNet(nn.Module):
    """A residual network with group norm, on square images given flat: three stages of 3 x 3 convolutions and a linear layer.

    A stage has ``blocks`` blocks ``relu(x' + norm(conv(relu(norm(conv(x))))))``, where x' is x, or, where a stage halves the
    side and doubles the channels, ``norm(conv_1x1(x))``. The head is linear on the mean over pixels.

    Args:
        num_inputs: numbers D of an image, ``image_channels`` times the square of its side, which is at least 4.
        num_outputs: classes K, at least 1.
        image_channels: numbers of a pixel, at least 1; inputs are in the order channel, row, column.
        width: channels of the first stage, a multiple of ``groups``.
        blocks: of each stage, at least 1.
        groups: of channels that are normalised together, within one example, at least 1.

    Raises:
        ValueError: for values out of range, or images that are not square.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2; group norm: Wu and He 2018.
    Differs from the paper: group norm, which runs stacked by ``vmap`` can have, instead of batch norm; projections where
    sizes change instead of padding by zeros.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        image_channels: int = 1,
        width: int = 16,
        blocks: int = 1,
        groups: int = 4,
    ):
        super().__init__()
        for name, value in dict(num_outputs=num_outputs, width=width, blocks=blocks, groups=groups).items():
            require_range(name, value, 1)
        if width % groups:
            raise ValueError(f"width is {width}; accepted: a multiple of groups = {groups}")
        self.image_channels, self.side = image_channels, _side(num_inputs, image_channels)
        widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
        self.stem = _normalised(image_channels, width, 3, 1, groups)
        pairs = itertools.pairwise([width, *widths])
        self.blocks = nn.Sequential(*(_Residual(before, after, groups) for before, after in pairs))
        self.head = nn.Linear(4 * width, num_outputs)

    def forward(self, inputs_ND: Tensor) -> Tensor:
        """Logits (N, K)."""
        maps = functional.relu(self.stem(_pixels(inputs_ND, self.image_channels, self.side)))
        return self.head(self.blocks(maps).mean((-2, -1)))


class _Residual(nn.Module):
    """Two convolutions and the way past them."""

    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        stride = 1 if before == after else 2
        self.first = _normalised(before, after, 3, stride, groups)
        self.second = _normalised(after, after, 3, 1, groups)
        self.past = nn.Identity() if stride == 1 else _normalised(before, after, 1, stride, groups)

    def forward(self, maps: Tensor) -> Tensor:
        return functional.relu(self.past(maps) + self.second(functional.relu(self.first(maps))))


def _normalised(before: int, after: int, size: int, stride: int, groups: int) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(groups, after))


def _side(num_inputs: int, image_channels: int) -> int:
    """Pixels along the edge of a square image of ``num_inputs`` numbers."""
    require_range("image_channels", image_channels, 1)
    side = math.isqrt(num_inputs // image_channels)
    if image_channels * side**2 != num_inputs or side < 4:
        raise ValueError(
            f"num_inputs is {num_inputs}; accepted with image_channels = {image_channels}: that times the square of a side "
            "of at least 4 pixels"
        )
    return side


def _pixels(inputs_ND: Tensor, channels: int, side: int) -> Tensor:
    """Images (N, channels, side, side) of flat ones."""
    return inputs_ND.unflatten(-1, (channels, side, side))
