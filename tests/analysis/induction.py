"""Weights set by hand: a two-layer transformer on tokens (x_j, y_{j-1}) that copies the label of an earlier equal input.

Head 0 of layer 1 attends to the previous token and writes its x beside the label y that the token carries; head 0 of layer 2
looks for that x and copies the label. The other heads have no weights: they attend to all tokens alike and say nothing.
"""

import torch
from scipy.linalg import hadamard
from torch import Tensor

from metalearn.base import Batch
from metalearn.models.transformer import Transformer

NUM_CLASSES, LENGTH = 4, 16
_HEADS, _HEAD_WIDTH, _SHARP = 2, 40, 100.0
_X, _Y, _PREVIOUS, _OUT, _PLACE = slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32), slice(32, 64)
# Rows but the first have mean 0 and variance 1, so that layer norm does no more than scale.
CODES = torch.from_numpy(hadamard(8)[1 : 1 + NUM_CLASSES]).double()
_PLACES = torch.from_numpy(hadamard(32)[1 : 1 + LENGTH]).double()


@torch.no_grad()
def induction() -> Transformer:
    sizes = dict(width=64, depth=2, heads=_HEADS, head_width=_HEAD_WIDTH, mlp_ratio=1, max_length=LENGTH)
    learner = Transformer(8 + NUM_CLASSES, NUM_CLASSES, positions="learned", **sizes).double().eval()
    for name, parameter in learner.named_parameters():
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    learner.embed.weight[_X, :8] = torch.eye(8).double()
    learner.embed.weight[_Y, 8:] = CODES.T
    assert learner.table is not None
    learner.table[:, _PLACE] = _PLACES

    first, second = learner.blocks
    query, key, value = _of_head_0(first.project_in.weight)
    query[:32, _PLACE] = _SHARP / 32 * _PLACES[:-1].T @ _PLACES[1:]
    key[:32, _PLACE] = torch.eye(32).double()
    value[:8, _X] = torch.eye(8).double()
    first.project_out.weight[_PREVIOUS, :8] = torch.eye(8).double()

    query, key, value = _of_head_0(second.project_in.weight)
    query[:8, _X] = _SHARP * torch.eye(8).double()
    key[:8, _PREVIOUS] = torch.eye(8).double()
    # The first token has no previous one and took its own x for it, but carries no label: a key that repels every query.
    _of_head_0(second.project_in.bias)[0][8] = _SHARP
    key[8, _PLACE] = -_SHARP * _PLACES[0] / 32
    value[:8, _Y] = torch.eye(8).double()
    second.project_out.weight[_OUT, :8] = torch.eye(8).double()
    learner.head.weight[:, _OUT] = CODES
    return learner


def _of_head_0(weights: Tensor) -> Tensor:
    return weights.unflatten(0, (3, _HEADS, _HEAD_WIDTH))[:, 0]


def balanced(sequences: int, seed: int = 0) -> Batch:
    """Every class once in every four examples, in random order; labels permuted anew in every sequence."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(sequences, LENGTH // NUM_CLASSES, NUM_CLASSES, generator=generator).argsort(-1).flatten(1)
    relabel = torch.rand(sequences, NUM_CLASSES, generator=generator).argsort(-1)
    return Batch(CODES[blocks], relabel.gather(1, blocks))
