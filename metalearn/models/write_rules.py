"""How a sequence of tokens rewrites a matrix and reads it, the same function token by token and chunk by chunk.

B sequences, H heads, T tokens, C tokens of a chunk, Q queries, E features of a key, V features of a value. Vectors are
rows: the state S (E, V) answers a query q (1, E) by q S. With λ = 1 where a rule has no decay, every rule is

    S_t = λ_t S_{t-1} + k_tᵀ u_t,  where u_t = v_t (sum rule) or u_t = β_t (v_t - k_t λ_t S_{t-1}) (delta rule).
"""

import importlib
import importlib.util
import math
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.base import require_choice

KERNELS = ("torch", "fla")


class Writes(NamedTuple):
    """What tokens do to the state: (B, H, T, E or V). Rates and log decays are (B, H, T, 1), and None where a rule has none."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    rates: Tensor | None = None
    log_decays: Tensor | None = None


def write_in_turn(writes: Writes, state_BHEV: Tensor, chunk_size: int, kernel: str = "torch") -> tuple[Tensor, Tensor]:
    """Answers (B, H, T, V), each after the write of its own token, and the state after all; ``chunk_size`` tokens at a time."""
    if kernel == "fla":
        return _write_in_turn_by_fla(writes, state_BHEV)
    outs, parts = [], [repeat(None) if part is None else part.split(chunk_size, dim=2) for part in writes]
    for chunk in zip(*parts, strict=False):
        out_BHCV, state_BHEV = _write_chunk(Writes(*chunk), state_BHEV)
        outs.append(out_BHCV)
    return torch.cat(outs, dim=2), state_BHEV


def _write_chunk(writes: Writes, state_BHEV: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of a chunk at once: with Λ_ts = λ_{s+1} … λ_t and Λ_t = λ_1 … λ_t, both rules are linear in the u's.

    S_t = Λ_t S_0 + Σ_{s≤t} Λ_ts k_sᵀu_s, so that the delta rule's u solve a triangular system,
    u_t + β_t Σ_{s<t} Λ_ts (k_t·k_s) u_s = β_t (v_t - Λ_t k_t S_0).

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3; with
    decays Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks", section 3. Differs from the papers: chunks are taken
    in turn, so that S_0 stands on the right-hand side and the factors of their WY form are not told apart.
    """
    q, k, u, rates, log_decays = writes
    since, between = _survival(log_decays, k)
    if rates is not None:
        # The solver takes the diagonal to be one.
        lower = rates * between * (k @ k.mT)
        missing = rates * (u - since * (k @ state_BHEV))
        u = torch.linalg.solve_triangular(lower, missing, upper=False, unitriangular=True)
    out = since * (q @ state_BHEV) + (between * (q @ k.mT)) @ u
    return out, since[..., -1:, :] * state_BHEV + (k * between[..., -1, :, None]).mT @ u


def _survival(log_decays: Tensor | None, like_BHTE: Tensor) -> tuple[Tensor, Tensor]:
    """What is left at token t (rows) of the state before the chunk, (…, T, 1), and of the write of token s (columns), (…, T, T)."""
    length = like_BHTE.shape[2]
    if log_decays is None:
        ones = like_BHTE.new_ones(length, length)
        return ones[:, :1], ones.tril()
    total = log_decays.cumsum(dim=2)
    later = torch.ones(length, length, dtype=torch.bool, device=like_BHTE.device).triu(1)
    return total.exp(), (total - total.mT).masked_fill(later, -math.inf).exp()


def write_apart(writes: Writes, state_BHEV: Tensor) -> Tensor:
    """Answers (B, H, Q, V) to tokens each of which is the next one after ``state_BHEV``, which is read once for all of them."""
    q, k, u, rates, log_decays = writes
    since = 1.0 if log_decays is None else log_decays.exp()
    if rates is not None:
        u = rates * (u - since * (k @ state_BHEV))
    return since * (q @ state_BHEV) + (q * k).sum(-1, keepdim=True) * u


def _write_in_turn_by_fla(writes: Writes, state_BHEV: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the Triton kernels of flash-linear-attention, which choose their chunks: tokens in bfloat16, S in float32."""
    ops = importlib.import_module("fla.ops")
    q, k, v = (part.transpose(1, 2).bfloat16().contiguous() for part in writes[:3])
    gates = [None if part is None else part[..., 0].transpose(1, 2).contiguous() for part in writes[3:]]
    options = dict(scale=1.0, initial_state=state_BHEV.contiguous(), output_final_state=True)
    if gates[0] is None:
        out, state_BHEV = ops.chunk_simple_gla(q, k, v, **options)
    elif gates[1] is None:
        out, state_BHEV = ops.chunk_delta_rule(q, k, v, beta=gates[0].bfloat16(), **options)
    else:
        out, state_BHEV = ops.chunk_gated_delta_rule(q, k, v, g=gates[1], beta=gates[0].bfloat16(), **options)
    return out.transpose(1, 2).to(writes.values.dtype), state_BHEV


def require_kernel(kernel: str) -> None:
    """Raise ``ValueError`` unless the kernel is known and can run here."""
    require_choice("kernel", kernel, KERNELS)
    if kernel == "fla" and importlib.util.find_spec("fla") is None:
        raise ValueError("kernel is 'fla', and flash-linear-attention is not installed; accepted here: 'torch'")
    if kernel == "fla" and not torch.cuda.is_available():
        raise ValueError("kernel is 'fla', and there is no CUDA device; accepted here: 'torch'")
