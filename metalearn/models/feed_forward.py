"""The control without a memory: whatever it gets right, it knew before the sequence began.

B sequences, T tokens, D features, Q queries, K classes, N width.
"""

import torch
from torch import Tensor, nn

from metalearn.base import Learner, State, require_range


class FeedForward(Learner):
    """A multilayer perceptron on one token at a time: it can memorise tasks, and can learn nothing in context.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features N of a hidden layer, at least 1 (the paper: 2 … 1024).
        depth: hidden layers, each followed by a ReLU, at least 1 (the authors' code: 2).

    Raises:
        ValueError: for sizes below 1.

    Source: Kirsch et al. 2022, figure 2 (a). Differs from the paper: a token also holds the label of the example before
    it, which says nothing about its own.
    """

    def __init__(self, num_inputs: int, num_outputs: int, width: int = 256, depth: int = 2):
        super().__init__()
        for name, value in dict(num_inputs=num_inputs, num_outputs=num_outputs, width=width, depth=depth).items():
            require_range(name, value, 1)
        self.num_inputs, self.num_outputs, self.width, self.depth = num_inputs, num_outputs, width, depth
        self.embed = nn.Linear(num_inputs, width)
        hidden = (layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU()))
        self.hidden = nn.Sequential(nn.ReLU(), *hidden)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(tokens_BTD)))

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return {}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        return self(tokens_BTD), {}

    def branch(self, tokens_BQD: Tensor, state: State) -> Tensor:
        return self(tokens_BQD)

    def state_size(self, length: int) -> int:
        """Nothing: 0 whatever the length."""
        return 0

    def flops_per_token(self, length: int) -> int:
        return 2 * self.width * (self.num_inputs + (self.depth - 1) * self.width + self.num_outputs)
