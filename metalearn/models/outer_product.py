"""An LSTM whose cell state is a matrix: state grows with the square of the width, parameters do not follow it.

B sequences, T tokens, D features, K classes, H heads, N width of a head, G = 8N: all that a head reads from a token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn.base import State, require_range
from metalearn.models.recurrent import Recurrent


class OuterProductLSTM(Recurrent):
    """LSTM with an NxN cell state per head that outer products gate and write, and an inner product reads.

    From z = W [x_t, h_{t-1}] + b each head takes the vectors a_i, a_g, a_f, b_i, b_g, b_f, q, o of N features each:
        I, G, F = s tanh(a) tanh(b)^T for (a_i, b_i), (a_g, b_g), (a_f, b_f), with s = softplus(scale), initially ln 2
        C_t = sigmoid(F + 1) * C_{t-1} + sigmoid(I) * G, entry by entry
        h_t = sigmoid(o) * tanh(C_t^T q)
    and the logits are a linear map of all heads' h_t. Every gate is thus a matrix of rank one before its sigmoid.

    Args:
        num_inputs: features D of a token.
        num_outputs: classes K.
        width: rows and columns N of a head's cell state, at least 1.
        heads: cell states H, at least 1.

    Raises:
        ValueError: for sizes below 1.

    Source: Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-Learning Transformers", the LSTM with outer
    products of the state-size study; equations as in the authors' code (learned_optimization, research/data_driven).
    Differs from the paper: tokens enter the cell as they are, where that code has two ReLU layers before it; weights are
    initialised as torch does.
    """

    def __init__(self, num_inputs: int, num_outputs: int, width: int = 32, heads: int = 1):
        super().__init__()
        for name, value in dict(num_inputs=num_inputs, num_outputs=num_outputs, width=width, heads=heads).items():
            require_range(name, value, 1)
        self.num_inputs, self.num_outputs, self.width, self.heads = num_inputs, num_outputs, width, heads
        self.embed = nn.Linear(num_inputs, 8 * heads * width)
        self.recur = nn.Linear(heads * width, 8 * heads * width, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(heads * width, num_outputs)

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        hidden_BHN = torch.zeros(num_sequences, self.heads, self.width, device=device, dtype=dtype)
        return {"hidden": hidden_BHN, "cell": hidden_BHN.unsqueeze(-1).repeat(1, 1, 1, self.width)}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        hidden_BHN, cell_BHNN, outputs = state["hidden"], state["cell"], []
        scale = functional.softplus(self.scale)
        for z_BZ in self.embed(tokens_BTD).unbind(1):
            z_BHG = (z_BZ + self.recur(hidden_BHN.flatten(1))).unflatten(-1, (self.heads, -1))
            hidden_BHN, cell_BHNN = self._update(z_BHG, scale, cell_BHNN)
            outputs.append(hidden_BHN.flatten(1))
        return self.head(torch.stack(outputs, dim=1)), {"hidden": hidden_BHN, "cell": cell_BHNN}

    def _update(self, z_BHG: Tensor, scale: Tensor, cell_BHNN: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden and cell state after a token."""
        width = self.width
        keys_BHG, query_BHN, out_BHN = z_BHG.split([6 * width, width, width], dim=-1)
        keys_BHG = keys_BHG.tanh()
        row_i, row_g, row_f = (keys_BHG[..., : 3 * width] * scale).unsqueeze(-1).split(width, dim=-2)
        column_i, column_g, column_f = keys_BHG[..., 3 * width :].unsqueeze(-2).split(width, dim=-1)
        kept_BHNN = (row_f * column_f + 1).sigmoid() * cell_BHNN
        cell_BHNN = torch.addcmul(kept_BHNN, (row_i * column_i).sigmoid(), row_g * column_g)
        read_BHN = (query_BHN.unsqueeze(-2) @ cell_BHNN).squeeze(-2)
        return out_BHN.sigmoid() * read_BHN.tanh(), cell_BHNN

    def state_size(self, length: int) -> int:
        """Cell and hidden states: H·(N² + N) whatever the length."""
        return self.heads * (self.width**2 + self.width)

    def flops_per_token(self, length: int) -> int:
        """Matrix products only, as in every learner; entry by entry a token costs some ten operations on H·N² floats more."""
        hidden = self.heads * self.width
        return 2 * hidden * (8 * (self.num_inputs + hidden) + self.width + self.num_outputs)
