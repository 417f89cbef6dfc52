"""Learnable rules against the hand-made ones with the same hyper-parameters, in float64."""

import math

import pytest
import torch
from torch.func import grad

from metalearn.base import Params
from metalearn.optim.first_order import SGD, Adam
from metalearn.optim.layout import Layout
from metalearn.optim.learnable import LearnableAdam, LearnableMomentum, LearnableSGD

TWINS = {
    "sgd": (lambda lr, lost: LearnableSGD(lr), lambda lr, lost: SGD(lr), ["log_lr"]),
    "momentum": (
        lambda lr, lost: LearnableMomentum(lr, 1 - lost),
        lambda lr, lost: SGD(lr, 1 - lost),
        ["log_lr", "log_one_minus_momentum"],
    ),
    "adam": (
        lambda lr, lost: LearnableAdam(lr, 1 - lost, 1 - lost / 10, 1e-3),
        lambda lr, lost: Adam(lr, 1 - lost, 1 - lost / 10, 1e-3),
        ["log_lr", "log_one_minus_beta1", "log_one_minus_beta2", "log_eps"],
    ),
}


def start() -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (4, 3), "bias": (4,), "scale": ()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def loss_of(params: Params) -> torch.Tensor:
    return (params["scale"] * (params["weight"].sin().sum(1) + params["bias"]).tanh()).square().sum()


@pytest.mark.parametrize("lr, lost", [(0.02, 0.5), (0.1, 0.07)])
@pytest.mark.parametrize("name", TWINS)
def test_matches_the_hand_made_rule(name, lr, lost):
    learnable, hand_made, names = TWINS[name]
    values = dict(zip(names, (lr, lost, lost / 10, 1e-3), strict=False))
    meta = {weight: torch.tensor(math.log(value), dtype=torch.float64) for weight, value in values.items()}
    rule, twin = learnable(lr, lost), hand_made(lr, lost)
    torch.testing.assert_close(rule.weights, {name: value.float() for name, value in meta.items()})
    params = expected = start()
    state, twin_state = rule.init(meta, params), twin.init({}, expected)
    for _ in range(10):
        params, state = rule.update(meta, grad(loss_of)(params), state, params)
        expected, twin_state = twin.update({}, grad(loss_of)(expected), twin_state, expected)
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-13)


def test_first_gradient_of_zero_leaves_derivatives_finite():
    rule, layout = LearnableAdam(), Layout.of(start())
    meta = {name: value.double().requires_grad_() for name, value in rule.weights.items()}
    flat = layout.pack(start())
    direction, _ = rule.direction(meta, layout, 0 * flat, rule.start(meta, layout, flat), flat, None)
    found = torch.autograd.grad(direction.sum(), list(meta.values()))
    assert all(bool(value.isfinite()) for value in found)


@pytest.mark.parametrize(
    "wrong", [lambda: LearnableSGD(0.0), lambda: LearnableMomentum(0.1, 1.0), lambda: LearnableAdam(eps=0)]
)
def test_refuses_what_has_no_logarithm(wrong):
    with pytest.raises(ValueError, match="accepted"):
        wrong()
