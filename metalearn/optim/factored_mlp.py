"""The small network of 39 features, most of them Adafactor's, in its folded form: the same function of 16.

Letters: P parameters of all tensors together, n of one tensor or of a piece of it; ``…`` leading axes, of tasks and of
particles. A 5 in a shape stands for the five axes that a tensor or a piece of it is seen with (``Planes``). Features and hidden
units lie before the parameters, (…, features, 5), so that what is done to one of them is done to numbers side by side.
"""

import functools
import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import Params, Tree, require_range, require_whole
from metalearn.optim import accumulators
from metalearn.optim.accumulators import AXES, FIRST, SECOND, Decays, Planes, learned_decay
from metalearn.optim.features import NORMALISER_EPS, TIME_SCALES, affine, time_features
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule, count

MOMENTUM_DECAYS, SQUARE_DECAYS, FACTORED_DECAYS = (0.9, 0.99, 0.999), (0.999,), (0.9, 0.99, 0.999)
# Where the published order has what: dense features, rows, columns, time.
DENSE = (slice(0, 13), slice(25, 28))
ROWS, COLUMNS = (slice(13, 16), slice(19, 22)), (slice(16, 19), slice(22, 25))
TIME = slice(28, 28 + len(TIME_SCALES))
NUM_DENSE, NUM_FEATURES = 16, TIME.stop
ROOT_EPS, FACTOR_EPS = 1e-6, 1e-8
PIECE = 2**21  # floats of a piece, features and hidden units together, per thread: what stays in a core's cache
_SPREAD = (..., *[None] * len(AXES))  # index that sets a value against five axes
UNROLLED = 8  # hidden units up to which a compiler is given sums instead of matrix products, which it cannot fuse


class Features(NamedTuple):
    """The 16 dense features of a piece, each (…, features, 5), in the published order."""

    gradient: Tensor
    parameter: Tensor
    momenta: Tensor
    square: Tensor
    scaled_momenta: Tensor
    inverse_root: Tensor  # of the mean square
    factored_gradient: Tensor
    factored_momenta: Tensor


class Own(NamedTuple):
    """What belongs to one tensor: gradients, parameters, momenta, mean squares, each (…, features, 5), rows and columns."""

    gradient: Tensor
    parameter: Tensor
    momenta: Tensor
    square: Tensor
    row: Tensor  # (…, decays, *row_shape)
    column: Tensor | None  # None where there are none: each row is then one entry


