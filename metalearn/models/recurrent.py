"""Recurrent learners: what they know of the context fits into a state whose size does not grow.

B sequences, T tokens, Q queries, N width, L layers.
"""

import torch
from torch import Tensor, nn

from metalearn.base import Learner, State, require_range


class LSTM(Learner):
    """Long short-term memory with a linear head, the paper's black box without attention.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features N of hidden and cell state, at least 1 (the paper: 256).
        depth: stacked layers L, at least 1.

    Raises:
        ValueError: for sizes below 1.

    Source: Hochreiter and Schmidhuber 1997; as a baseline in Kirsch et al. 2022, table 2.
    """

    def __init__(self, num_inputs: int, num_outputs: int, width: int = 256, depth: int = 1):
        super().__init__()
        for name, value in dict(num_inputs=num_inputs, num_outputs=num_outputs, width=width, depth=depth).items():
            require_range(name, value, 1)
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

    def branch(self, tokens_BQD: Tensor, state: State) -> Tensor:
        queries = tokens_BQD.shape[1]
        copies = {name: leaf.repeat_interleave(queries, dim=0) for name, leaf in state.items()}
        return self.step(tokens_BQD.flatten(0, 1), copies)[0].unflatten(0, (-1, queries))

    def state_size(self, length: int) -> int:
        """Hidden and cell state: 2·L·N whatever the length."""
        return 2 * self.depth * self.width

    def flops_per_token(self, length: int) -> int:
        gates = 4 * self.width * (self.num_inputs + self.width + (self.depth - 1) * 2 * self.width)
        return 2 * (gates + self.width * self.num_outputs)
