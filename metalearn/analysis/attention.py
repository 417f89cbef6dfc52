"""What the heads of a transformer attend to, and what its answers lose without one.

B sequences, T examples, S tokens, C tokens that carry a label, P positions that are asked, L layers, H heads, K classes
(1 in regression), W token width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor

from metalearn.base import Batch, Learner, require_choice, require_range
from metalearn.models.tokens import Tokens
from metalearn.models.transformer import Block, Transformer
from metalearn.training.in_context import answers, losses, scores

REPLACEMENTS = ("mean", "zero")
_WEIGHTS_AT_ONCE = 2**24  # attention weights in memory: 64 MiB in float32


@torch.no_grad()
def attention_scores(learner: Learner, tokens: Tokens, batch: Batch, num_last: int = 8) -> pd.DataFrame:
    """How much of its attention each head gives to which tokens, beside what it would give if it did not choose.

    With a[t, s] the attention weight of token t on token s, the kinds are

    - ``previous token``: the mean over t >= 1 of a[t, t-1]; baseline: uniform attention, the mean of 1 / (t + 1).
    - ``own token``: the mean over t >= 1 of a[t, t]; the same baseline.
    - ``label copy``: for the token q(j) at which example j is classified, the sum of a[q(j), c(i)] over earlier examples i < j
      with y_i = y_j, where c(i) is the token that carries y_i, so that copying from there is the right answer; the
      mean over the last positions j. Baseline: uniform attention over tokens 0 … q(j), which gives n / (q(j) + 1) to n such
      tokens. In formats "paper" and "shift" q(j) = j and c(i) = i + 1; in "interleaved" q(j) = 2j and c(i) = 2i + 1.
    - ``label choice``: as ``label copy``, but the baseline is the same head's attention to all labels, blind to which is
      right: n / j times the sum over i < j of a[q(j), c(i)]. A head that attends to labels at large scores
      in ``label copy``, and in ``label choice`` does not.

    The first two count every token, in "interleaved" those of labels, too. In regression the last two are left out.

    Args:
        learner: a Transformer.
        tokens: the format that it was trained with.
        batch: sequences of at least two examples.
        num_last: last positions of a sequence that the label kinds are a mean over, 1 … T - 1.

    Returns:
        Columns layer (from 1), head (from 0), kind, weight, baseline, excess (weight - baseline), standard_error (of the
        excess, over sequences) and sequences.

    Raises:
        ValueError: for a learner without attention, or ``num_last`` out of range.
    """
    transformer, positions = _require_transformer(learner), _last(batch, num_last)
    parts = max(
        1,
        -(
            -transformer.depth
            * transformer.heads
            * tokens.num_tokens(batch.y.shape[1]) ** 2
            * len(batch.y)
            // _WEIGHTS_AT_ONCE
        ),
    )
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for x_BTD, y_BT in zip(batch.x.chunk(parts), batch.y.chunk(parts), strict=True):
        a_BLHSS = transformer.attention(tokens.encode(x_BTD, y_BT))
        kinds = _positional(a_BLHSS)
        if tokens.num_classes > 1:
            kinds |= _label_kinds(a_BLHSS, y_BT, tokens, positions)
        for kind, pair in kinds.items():
            found.setdefault(kind, []).append(pair)
    rows = []
    for kind, pairs in found.items():
        weight_BLH, baseline_BLH = (torch.cat(column).double() for column in zip(*pairs, strict=True))
        excess_BLH, columns = weight_BLH - baseline_BLH, {"kind": kind, "sequences": len(weight_BLH)}
        for layer, head in _heads(transformer):
            of = (slice(None), layer - 1, head)
            values = {"weight": weight_BLH[of], "baseline": baseline_BLH[of], "excess": excess_BLH[of]}
            means = {name: float(value.mean()) for name, value in values.items()}
            rows.append(
                {"layer": layer, "head": head, **columns, **means, "standard_error": standard_error(excess_BLH[of])}
            )
    return pd.DataFrame(rows)


@torch.no_grad()
def head_ablation(
    learner: Learner, tokens: Tokens, batch: Batch, num_last: int = 8, replacement: str = "mean"
) -> pd.DataFrame:
    """What the answers at the last positions lose when the output of one head is taken away: its causal share of them.

    Args:
        learner: a Transformer.
        tokens: the format that it was trained with.
        batch: sequences; at least two; with "mean" they are also what the mean is over.
        num_last: last positions of a sequence that loss and accuracy are means over, 1 … T - 1.
        replacement: what stands in for the head's output: "mean", its own mean over the sequences at each token, which
            takes away only what it says of this sequence, or "zero", which takes away its constant share, too.

    Returns:
        Columns layer (from 1), head (from 0), replacement, loss (of the whole learner), loss_rise, loss_rise_error,
        in classification accuracy (of the whole learner), accuracy_drop, accuracy_drop_error, and sequences. Errors
        are standard errors of the paired differences over sequences.

    Raises:
        ValueError: for a learner without attention, fewer than two sequences, ``num_last`` out of range, or another replacement.
    """
    transformer, positions = _require_transformer(learner), _last(batch, num_last)
    require_range("sequences", len(batch.y), 2)
    require_choice("replacement", replacement, REPLACEMENTS)
    encoded_BSW = tokens.encode(*batch)

    def measure() -> dict[str, Tensor]:
        logits_BPK, y_BP = tokens.at_examples(transformer(encoded_BSW))[:, positions], batch.y[:, positions]
        measured = {"loss": losses(logits_BPK, y_BP).double().mean(1)}
        if tokens.num_classes > 1:
            measured["accuracy"] = scores(answers(logits_BPK), y_BP).double().mean(1)
        return measured

    whole, rows = measure(), []
    for layer, head in _heads(transformer):
        with _without(transformer.blocks[layer - 1], head, replacement):
            ablated = measure()
        row = {"layer": layer, "head": head, "replacement": replacement}
        for name, change, sign in (("loss", "loss_rise", 1), ("accuracy", "accuracy_drop", -1)):
            if name in whole:
                change_B = sign * (ablated[name] - whole[name])
                row |= {
                    name: float(whole[name].mean()),
                    change: float(change_B.mean()),
                    f"{change}_error": standard_error(change_B),
                }
        rows.append(row | {"sequences": len(batch.y)})
    return pd.DataFrame(rows)


def _require_transformer(learner: Learner) -> Transformer:
    if not isinstance(learner, Transformer):
        raise ValueError(
            f"learner is a {type(learner).__name__}, which has no attention heads; accepted: a Transformer"
        )
    return learner


def _last(batch: Batch, num_last: int) -> list[int]:
    length = batch.y.shape[1]
    require_range("num_last", num_last, 1, length - 1)
    return list(range(length - num_last, length))


def _heads(transformer: Transformer) -> list[tuple[int, int]]:
    """Layers, from 1, as layer 0 is what the tokens are embedded as, and heads, from 0."""
    return [(layer + 1, head) for layer in range(transformer.depth) for head in range(transformer.heads)]


def _positional(a_BLHSS: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and baseline, (B, L, H) each, of the kinds that ask how far away a token is."""
    uniform = 1 / torch.arange(2, a_BLHSS.shape[-1] + 1, device=a_BLHSS.device)
    baseline_BLH = uniform.mean().expand(a_BLHSS.shape[:3])
    diagonals = {"previous token": a_BLHSS.diagonal(-1, -2, -1), "own token": a_BLHSS.diagonal(0, -2, -1)[..., 1:]}
    return {kind: (weights.mean(-1), baseline_BLH) for kind, weights in diagonals.items()}


