"""Learners whose memory is a matrix per head that every token rewrites: fast weights, step by step or chunk by chunk.

B sequences, T tokens, Q queries, D width, H heads, E features of a key, V features of a value, L layers, W taps of a
convolution, P projected features (3·H·E), R rows kept for the convolution (W - 1). Vectors are rows: the state S (E, V)
answers a query q (1, E) by q S.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial, reduce
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn.base import Learner, State, require_range
from metalearn.models.transformer import Block
from metalearn.models.write_rules import Writes, require_kernel, write_apart, write_in_turn

_SMALL = 1e-6  # keeps denominators from zero


class _FastWeightBlock(Block, ABC):
    """A transformer's layer with a state in place of attention; subclasses say what a token writes and what is made of answers."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        mlp_ratio: int,
        convolution: int,
        chunk_size: int,
        kernel: str,
    ):
        super().__init__(width, heads, head_width, mlp_ratio)
        self.chunk_size, self.kernel = chunk_size, kernel
        bound = 1 / math.sqrt(convolution)  # as torch draws convolutions of one input channel
        taps = torch.empty(convolution, 3 * heads * head_width).uniform_(-bound, bound)
        self.taps = nn.Parameter(taps) if convolution > 1 else None

    def forward(self, x_BTD: Tensor, state_BHEV: Tensor, recent_BRP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New residual stream (B, T, D), and the state and the rows kept after the last token."""
        normed_BTD = self.attention_norm(x_BTD)
        rows, length = torch.cat([recent_BRP, self.project_in(normed_BTD)], dim=1), x_BTD.shape[1]
        windows = [rows[:, first : first + length] for first in range(recent_BRP.shape[1] + 1)]
        writes = self._writes(self._filter(windows), normed_BTD)
        with torch.autocast(x_BTD.device.type, enabled=False):  # sums over a sequence are not for bfloat16
            start = state_BHEV.to(writes.keys.dtype)
            out, end = write_in_turn(writes, start, self.chunk_size, self.kernel)
        x_BTD = self._merge(x_BTD, self._answer(out).to(x_BTD.dtype))
        return x_BTD, end.to(state_BHEV.dtype), rows[:, length:].to(recent_BRP.dtype)

    def branch(self, x_BQD: Tensor, state_BHEV: Tensor, recent_BRP: Tensor) -> Tensor:
        """Each of Q tokens as the next one after the same state."""
        normed_BQD = self.attention_norm(x_BQD)
        windows = [recent_BRP[:, row : row + 1] for row in range(recent_BRP.shape[1])]
        writes = self._writes(self._filter([*windows, self.project_in(normed_BQD)]), normed_BQD)
        with torch.autocast(x_BQD.device.type, enabled=False):
            out = write_apart(writes, state_BHEV.to(writes.keys.dtype))
        return self._merge(x_BQD, self._answer(out).to(x_BQD.dtype))

    def _filter(self, windows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, E), in float32 at least, from the projections of W - 1, …, 0 tokens ago."""
        projected = windows[0] if self.taps is None else reduce(torch.add, map(torch.mul, self.taps, windows))
        q, k, v = _wide(projected).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @abstractmethod
    def _writes(self, projected: tuple[Tensor, Tensor, Tensor], normed_BTD: Tensor) -> Writes:
        """What tokens write, from projected queries, keys and values and from the block's normalised input."""

    @abstractmethod
    def _answer(self, out_BHTV: Tensor) -> Tensor:
        """What is passed on of what queries got: (B, H, T, E)."""


class _LinearBlock(_FastWeightBlock):
    def __init__(self, normalise: bool, *sizes):
        super().__init__(*sizes)
        self.normalise = normalise

    def _writes(self, projected: tuple[Tensor, Tensor, Tensor], normed_BTD: Tensor) -> Writes:
        q, k, v = projected
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        if self.normalise:
            return Writes(q, k, torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
        return Writes(q / (q.sum(-1, keepdim=True) + _SMALL), k / (k.sum(-1, keepdim=True) + _SMALL), v)

    def _answer(self, out_BHTV: Tensor) -> Tensor:
        return out_BHTV[..., :-1] / (out_BHTV[..., -1:] + _SMALL) if self.normalise else out_BHTV


class _DeltaBlock(_FastWeightBlock):
    def __init__(self, width: int, heads: int, *sizes):
        super().__init__(width, heads, *sizes)
        self.rate = nn.Linear(width, heads)

    def _writes(self, projected: tuple[Tensor, Tensor, Tensor], normed_BTD: Tensor) -> Writes:
        q, k, v = (functional.silu(part) for part in projected)
        rates = _per_head(self.rate(normed_BTD)).sigmoid()
        return Writes(functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), v, rates)

    def _answer(self, out_BHTV: Tensor) -> Tensor:
        return functional.rms_norm(out_BHTV, out_BHTV.shape[-1:], eps=1e-5)


class _GatedDeltaBlock(_DeltaBlock):
    def __init__(self, width: int, heads: int, *sizes):
        super().__init__(width, heads, *sizes)
        self.decay = nn.Linear(width, heads)
        self.log_scale = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        pace = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.decay.bias.data.copy_(pace.expm1().log())  # so that softplus(bias) is the pace

    def _writes(self, projected: tuple[Tensor, Tensor, Tensor], normed_BTD: Tensor) -> Writes:
        paces = functional.softplus(_per_head(self.decay(normed_BTD)))
        scales = _wide(self.log_scale).exp().unsqueeze(-1).unsqueeze(-1)
        return super()._writes(projected, normed_BTD)._replace(log_decays=-scales * paces)


def _wide(x: Tensor) -> Tensor:
    """Float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_head(gates_BTH: Tensor) -> Tensor:
    """(B, H, T, 1), in float32 at least."""
    return _wide(gates_BTH).transpose(1, 2).unsqueeze(-1)


class _FastWeights(Learner):
    """Pre-norm blocks x + FastWeights(LayerNorm(x)), then x + MLP(LayerNorm(x)), a last LayerNorm and a linear head."""

    def __init__(
        self,
        block: Callable[..., _FastWeightBlock],
        num_inputs: int,
        num_outputs: int,
        width: int,
        depth: int,
        heads: int,
        head_width: int,
        mlp_ratio: int,
        convolution: int,
        chunk_size: int,
        kernel: str,
    ):
        super().__init__()
        sizes = dict(num_inputs=num_inputs, num_outputs=num_outputs, width=width, depth=depth, heads=heads)
        sizes |= dict(head_width=head_width, mlp_ratio=mlp_ratio, convolution=convolution, chunk_size=chunk_size)
        for name, value in sizes.items():
            require_range(name, value, 1)
        require_kernel(kernel)
        self.num_inputs, self.num_outputs, self.width, self.depth = num_inputs, num_outputs, width, depth
        self.heads, self.head_width, self.mlp_ratio = heads, head_width, mlp_ratio
        self.convolution, self.chunk_size, self.kernel = convolution, chunk_size, kernel
        self.embed = nn.Linear(num_inputs, width)
        per_block = (width, heads, head_width, mlp_ratio, convolution, chunk_size, kernel)
        self.blocks = nn.ModuleList(block(*per_block) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    @property
    def value_width(self) -> int:
        """Features V of a value as the state keeps it."""
        return self.head_width

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return self.prefill(tokens_BTD, self.init_state(len(tokens_BTD), tokens_BTD.device, tokens_BTD.dtype))[0]

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        fast = (num_sequences, self.depth, self.heads, self.head_width, self.value_width)
        recent = (num_sequences, self.depth, self.convolution - 1, 3 * self.heads * self.head_width)
        return {name: torch.zeros(s, device=device, dtype=dtype) for name, s in dict(fast=fast, recent=recent).items()}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        x_BTD, kept = self.embed(tokens_BTD), []
        for layer, block in enumerate(self.blocks):
            x_BTD, *after = block(x_BTD, state["fast"][:, layer], state["recent"][:, layer])
            kept.append(after)
        fast, recent = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
        return self.head(self.norm(x_BTD)), {"fast": fast, "recent": recent}

    def branch(self, tokens_BQD: Tensor, state: State) -> Tensor:
        x_BQD = self.embed(tokens_BQD)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, _FastWeightBlock)
            x_BQD = block.branch(x_BQD, state["fast"][:, layer], state["recent"][:, layer])
        return self.head(self.norm(x_BQD))

    def state_size(self, length: int) -> int:
        """Matrices and rows kept for the convolution: L·H·E·(V + 3·(W - 1)), whatever the length."""
        return self.depth * self.heads * self.head_width * (self.value_width + 3 * (self.convolution - 1))

    def flops_per_token(self, length: int) -> int:
        """Of the chunked form in torch, as ``forward`` runs it; of what is triangular in a chunk, the triangle.

        Step by step a token costs ``flops_per_token(1)``.
        """
        chunks, rest = divmod(length, self.chunk_size)
        mean_chunk = (chunks * self.chunk_size**2 + rest**2) / length  # the mean over tokens, not over chunks
        attention = self.heads * self.head_width
        taps = 3 * attention * self.convolution if self.convolution > 1 else 0
        per_layer = 4 * self.width * attention + 2 * self.mlp_ratio * self.width**2 + taps
        rule = self.heads * self._products(mean_chunk)
        return round(2 * (self.width * (self.num_inputs + self.num_outputs) + self.depth * (per_layer + rule)))

    @abstractmethod
    def _products(self, mean_chunk: float) -> float:
        """Multiply-adds of a token in one head of one layer, gates included, where chunks have ``mean_chunk`` tokens."""


class LinearAttention(_FastWeights):
    """Linear attention: every token adds an outer product to the state, and nothing is ever taken back.

    S_t = S_{t-1} + φ(k_t)ᵀ v_t with φ(x) = elu(x) + 1. Normalised, a query gets the average of values
    φ(q_t) S_t / Σ_{s≤t} φ(q_t)·φ(k_s), whose denominator is one more column of the state; otherwise it gets φ(q_t) S_t, and
    φ also divides by its own sum.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features of the residual stream, at least 1.
        depth: layers L, at least 1.
        heads: heads H, at least 1, each with a state of its own.
        head_width: query, key and value features E per head, at least 1.
        mlp_ratio: hidden features of the MLP per feature of the residual stream, at least 1.
        convolution: taps W of a causal convolution of each feature of queries, keys and values, at least 1, which is
            none. With 2 a token can write what it holds under the key of the token before.
        chunk_size: tokens that are written at once, at least 1. Memory is linear in T and in this; results do not
            depend on it.
        kernel: "torch", or "fla": the Triton kernels of flash-linear-attention, in bfloat16 and in chunks of their own,
            on CUDA only and not under ``torch.func.vmap``.
        normalise: whether the answer is an average.

    Raises:
        ValueError: for sizes out of range, and for "fla" without CUDA or without the package.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    section 3; not normalised: Schlag, Irie and Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight
    Programmers", section 4, their sum rule with sum normalisation.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 8,
        head_width: int = 32,
        mlp_ratio: int = 4,
        convolution: int = 1,
        chunk_size: int = 32,
        kernel: str = "torch",
        normalise: bool = True,
    ):
        per_block = (width, depth, heads, head_width, mlp_ratio, convolution, chunk_size, kernel)
        super().__init__(partial(_LinearBlock, normalise), num_inputs, num_outputs, *per_block)
        self.normalise = normalise

    @property
    def value_width(self) -> int:
        """Features V of a value as the state keeps it: E and, where normalised, a one."""
        return self.head_width + self.normalise

    def _products(self, mean_chunk: float) -> float:
        keys, values = self.head_width, self.value_width
        return 2 * keys * values + (keys + values) * (mean_chunk + 1) / 2


