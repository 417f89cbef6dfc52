"""A causal transformer whose step-by-step form is the same function as its parallel form.

B sequences, T tokens, Q queries, D width, A attention width (heads x head width), H heads, E head width, N cached
tokens, L layers.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from metalearn.base import Learner, State, require_choice, require_range

POSITIONS = ("rope", "sinusoidal", "learned", "none")


class Transformer(Learner):
    """Pre-norm transformer decoder: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)), a last LayerNorm and a linear head.

    Args:
        num_inputs: features of a token.
        num_outputs: classes K.
        width: features of the residual stream, at least 1 (the paper's model size N_M, 256).
        depth: layers L, at least 1.
        heads: attention heads H, at least 1.
        head_width: query, key and value features E per head, even under "rope". The attention width H·E is
            independent of ``width``, as in the paper, which keeps it at 8·32 while it sweeps N_M.
        mlp_ratio: hidden features of the MLP per feature of the residual stream, at least 1.
        positions: "sinusoidal" (added to the input, Vaswani et al. 2017), "rope" (rotations of queries and keys, Su
            et al. 2021), "learned" (a table of ``max_length`` rows) or "none".
        max_length: the longest sequence in tokens, for "learned" only.

    Raises:
        ValueError: for sizes out of range, an odd head width under "rope", or a sequence longer than the learned
        table.

    Source: Kirsch et al. 2022, "General-Purpose In-Context Learning by Meta-Learning Transformers", section 4; the
    position encoding is not stated there, hence the choice.
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
        positions: str = "sinusoidal",
        max_length: int = 1024,
    ):
        super().__init__()
        sizes = dict(num_inputs=num_inputs, num_outputs=num_outputs, width=width, depth=depth, heads=heads)
        for name, value in (sizes | dict(head_width=head_width, mlp_ratio=mlp_ratio, max_length=max_length)).items():
            require_range(name, value, 1)
        require_choice("positions", positions, POSITIONS)
        if positions == "rope" and head_width % 2:
            raise ValueError(f"head_width is {head_width}; accepted with positions='rope': an even number")
        self.num_inputs, self.num_outputs, self.width, self.depth, self.heads = (
            num_inputs,
            num_outputs,
            width,
            depth,
            heads,
        )
        self.head_width, self.mlp_ratio, self.positions, self.max_length = head_width, mlp_ratio, positions, max_length
        self.embed = nn.Linear(num_inputs, width)
        self.table = nn.Parameter(0.02 * torch.randn(max_length, width)) if positions == "learned" else None
        self.blocks = nn.ModuleList(Block(width, heads, head_width, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        x_BTD, rotation = self._embed(tokens_BTD, 0, tokens_BTD.shape[1])
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation)[0]
        return self.head(self.norm(x_BTD))

    def init_state(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> State:
        empty = torch.empty(num_sequences, self.depth, self.heads, 0, self.head_width, device=device, dtype=dtype)
        return {"keys": empty, "values": empty}

    def prefill(self, tokens_BTD: Tensor, state: State) -> tuple[Tensor, State]:
        x_BTD, rotation = self._embed(tokens_BTD, state["keys"].shape[3], tokens_BTD.shape[1])
        kept = []
        for layer, block in enumerate(self.blocks):
            x_BTD, *cache = block(x_BTD, rotation, (state["keys"][:, layer], state["values"][:, layer]))
            kept.append(cache)
        keys, values = (torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
        return self.head(self.norm(x_BTD)), {"keys": keys, "values": values}

    def branch(self, tokens_BQD: Tensor, state: State) -> Tensor:
        x_BQD, rotation = self._embed(tokens_BQD, state["keys"].shape[3], 1)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x_BQD = block.branch(x_BQD, rotation, state["keys"][:, layer], state["values"][:, layer])
        return self.head(self.norm(x_BQD))

    def attention(self, tokens_BTD: Tensor) -> Tensor:
        """Attention weights (B, L, H, T, T) of every head: row t is how token t shares its attention among tokens 0 … t."""
        x_BTD, rotation = self._embed(tokens_BTD, 0, tokens_BTD.shape[1])
        weights = []
        for block in self.blocks:
            assert isinstance(block, Block)
            weights.append(block.attention(x_BTD, rotation))
            x_BTD = block(x_BTD, rotation)[0]
        return torch.stack(weights, dim=1)

    def state_size(self, length: int) -> int:
        """Keys and values of every token: 2·L·H·E·length."""
        return 2 * self.depth * self.heads * self.head_width * length

    def flops_per_token(self, length: int) -> int:
        attention = self.heads * self.head_width
        per_layer = 4 * self.width * attention + 2 * self.mlp_ratio * self.width**2
        scores = attention * (length + 1)  # query·key and weight·value against (length + 1) / 2 tokens on average
        return 2 * (self.width * (self.num_inputs + self.num_outputs) + self.depth * (per_layer + scores))

    def _embed(self, tokens: Tensor, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """The residual stream of tokens at places ``first … first + count - 1``, and the rotation of queries and keys, if any."""
        x, places = self.embed(tokens), torch.arange(first, first + count, device=tokens.device)
        if self.positions == "rope":
            return x, rotation_of(places, self.head_width, x.dtype)
        if self.positions == "sinusoidal":
            return x + sinusoids(places, self.width, x.dtype), None
        if self.table is None:
            return x, None
        if first + count > self.max_length:
            raise ValueError(
                f"the sequence has {first + count} tokens; accepted: at most max_length = {self.max_length}"
            )
        return x + self.table[places], None


class Block(nn.Module):
    """One pre-norm layer: multi-head attention and a GELU MLP, each added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * heads * head_width)
        self.project_out = nn.Linear(heads * head_width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(
        self, x_BTD: Tensor, rotation: Tensor | None, cache: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New residual stream (B, T, D), and the keys and values (B, H, N + T, E) of all tokens so far."""
        q_BHTE, k_BHNE, v_BHNE = self._project(x_BTD, rotation)
        if cache is not None:
            k_BHNE, v_BHNE = (torch.cat(pair, dim=2) for pair in zip(cache, (k_BHNE, v_BHNE), strict=True))
        new, total = q_BHTE.shape[2], k_BHNE.shape[2]
        if new in (1, total):  # no mask needed, or the plain causal one, for which SDPA has its fastest kernels
            out_BHTE = functional.scaled_dot_product_attention(q_BHTE, k_BHNE, v_BHNE, is_causal=new > 1)
        else:
            visible = torch.ones(new, total, dtype=torch.bool, device=x_BTD.device).tril(total - new)
            out_BHTE = functional.scaled_dot_product_attention(q_BHTE, k_BHNE, v_BHNE, attn_mask=visible)
        return self._merge(x_BTD, out_BHTE), k_BHNE, v_BHNE

    def branch(self, x_BQD: Tensor, rotation: Tensor | None, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        """Each of Q tokens attends to the N cached ones and to itself, so the cache is read once for all of them."""
        q_BHQE, own_k_BHQE, own_v_BHQE = self._project(x_BQD, rotation)
        cached_BHQN = q_BHQE @ k_BHNE.transpose(-1, -2)
        own_BHQ1 = (q_BHQE * own_k_BHQE).sum(-1, keepdim=True)
        weights = torch.cat([cached_BHQN, own_BHQ1], dim=-1).div_(math.sqrt(q_BHQE.shape[-1])).softmax(dim=-1)
        return self._merge(x_BQD, weights[..., :-1] @ v_BHNE + weights[..., -1:] * own_v_BHQE)

    def attention(self, x_BTD: Tensor, rotation: Tensor | None) -> Tensor:
        """The weights (B, H, T, T) that ``forward`` gives values without a cache; SDPA computes them and keeps them to itself."""
        q_BHTE, k_BHTE, _ = self._project(x_BTD, rotation)
        scores_BHTT = q_BHTE @ k_BHTE.mT / math.sqrt(q_BHTE.shape[-1])
        future_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=x_BTD.device).triu(1)
        return scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(dim=-1)

    def _project(self, x_BTD: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.project_in(self.attention_norm(x_BTD)).unflatten(-1, (3, self.heads, -1))
        q_BHTE, k_BHTE, v_BHTE = qkv.permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q_BHTE, k_BHTE = rotate(q_BHTE, rotation), rotate(k_BHTE, rotation)
        return q_BHTE, k_BHTE, v_BHTE

    def _merge(self, x_BTD: Tensor, out_BHTE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.project_out(out_BHTE.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


def _angles(places: Tensor, pairs: int) -> Tensor:
    """place · 10000^(-i / pairs), (T, pairs), the frequencies of Vaswani et al. 2017."""
    frequencies = torch.exp(torch.arange(pairs, device=places.device) * (-math.log(10_000.0) / pairs))
    return places.unsqueeze(-1) * frequencies


def sinusoids(places: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of the angles: (T, width)."""
    angles = _angles(places, (width + 1) // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width].to(dtype)


def rotation_of(places: Tensor, head_width: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the rotary embedding: (2, T, head_width / 2)."""
    angles = _angles(places, head_width // 2)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x_BHTE: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + E/2}) by its angle."""
    cos, sin = rotation
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
