"""Recurrent learners: what they know of the context fits into a state whose size does not grow.

B sequences, T tokens, D features, Q queries, N width, L layers.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from metalearn.base import Learner, State, require_range


class Recurrent(Learner):
    """A learner whose state is small enough to copy: alternative next tokens are steps from copies of it."""

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.prefill(tokens_BTD, self.init_state(len(tokens_BTD), tokens_BTD.device, tokens_BTD.dtype))[0]

    def branch(self, tokens_BQD: Tensor, state: State) -> Tensor:
        queries = tokens_BQD.shape[1]
        copies = {name: leaf.repeat_interleave(queries, dim=0) for name, leaf in state.items()}
        return self.step(tokens_BQD.flatten(0, 1), copies)[0].unflatten(0, (-1, queries))


class LSTM(Recurrent):
    """Long short-term memory with a linear head, the paper's black box without attention.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features N of hidden and cell state, at least 1 (the paper: 256).
        depth: stacked layers L, at least 1.

    Raises:
        ValueError: for sizes below 1.

    Source: Hochreiter and Schmidhuber 1997; as a baseline in Kirsch et al. 2022, table 2. Differs from the paper: tokens
    enter the cell as they are, where the authors' code has two ReLU layers of the same width before it.
    """

    can_be_stacked: ClassVar[bool] = False  # vmap has no rule for torch's fused recurrence

    def __init__(self, num_inputs: int, num_outputs: int, width: int = 256, depth: int = 1):
        super().__init__()
        _require_sizes(num_inputs=num_inputs, num_outputs=num_outputs, width=width, depth=depth)
        self.num_inputs, self.num_outputs, self.width, self.depth = num_inputs, num_outputs, width, depth
        self.lstm = nn.LSTM(num_inputs, width, depth, batch_first=True)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.head(self.lstm(tokens_BTD)[0])

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        zeros = torch.zeros(num_sequences, self.depth, self.width, device=device, dtype=dtype)
        return {"hidden": zeros, "cell": zeros}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        before = tuple(state[name].transpose(0, 1).contiguous() for name in ("hidden", "cell"))
        out_BTN, (hidden_LBN, cell_LBN) = self.lstm(tokens_BTD, before)
        return self.head(out_BTN), {"hidden": hidden_LBN.transpose(0, 1), "cell": cell_LBN.transpose(0, 1)}

    def state_size(self, length: int) -> int:
        """Hidden and cell state: 2·L·N whatever the length."""
        return 2 * self.depth * self.width

    def flops_per_token(self, length: int) -> int:
        return 2 * (4 * _products(self.num_inputs, self.width, self.depth) + self.width * self.num_outputs)


class GRU(Recurrent):
    """Gated recurrent unit with a linear head: half the LSTM's state, three quarters of its weights.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features N of the hidden state, at least 1.
        depth: stacked layers L, at least 1.

    Raises:
        ValueError: for sizes below 1.

    Source: Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", section 2.3, in torch's form: the
    reset gate acts on the recurrent product, bias included. Not among the baselines of Kirsch et al. 2022.
    """

    can_be_stacked: ClassVar[bool] = False  # vmap has no rule for torch's fused recurrence

    def __init__(self, num_inputs: int, num_outputs: int, width: int = 256, depth: int = 1):
        super().__init__()
        _require_sizes(num_inputs=num_inputs, num_outputs=num_outputs, width=width, depth=depth)
        self.num_inputs, self.num_outputs, self.width, self.depth = num_inputs, num_outputs, width, depth
        self.gru = nn.GRU(num_inputs, width, depth, batch_first=True)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.head(self.gru(tokens_BTD)[0])

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        return {"hidden": torch.zeros(num_sequences, self.depth, self.width, device=device, dtype=dtype)}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        out_BTN, hidden_LBN = self.gru(tokens_BTD, state["hidden"].transpose(0, 1).contiguous())
        return self.head(out_BTN), {"hidden": hidden_LBN.transpose(0, 1)}

    def state_size(self, length: int) -> int:
        """The hidden state: L·N whatever the length."""
        return self.depth * self.width

    def flops_per_token(self, length: int) -> int:
        return 2 * (3 * _products(self.num_inputs, self.width, self.depth) + self.width * self.num_outputs)


def _require_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        require_range(name, value, 1)


def _products(num_inputs: int, width: int, depth: int) -> int:
    """Multiply-adds of one gate over all layers: from what is below a layer, and from its own hidden state."""
    return width * (num_inputs + width + (depth - 1) * 2 * width)