def _label_kinds(
    a_BLHSS: Tensor, y_BT: Tensor, tokens: Tokens, positions: list[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and baseline, (B, L, H) each, of the kinds that ask which label a token carries."""
    asked_P, given_C = torch.tensor(positions), torch.arange(y_BT.shape[1] - 1)
    every = 2 if tokens.format == "interleaved" else 1
    a_BLHPC = a_BLHSS[..., every * asked_P, :][..., every * given_C + 1]
    earlier_PC = (given_C < asked_P.unsqueeze(1)).to(y_BT.device)
    right_BPC = (y_BT[:, :-1].unsqueeze(1) == y_BT[:, asked_P].unsqueeze(2)) & earlier_PC
    count_BP, asked_P = right_BPC.sum(-1), asked_P.to(y_BT.device)
    weight_BLH = (a_BLHPC * right_BPC[:, None, None]).sum(-1).mean(-1)
    uniform_BP = count_BP / (every * asked_P + 1)
    blind_BLHP = (a_BLHPC * earlier_PC).sum(-1) * (count_BP / asked_P)[:, None, None]
    uniform_BLH = uniform_BP.mean(-1)[:, None, None].expand_as(weight_BLH)
    return {"label copy": (weight_BLH, uniform_BLH), "label choice": (weight_BLH, blind_BLHP.mean(-1))}


@contextmanager
def _without(block: torch.nn.Module, head: int, replacement: str) -> Iterator[None]:
    """Inside, what the head hands to the block's output projection is replaced."""
    assert isinstance(block, Block)
    width = block.project_out.in_features // block.heads
    columns = slice(head * width, (head + 1) * width)

    def replace(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
        heads_BSA = inputs[0].clone()
        heads_BSA[..., columns] = heads_BSA[..., columns].mean(0) if replacement == "mean" else 0
        return heads_BSA

    handle = block.project_out.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def standard_error(values_B: Tensor) -> float:
    """Standard error of the mean; not a number for one sequence."""
    return float(values_B.std() / len(values_B) ** 0.5) if len(values_B) > 1 else float("nan")
