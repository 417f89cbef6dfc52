"""Learners whose weights are the state of one small LSTM, repeated over a grid of inputs x outputs.

B sequences, T tokens, D features of a token, K classes, Q queries, I rows (inputs), J columns (outputs), N width of a
cell, M features of a message, R and C features of what enters a row and a column.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn.base import State, require_range
from metalearn.models.recurrent import Recurrent


class Messages(NamedTuple):
    """What the cells tell each other from one token to the next."""

    to_rows_BIM: Tensor  # backward, from outputs to inputs
    to_columns_BJM: Tensor  # forward, from inputs to outputs


class Grid(nn.Module):
    """IxJ copies of one LSTM cell. Rows and columns are sets: permuting what enters permutes what comes out.

    Cell (i, j) reads what enters row i and column j, the messages to both, and its own hidden state h_ij; after
    ``micro_ticks`` such steps the cells send W_b mean_j h_ij to row i and W_f mean_i h_ij to column j.
    """

    def __init__(self, row_size: int, column_size: int, width: int, message_size: int, micro_ticks: int):
        super().__init__()
        self.micro_ticks = micro_ticks
        self.sizes = (row_size + message_size, column_size + message_size, width)
        self.cell = nn.Linear(sum(self.sizes), 4 * width)
        self.backward_messenger = nn.Linear(width, message_size, bias=False)
        self.forward_messenger = nn.Linear(width, message_size, bias=False)
        for layer in (self.cell, self.backward_messenger, self.forward_messenger):
            spread = layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=spread, a=-2 * spread, b=2 * spread)
        with torch.no_grad():
            self.cell.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]).repeat_interleave(width))  # the forget gate's is 1

    def messages(self, hidden_BIJN: Tensor) -> Messages:
        return Messages(self.backward_messenger(hidden_BIJN.mean(2)), self.forward_messenger(hidden_BIJN.mean(1)))

    def forward(
        self, rows_BIR: Tensor, columns_BJC: Tensor, messages: Messages, hidden_BIJN: Tensor, cell_BIJN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden and cell states (B, I, J, N) after one token."""
        row_weight, column_weight, own_weight = self.cell.weight.split(self.sizes, dim=1)
        rows = functional.linear(torch.cat([rows_BIR, messages.to_rows_BIM], dim=-1), row_weight, self.cell.bias)
        columns = functional.linear(torch.cat([columns_BJC, messages.to_columns_BJM], dim=-1), column_weight)
        # Gates are kept apart: slices of one tensor of 4N features would take a third more time.
        parts = zip(rows.unsqueeze(2).chunk(4, dim=-1), columns.unsqueeze(1).chunk(4, dim=-1), strict=True)
        inputs, own_weights = [row + column for row, column in parts], own_weight.chunk(4)
        for _ in range(self.micro_ticks):
            gates = (x + functional.linear(hidden_BIJN, w) for x, w in zip(inputs, own_weights, strict=True))
            write, new, forget, read = gates
            cell_BIJN = torch.addcmul(forget.sigmoid() * cell_BIJN, write.sigmoid(), new.tanh())
            hidden_BIJN = read.sigmoid() * cell_BIJN.tanh()
        return hidden_BIJN, cell_BIJN

    def products(self, rows: int, columns: int) -> int:
        """Multiply-adds of one token on a grid of ``rows`` x ``columns`` cells."""
        row_size, column_size, width = self.sizes
        own = self.micro_ticks * rows * columns * width
        return 4 * width * (rows * row_size + columns * column_size + own) + width * (
            rows * self.backward_messenger.out_features + columns * self.forward_messenger.out_features
        )


class SelfModifying(Recurrent):
    """A grid of cells between a way of reading tokens and a way of answering. The state begins as zeros."""

    grid: Grid
    shape: tuple[int, int]  # rows and columns of the grid
    width: int

    @abstractmethod
    def read(self, token_BD: Tensor, messages: Messages) -> tuple[Tensor, Tensor]:
        """What enters rows (B, I, R) and columns (B, J, C)."""

    @abstractmethod
    def answer(self, messages: Messages) -> Tensor:
        """Logits (B, K) from what the cells say after a token."""

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        zeros = torch.zeros(num_sequences, *self.shape, self.width, device=device, dtype=dtype)
        return {"hidden": zeros, "cell": zeros}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        hidden_BIJN, cell_BIJN, logits = state["hidden"], state["cell"], []
        messages = self.grid.messages(hidden_BIJN)
        for token_BD in tokens_BTD.unbind(1):
            rows_BIR, columns_BJC = self.read(token_BD, messages)
            hidden_BIJN, cell_BIJN = self.grid(rows_BIR, columns_BJC, messages, hidden_BIJN, cell_BIJN)
            messages = self.grid.messages(hidden_BIJN)
            logits.append(self.answer(messages))
        return torch.stack(logits, dim=1), {"hidden": hidden_BIJN, "cell": cell_BIJN}

    def state_size(self, length: int) -> int:
        """Hidden and cell states of every cell: 2·I·J·N whatever the length. Messages are functions of these."""
        rows, columns = self.shape
        return 2 * rows * columns * self.width