class FactoredRule(LearnedRule):
    """What rules of the 39 features have in common: features, network, learned decays.

    Features of an entry: gradient g, parameter p, 3 momenta m, mean square v, m / sqrt(v + 1e-6), 1 / sqrt(v + 1e-6), g and m by
    Adafactor's rates, the row's and the column's mean squares and their inverse roots, each divided by its root mean square
    ``sqrt(1e-5 + mean x^2)`` over the tensor; and 11 of time, ``tanh(t / s - 1)``. No mean is corrected for its start at 0.
    A network with ReLU sees those of one entry at a time.

    Its first layer is folded. A feature's normaliser goes into its column of the weights and time into the bias; rows and
    columns are multiplied by their weights before they are spread over the tensor. The 16 other features are made piece by
    piece, for their mean squares and again for the network; in one piece where a graph is kept, under a compiler and on a GPU.

    A tensor sees all of its own entries and nothing of others.
    """

    num_outputs: ClassVar[int]

    def __init__(self, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        require_range("the number of hidden_sizes", len(hidden_sizes), 1)
        for size in hidden_sizes:
            require_whole("a hidden size", size, 1)
        self.hidden_sizes = list(hidden_sizes)

    @abstractmethod
    def combine(self, outputs: Sequence[Tensor], features: Features) -> Tensor:
        """What is subtracted from parameters (…, 1, 5), from the network's outputs, each (…, 1, 5)."""

    def init_meta(self, key: Tensor) -> Params:
        meta = {}
        sizes = [NUM_FEATURES, *self.hidden_sizes, self.num_outputs]
        for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            meta[f"weight_{k}"] = random.truncated_normal(random.fold(key, k), (inputs, outputs)) / math.sqrt(inputs)
            meta[f"bias_{k}"] = torch.zeros(outputs, device=key.device)
        decays = {"momentum": MOMENTUM_DECAYS, "square": SQUARE_DECAYS, "factored": FACTORED_DECAYS}
        return meta | {f"{name}_decay": torch.zeros(len(own), device=key.device) for name, own in decays.items()}

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        zeros = accumulators.start(layout, params_P, len(MOMENTUM_DECAYS), len(FACTORED_DECAYS))
        return {"step": count(params_P), **zeros}

    def direction(
        self, meta: Params, layout: Layout, grads_P: Tensor, state: Tree, params_P: Tensor, loss: Tensor | None
    ) -> tuple[Tensor, Tree]:
        decays = Decays(
            learned_decay(MOMENTUM_DECAYS, meta["momentum_decay"]),
            learned_decay(SQUARE_DECAYS, meta["square_decay"]),
            learned_decay(FACTORED_DECAYS, meta["factored_decay"]),
        )
        later = accumulators.accumulate(decays, layout, grads_P, state)
        time = time_features(state["step"], TIME_SCALES, grads_P.dtype).unsqueeze(-2)
        bias = meta["bias_0"] + (time @ meta["weight_0"][..., TIME, :]).squeeze(-2)
        planes = [Planes.of(shape) for shape in layout.shapes]
        rows = later["row"].split([math.prod(plane.row_shape) for plane in planes], -1)
        columns = later["column"].split([math.prod(plane.column_shape) for plane in planes], -1)
        values = (grads_P.unsqueeze(-2), params_P.unsqueeze(-2), later["momentum"], later["square"].unsqueeze(-2))
        parts = zip(planes, *(layout.split(value) for value in values), rows, columns, strict=True)
        steps = [self._tensor(meta, bias, plane, _own(plane, *part)) for plane, *part in parts]
        return torch.cat(steps, -1), {"step": state["step"] + 1, **later}

    def _tensor(self, meta: Params, bias: Tensor, planes: Planes, own: Own) -> Tensor:
        """The step (…, n) of one tensor."""
        if not own.gradient.numel():
            return own.gradient.flatten(-6)
        axis, length = self._cut(planes, own.gradient)
        size, factored = planes.shape[axis], own.column is not None
        spread = _spread(meta["weight_0"], own)
        parts = [_split(x, axis, size, length) for x in (*own[:4], *_factors(planes, own), *(x for x, _ in spread))]
        pieces = list(zip(*parts, strict=True))
        whole = _features(*pieces[0][:6], factored=factored) if len(pieces) == 1 else None
        energies = [_energy(whole or _features(*piece[:6], factored=factored)) for piece in pieces]
        energy = torch.stack(energies).sum(0) / math.prod(planes.shape)
        first = _rows(meta["weight_0"], DENSE) * _normaliser(energy).unsqueeze(-1)
        later = [(meta[f"weight_{k}"], meta[f"bias_{k}"]) for k in range(1, len(self.hidden_sizes) + 1)]
        network = _sums if torch.compiler.is_compiling() and max(self.hidden_sizes) <= UNROLLED else _products
        steps = []
        for piece in pieces:
            features = whole or _features(*piece[:6], factored=factored)
            added = _answers(piece[6:], [weight for _, weight in spread], bias)
            steps.append(self.combine(network(first, added, later, features), features))
        return torch.cat(steps, axis).flatten(-6)

    def _cut(self, planes: Planes, like: Tensor) -> tuple[int, int]:
        """The axis along which a tensor is cut, and how long a piece is."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not like.is_cpu:
            return FIRST, planes.shape[FIRST]
        entries = PIECE * torch.get_num_threads() // (3 * NUM_DENSE + 4 * max(self.hidden_sizes))
        axis = FIRST if like.numel() // planes.shape[FIRST] <= entries else SECOND
        return axis, max(1, entries * planes.shape[axis] // like.numel())


class FactoredMLP(FactoredRule):
    """The step ``d exp(exp_mult m) step_mult`` of a network of 39 features with the outputs d and m for each entry.

    State: 4 floats per parameter, 3 for each row and each column.

    Args:
        hidden_sizes: units of each hidden layer, at least one layer, each >= 1.
        exp_mult: of the logarithm of a step's size, >= 0.
        step_mult: of a step, >= 0.

    Raises:
        ValueError: a value is out of range.

    Source: Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers", section 3.
    """

    num_outputs = 2

    def __init__(self, hidden_sizes: Sequence[int] = (4, 4), exp_mult: float = 1e-3, step_mult: float = 1e-3) -> None:
        super().__init__(hidden_sizes)
        require_range("step_mult", step_mult, 0.0)
        require_range("exp_mult", exp_mult, 0.0)
        self.exp_mult = exp_mult
        self.step_mult = step_mult

    def combine(self, outputs: Sequence[Tensor], features: Features) -> Tensor:
        direction, magnitude = outputs
        return direction * (magnitude * self.exp_mult).exp() * self.step_mult


# -- features ----------------------------------------------------------------------------------------------------------


def _own(
    planes: Planes, grads: Tensor, params: Tensor, momenta: Tensor, square: Tensor, row: Tensor, column: Tensor
) -> Own:
    """What belongs to a tensor, seen with five axes, from its pieces of flat vectors."""
    g, p, m, v = (x.unflatten(-1, planes.shape) for x in (grads, params, momenta, square))
    columns = None if planes.column_axis is None else column.unflatten(-1, planes.column_shape)
    return Own(g, p, m, v, row.unflatten(-1, planes.row_shape), columns)


def _factors(planes: Planes, own: Own) -> tuple[Tensor, Tensor]:
    """Rows' and columns' rates, whose product is an entry's; without columns the rates of g and of m, which differ."""
    if own.column is None:
        return accumulators.root_rate(own.row + accumulators.FLOOR), (own.row + ROOT_EPS).rsqrt()
    assert planes.column_axis is not None
    return accumulators.rates(own.row, own.column, planes.column_axis)


def _features(g: Tensor, p: Tensor, m: Tensor, v: Tensor, first: Tensor, second: Tensor, *, factored: bool) -> Features:
    root = (v + ROOT_EPS).rsqrt()
    if factored:
        first = second = first * second
    return Features(g, p, m, v, m * root, root, g * first, m * second)


def _energy(features: Features) -> Tensor:
    """The sum of squares of each feature over a piece: (…, 16)."""
    return torch.cat([x.square().sum(AXES) for x in features], -1)


def _normaliser(mean_square: Tensor) -> Tensor:
    return (mean_square + NORMALISER_EPS).rsqrt()


def _rows(weight: Tensor, which: Sequence[slice]) -> Tensor:
    """The weights (…, features, h) of some of the features."""
    return torch.cat([weight[..., one, :] for one in which], -2)


def _spread(weight: Tensor, own: Own) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns, to be spread over the tensor, each with the weights (…, 6, h) of what is made of them."""
    rows, columns = _rows(weight, ROWS), _rows(weight, COLUMNS)
    # Without columns each entry is a row and a column, so that the two have the same features.
    ways = [(own.row, rows + columns)] if own.column is None else [(own.row, rows), (own.column, columns)]
    scaled = []
    for squares, weights in ways:
        energy = squares.square().mean(AXES), (squares + FACTOR_EPS).reciprocal().mean(AXES)
        scaled.append((squares, weights * _normaliser(torch.cat(energy, -1)).unsqueeze(-1)))
    return scaled


def _answers(parts: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> list[Tensor]:
    """The first layer's answers (…, h, 5) to a piece's rows and columns, and its bias."""
    answers = []
    for squares, weight in zip(parts, weights, strict=True):
        features = torch.cat([squares, (squares + FACTOR_EPS).rsqrt()], -6).flatten(-5)
        answers.append((weight.mT @ features).unflatten(-1, squares.shape[-5:]))
    return [answers[0] + bias[_SPREAD], *answers[1:]]


def _split(x: Tensor, axis: int, size: int, length: int) -> Sequence[Tensor]:
    """Pieces along an axis; all of what is spread along it, for each of them."""
    return x.split(length, axis) if x.shape[axis] == size else [x] * -(-size // length)


# -- the network -------------------------------------------------------------------------------------------------------

Layers = Sequence[tuple[Tensor, Tensor]]  # weights (…, in, out) and biases (…, out) of all layers but the first


def _products(first: Tensor, added: Sequence[Tensor], later: Layers, features: Features) -> Sequence[Tensor]:
    """The outputs, each (…, 1, 5), by matrix products."""
    x, answer = torch.cat(features, -6), functools.reduce(torch.add, added)
    shape = x.shape[-5:]
    x = affine(first.mT, answer.flatten(-5), x.flatten(-5))
    for weight, bias in later:
        x = affine(weight.mT, bias.unsqueeze(-1), x.relu_())
    return x.unflatten(-1, shape).split(1, -6)


def _sums(first: Tensor, added: Sequence[Tensor], later: Layers, features: Features) -> Sequence[Tensor]:
    """The outputs, each (…, 1, 5), by sums over numbers, which a compiler makes one loop of."""
    xs = _weighted(first, [x for group in features for x in group.split(1, -6)])
    for answer in added:
        xs = [x + share for x, share in zip(xs, answer.split(1, -6), strict=True)]
    for weight, bias in later:
        biases = bias[_SPREAD].split(1, -6)
        xs = [x + b for x, b in zip(_weighted(weight, [x.relu() for x in xs]), biases, strict=True)]
    return xs


def _weighted(weight: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """``sum_i weight_ij x_i`` for each j, of x (…, 1, 5)."""
    columns = [column.squeeze(-1).unbind(-1) for column in weight.split(1, -1)]
    return [
        functools.reduce(torch.add, [w[_SPREAD].unsqueeze(-6) * x for w, x in zip(column, xs, strict=True)])
        for column in columns
    ]
