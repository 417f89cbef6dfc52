"""Rows and columns, and what is made of them; the statistics themselves are held against numpy with the features."""

import math

import pytest
import torch

from metalearn.optim.accumulators import FIRST, SECOND, Decays, Planes, accumulate, learned_decay, rates, start
from metalearn.optim.layout import Layout


@pytest.mark.parametrize(
    ("shape", "seen", "row_shape", "column_shape"),
    [
        ((3, 5), (1, 3, 1, 5, 1), (1, 3, 1, 1, 1), (1, 1, 1, 5, 1)),
        ((5, 3), (1, 5, 1, 3, 1), (1, 1, 1, 3, 1), (1, 5, 1, 1, 1)),
        ((4, 4), (1, 4, 1, 4, 1), (1, 4, 1, 1, 1), (1, 1, 1, 4, 1)),
        ((2, 7, 3, 5, 4), (2, 7, 3, 5, 4), (2, 1, 3, 5, 4), (2, 7, 3, 1, 4)),
        ((6,), (1, 6, 1, 1, 1), (1, 6, 1, 1, 1), (0,)),
        ((), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), (0,)),
    ],
)
def test_rows_are_means_over_the_largest_dimension(shape, seen, row_shape, column_shape):
    planes = Planes.of(shape)
    assert (planes.shape, planes.row_shape, planes.column_shape) == (seen, row_shape, column_shape)


@pytest.mark.parametrize(("shape", "column_axis"), [((6, 8), FIRST), ((8, 6), SECOND)])
def test_rates_recover_squares_of_rank_one(shape, column_axis):
    """Where the squares are a product of rows and columns, their mean by rows and columns says all of them."""
    grads = torch.rand(shape[0], 1).double().add(0.1) * torch.rand(shape[1]).double().add(0.1)
    layout = Layout.of({"weight": grads})
    kept = torch.tensor([0.0], dtype=torch.float64)
    state = accumulate(Decays(kept, kept, kept), layout, grads.flatten(), start(layout, grads.flatten(), 1, 1))
    planes = Planes.of(shape)
    assert planes.column_axis == column_axis
    row, column = state["row"].unflatten(-1, planes.row_shape), state["column"].unflatten(-1, planes.column_shape)
    by_row, by_column = rates(row, column, column_axis)
    # The 1e-9 beside the mean of the rows is all that is left.
    torch.testing.assert_close(
        (by_row * by_column).reshape(shape) * grads, torch.ones(shape).double(), rtol=0, atol=1e-6
    )


def test_learned_decay_begins_at_its_start_and_moves_the_logarithm_of_its_rest():
    offset = torch.tensor([0.0, 0.1, -0.1], dtype=torch.float64, requires_grad=True)
    found = learned_decay([0.9, 0.99, 0.999], offset)
    expected = torch.tensor([0.9, 1 - 0.01 * math.e, 1 - 0.001 / math.e], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-13, atol=0)
    (slope,) = torch.autograd.grad(found.sum(), offset)
    torch.testing.assert_close(slope, -10 * (1 - expected), rtol=1e-12, atol=0)


def test_mean_squares_never_grow_past_their_gradients():
    """A learned decay may fall below 0; it counts as 0, but for momenta."""
    layout, grads = Layout.of({"bias": torch.zeros(2)}), torch.tensor([1.0, 3.0])
    kept = torch.tensor([-1.0])
    state = accumulate(Decays(kept, kept, kept), layout, grads, start(layout, grads, 1, 1))
    assert state["square"].tolist() == [1.0, 9.0] and state["row"].tolist() == [[1.0, 9.0]]
    assert state["momentum"].tolist() == [[2.0, 6.0]]
