import math

import pytest
import torch
from torch.nn import functional

from metalearn.losses.learned import load_loss, loss_from_json
from metalearn.losses.taylor import TaylorLoss

WEIGHTS = [0.3, 0.6, -1.1, 0.7, 2.0, -0.4, 1.3, 0.9]


def test_matches_the_taylor_expansion_of_a_known_function():
    """The coefficients are the derivatives of f at the centre: of a cubic in (y, p), the expansion is exact."""

    def cubic(y, p):
        return 2 * p - 3 * p**2 + p**3 + 4 * y * p - y * p**2 + 0.5 * y**2 * p

    def slopes(f, order_y, order_p):
        y, p = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in WEIGHTS[:2])
        value = f(y, p)
        for variable in [y] * order_y + [p] * order_p:
            value = torch.autograd.grad(value, variable, create_graph=True, materialize_grads=True)[0]
        return value.item()

    orders = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
    weights = WEIGHTS[:2] + [-slopes(cubic, *order) for order in orders]
    loss = TaylorLoss(weights, output="identity", reduction="none").double()
    y, p = torch.rand(2, 9, 1, dtype=torch.float64)
    without_p = cubic(y, torch.tensor(WEIGHTS[1]))  # the terms that the loss leaves out
    torch.testing.assert_close(loss(p, y), (cubic(y, p) - without_p)[:, 0], rtol=1e-5, atol=1e-5)


def test_matches_the_formula_under_a_softmax_with_gradients_of_the_weights():
    loss = TaylorLoss(WEIGHTS, trainable=True).double()
    z, target = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1])
    t = torch.tensor(WEIGHTS, dtype=torch.float32).double().requires_grad_()
    u, v = functional.one_hot(target, 3) - t[0], z.softmax(1) - t[1]
    inner = t[2] * v + t[3] / 2 * v**2 + t[4] / 6 * v**3 + t[5] * u * v + t[6] / 2 * u * v**2 + t[7] / 2 * u**2 * v
    wanted = -inner.sum(1).mean()
    torch.testing.assert_close(loss(z, target), wanted)
    found = torch.autograd.grad(loss(z, target), loss.weights)[0]
    torch.testing.assert_close(found, torch.autograd.grad(wanted, t)[0])


def test_weights_survive_a_file_and_are_not_trained_unless_asked(tmp_path):
    loss = TaylorLoss(WEIGHTS, output="sigmoid")
    loss.save(tmp_path / "loss.json")
    again = load_loss(tmp_path / "loss.json")
    assert isinstance(again, TaylorLoss) and torch.equal(again.weights, loss.weights) and again.output == "sigmoid"
    assert not again.weights.requires_grad
    assert next(load_loss(tmp_path / "loss.json", trainable=True).parameters()).requires_grad
    assert TaylorLoss().weights.tolist() == [0.0] * 8


@pytest.mark.parametrize("weights", [[1.0] * 7, [1.0] * 7 + [math.nan], "11111111", [10**400] * 8, [None] * 8, None])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights is .*; accepted"):
        loss_from_json({"version": 1, "loss": "taylor", "weights": weights})
