"""How labelled examples become the tokens of a sequence model: three formats, each causal in the labels.

B sequences, T examples, S tokens, D features, K classes, W token width, Q queries.
"""

import torch
from torch import Tensor
from torch.nn import functional

from metalearn.base import require_choice, require_range

FORMATS = ("paper", "shift", "interleaved")


class Tokens:
    """Turns (x_1, y_1), (x_2, y_2), … into tokens in which the label of x_j is never visible where x_j is to be classified.

    ``paper``: token j = (x_j, y_{j-1}), W = D + K (Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-
    Learning Transformers", Algorithm 1). ``shift``: token j = (x_j, x_{j-1}, y_{j-1}), W = 2D + K: the paper's token
    seen through a causal convolution of width two, so that no attention head has to learn to look one position back.
    ``interleaved``: x_1, y_1, x_2, y_2, …, W = D + K, S = 2T - 1 tokens. Labels are one-hot vectors and are never
    normalised; what precedes the first example is zero. In regression K is 1 and the label is the number itself.

    Args:
        format: "paper", "shift" or "interleaved".
        num_features: features D of an example, at least 1.
        num_classes: classes K, at least 1; 1 in regression.

    Raises:
        ValueError: for another format or sizes out of range.
    """

    def __init__(self, format: str, num_features: int, num_classes: int):
        require_choice("tokens", format, FORMATS)
        require_range("num_features", num_features, 1)
        require_range("num_classes", num_classes, 1)
        self.format, self.num_features, self.num_classes = format, num_features, num_classes

    @property
    def width(self) -> int:
        """Features W of one token."""
        return (2 if self.format == "shift" else 1) * self.num_features + self.num_classes

    def num_tokens(self, examples: int) -> int:
        """Tokens S up to and including the one at which the last of ``examples`` examples is classified."""
        return 2 * examples - 1 if self.format == "interleaved" else examples

    def encode(self, x_BTD: Tensor, y_BT: Tensor) -> Tensor:
        """Tokens (B, S, W). The last label is not used, and the last token alone depends on the last example."""
        y_BTK = self._labels(y_BT).to(x_BTD.dtype)
        if self.format == "interleaved":
            x_token = functional.pad(x_BTD, (0, self.num_classes))
            y_token = functional.pad(y_BTK, (self.num_features, 0))
            return torch.stack([x_token, y_token], dim=2).flatten(1, 2)[:, :-1]
        seen = [x_BTD, y_BTK] if self.format == "shift" else [y_BTK]
        return torch.cat([x_BTD, *(functional.pad(part[:, :-1], (0, 0, 1, 0)) for part in seen)], dim=-1)

    def at_examples(self, logits_BSK: Tensor) -> Tensor:
        """The logits (B, T, K) at the tokens where an example is to be classified."""
        return logits_BSK[:, ::2] if self.format == "interleaved" else logits_BSK

    def context(self, x_BTD: Tensor, y_BT: Tensor) -> Tensor:
        """The tokens (B, S - 1, W) of a context of T examples that are the same for every query after it."""
        room = functional.pad(x_BTD, (0, 0, 0, 1)), functional.pad(y_BT, (0, 1))
        return self.encode(*room)[:, :-1]

    def query(self, query_BQD: Tensor, x_BTD: Tensor, y_BT: Tensor) -> Tensor:
        """The one further token (B, Q, W) of each of Q independent queries after the context (x, y) of T >= 1 examples."""
        queries = query_BQD.shape[1]
        if self.format == "interleaved":
            return functional.pad(query_BQD, (0, self.num_classes))
        last = self._labels(y_BT[:, -1]).to(x_BTD.dtype)
        if self.format == "shift":
            last = torch.cat([x_BTD[:, -1], last], dim=-1)
        return torch.cat([query_BQD, last.unsqueeze(1).expand(-1, queries, -1)], dim=-1)

    def _labels(self, y: Tensor) -> Tensor:
        """The label's part of a token: (*y.shape, K)."""
        return y.unsqueeze(-1) if self.num_classes == 1 else functional.one_hot(y, self.num_classes)