class VSML(SelfModifying):
    """Variable shared meta-learning: one cell per input and class, every one of them with the same few weights.

    A token is features and label, (x, y), as all formats of ``Tokens`` have it. Feature x_i enters row i, the label's y_k
    column k and, with ``error_feedback``, also the gradient of the last prediction's loss, softmax(z)_k Σy - y_k (in
    regression z - y, also where no label is given). Logit z_k is the first feature of the message to column k, as
    bound · tanh(z / bound). All states are zero at first, so permuting inputs changes nothing, and permuting classes
    permutes the answers, exactly: what is meta-learned is how to learn, and cannot be about one input or class.

    Args:
        num_inputs: features of a token, of which all but the last ``num_outputs`` are the grid's rows.
        num_outputs: classes K, the grid's columns; 1 in regression.
        width: features N of a cell's hidden and cell state, at least 1.
        message_size: features M of a message, at least 1.
        micro_ticks: steps of every cell per token, at least 1.
        error_feedback: whether columns are also told the gradient of the last prediction's loss.
        bound: largest magnitude of a logit, above 0.

    Raises:
        ValueError: for sizes below 1, or a token that holds nothing but a label.

    Source: Kirsch and Schmidhuber 2021, "Meta Learning Backpropagation And Improving It", section 3, one layer; with
    messages among the cells themselves and without error feedback as in Kirsch et al. 2022, appendix, and its authors'
    code. Differs from 2022: messages have no bias, the bound (which is of 2021). Differs from 2021: no random half of the
    initial cell state, which would break the symmetry; gates are not shifted by ±5 but the forget gate by 1.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        width: int = 16,
        message_size: int = 8,
        micro_ticks: int = 2,
        error_feedback: bool = False,
        bound: float = 100.0,
    ):
        super().__init__()
        require_range("num_outputs", num_outputs, 1)
        require_range("num_inputs", num_inputs, num_outputs + 1)
        for name, value in dict(width=width, message_size=message_size, micro_ticks=micro_ticks).items():
            require_range(name, value, 1)
        if not bound > 0:
            raise ValueError(f"bound is {bound!r}; accepted: bound > 0")
        self.num_inputs, self.num_outputs, self.width = num_inputs, num_outputs, width
        self.message_size, self.micro_ticks, self.error_feedback = message_size, micro_ticks, error_feedback
        self.bound = bound
        self.shape = (num_inputs - num_outputs, num_outputs)
        self.grid = Grid(1, 2 if error_feedback else 1, width, message_size, micro_ticks)

    def read(self, token_BD: Tensor, messages: Messages) -> tuple[Tensor, Tensor]:
        x_BI, y_BK = token_BD.split(self.shape, dim=-1)
        enters = [y_BK]
        if self.error_feedback:
            z_BK = self.answer(messages)
            # A token without a label is no example, so that there is nothing to be wrong about.
            expected_BK = z_BK if self.num_outputs == 1 else z_BK.softmax(-1) * y_BK.sum(-1, keepdim=True)
            enters.append(expected_BK - y_BK)
        return x_BI.unsqueeze(-1), torch.stack(enters, dim=-1)

    def answer(self, messages: Messages) -> Tensor:
        return self.bound * (messages.to_columns_BJM[..., 0] / self.bound).tanh()

    def flops_per_token(self, length: int) -> int:
        return 2 * self.grid.products(*self.shape)


class VSMLWithoutSymmetries(SelfModifying):
    """A kxk grid of VSML cells between learned projections: as large a state, and no symmetry left.

    Features and label of a token are projected to ``row_size`` numbers for every row and ``column_size`` for every
    column; logits are a linear map of the messages to all columns.

    Args:
        num_inputs: features of a token, the last ``num_outputs`` of which are the label.
        num_outputs: classes K; 1 in regression.
        grid_size: rows and columns k of the grid, at least 1 (the paper: 1 … 24).
        width: features N of a cell's hidden and cell state, at least 1 (the paper: 64).
        message_size: features M of a message, at least 1.
        micro_ticks: steps of every cell per token, at least 1.
        row_size: numbers that enter a row, at least 1.
        column_size: numbers that enter a column, at least 1.

    Raises:
        ValueError: for sizes below 1, or a token that holds nothing but a label.

    Source: Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-Learning Transformers", the state-size study;
    sizes of projections and messages as in the authors' code. Differs from the paper: messages have no bias.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        grid_size: int = 8,
        width: int = 16,
        message_size: int = 8,
        micro_ticks: int = 2,
        row_size: int = 16,
        column_size: int = 4,
    ):
        super().__init__()
        require_range("num_outputs", num_outputs, 1)
        require_range("num_inputs", num_inputs, num_outputs + 1)
        sizes = dict(grid_size=grid_size, width=width, message_size=message_size, micro_ticks=micro_ticks)
        for name, value in dict(**sizes, row_size=row_size, column_size=column_size).items():
            require_range(name, value, 1)
        self.num_inputs, self.num_outputs, self.grid_size, self.width = num_inputs, num_outputs, grid_size, width
        self.message_size, self.micro_ticks = message_size, micro_ticks
        self.row_size, self.column_size = row_size, column_size
        self.shape = (grid_size, grid_size)
        self.embed = nn.ModuleDict(
            {
                "features": nn.Linear(num_inputs - num_outputs, grid_size * row_size),
                "label": nn.Linear(num_outputs, grid_size * column_size),
            }
        )
        self.grid = Grid(row_size, column_size, width, message_size, micro_ticks)
        self.head = nn.Linear(grid_size * message_size, num_outputs)

    def read(self, token_BD: Tensor, messages: Messages) -> tuple[Tensor, Tensor]:
        x_BI, y_BK = token_BD.split([self.num_inputs - self.num_outputs, self.num_outputs], dim=-1)
        rows, columns = self.embed["features"](x_BI), self.embed["label"](y_BK)
        return rows.unflatten(-1, (self.grid_size, -1)), columns.unflatten(-1, (self.grid_size, -1))

    def answer(self, messages: Messages) -> Tensor:
        return self.head(messages.to_columns_BJM.flatten(1))

    def flops_per_token(self, length: int) -> int:
        features = (self.num_inputs - self.num_outputs) * self.row_size
        labels = self.num_outputs * self.column_size
        ends = self.grid_size * (features + labels + self.message_size * self.num_outputs)
        return 2 * (ends + self.grid.products(*self.shape))