class DeltaNet(_FastWeights):
    """Fast weights under the delta rule: a token replaces what its key pointed at, so that old values can be overwritten.

    S_t = (I - β_t k_tᵀk_t) S_{t-1} + β_t k_tᵀ v_t: one step of gradient descent with rate β_t on ½ |k_t S - v_t|². A query gets
    q_t S_t divided by its root mean square. β = sigmoid(Linear(LayerNorm(x))), one per head; queries, keys and values
    pass SiLU, and queries and keys then have length 1.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features of the residual stream, at least 1.
        depth: layers L, at least 1.
        heads: heads H, at least 1, each with a state of its own.
        head_width: query, key and value features E per head, at least 1.
        mlp_ratio: hidden features of the MLP per feature of the residual stream, at least 1.
        convolution: taps W of a causal convolution of each feature of queries, keys and values, at least 1, which is
            none. With 2 a token can write what it holds under the key of the token before.
        chunk_size: tokens that are written at once, at least 1. Memory is linear in T and in this; results do not
            depend on it.
        kernel: "torch", or "fla": the Triton kernels of flash-linear-attention, in bfloat16 and in chunks of their own,
            on CUDA only and not under ``torch.func.vmap``.

    Raises:
        ValueError: for sizes out of range, and for "fla" without CUDA or without the package.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3; the
    rule is Schlag, Irie and Schmidhuber's (2021).

    Differs from the paper: LayerNorm and a GELU MLP as in ``Transformer``; no convolution unless asked for; the norm of
    answers has no gain, since a projection follows.
    """

    _block: ClassVar[type[_DeltaBlock]] = _DeltaBlock

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 8,
        head_width: int = 32,
        mlp_ratio: int = 4,
        convolution: int = 1,
        chunk_size: int = 32,
        kernel: str = "torch",
    ):
        per_block = (width, depth, heads, head_width, mlp_ratio, convolution, chunk_size, kernel)
        super().__init__(self._block, num_inputs, num_outputs, *per_block)

    def _products(self, mean_chunk: float) -> float:
        # The state is read twice and written once. Products with queries reach the diagonal, those of the solve do not.
        return 3 * self.head_width**2 + 2 * self.head_width * mean_chunk + self.width


class GatedDeltaNet(DeltaNet):
    """DeltaNet that can also forget everything at once: the state decays by λ_t before the token corrects it.

    S_t = (I - β_t k_tᵀk_t) λ_t S_{t-1} + β_t k_tᵀ v_t, log λ_t = -exp(a) softplus(Linear(LayerNorm(x))), one per
    head. Decays over a chunk are sums of logarithms, of which only differences ≤ 0 are exponentiated. Arguments are
    ``DeltaNet``'s.

    Source: Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", section 3. As there
    and in Mamba-2, exp(a) begins uniform in [1, 16] and softplus of the bias log-uniform in [0.001, 0.1].

    Differs from the paper: as ``DeltaNet`` does; values are as wide as keys and answers pass no gate, so that λ is all
    that tells the two apart.
    """

    _block = _GatedDeltaBlock

    def _products(self, mean_chunk: float) -> float:
        return super()._products(mean_chunk) + self.width
