"""Small models of the next character: what inner problems train."""

from collections.abc import Sequence

from torch import Tensor, nn

from metalearn.base import require_range
from metalearn.models.vision import MLP


class CharacterMLP(nn.Module):
    """Embeddings of the last C characters, side by side, and a multi-layer perceptron.

    Args:
        num_inputs: C, at least 1.
        num_outputs: characters K of the alphabet, at least 1.
        width: of an embedding, at least 1.
        hidden: widths of the hidden layers, each at least 1; none for a linear model.
        activation: as in ``MLP``.

    Raises:
        ValueError: for values out of range.

    Source: Bengio et al. 2003, "A Neural Probabilistic Language Model", eq. 1.
    Differs from the paper: characters, not words; no direct connections.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        width: int = 8,
        hidden: Sequence[int] = (64,),
        activation: str = "tanh",
    ):
        super().__init__()
        require_range("width", width, 1)
        self.embed = nn.Embedding(num_outputs, width)
        self.layers = MLP(num_inputs * width, num_outputs, hidden, activation)

    def forward(self, characters_NC: Tensor) -> Tensor:
        """Logits (N, K) of characters given by their numbers, as floats."""
        return self.layers(self.embed(characters_NC.long()).flatten(-2))
