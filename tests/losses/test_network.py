import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from metalearn import random
from metalearn.losses.learned import load_loss
from metalearn.losses.network import NUM_WEIGHTS, NetworkLoss, smooth_leaky_relu


def _modules(loss: NetworkLoss) -> nn.Sequential:
    """The same network in torch's own modules."""
    inner, last = (nn.ReLU, nn.Softplus()) if loss.activation == "relu" else (lambda: nn.LeakyReLU(0.01), nn.Identity())
    layers = [nn.Linear(*sizes, bias=False) for sizes in ((2, 50), (50, 50), (50, 1))]
    nn.utils.vector_to_parameters(loss.weights.detach(), [layer.weight for layer in layers])
    return nn.Sequential(layers[0], inner(), layers[1], inner(), layers[2], last).double()


@pytest.mark.parametrize("activation", ["relu", "smooth_leaky_relu"])
def test_matches_torch_modules_with_gradients(activation):
    loss = NetworkLoss(trainable=True, activation=activation, reduction="none").double()
    z, target = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 3, 0])
    modules = _modules(loss)
    values = modules(torch.stack([z.softmax(1), functional.one_hot(target, 4).double()], -1)).squeeze(-1)
    if activation == "smooth_leaky_relu":
        values = 0.99 / 10 * torch.log(1 + torch.exp(10 * values)) + 0.01 * values
    wanted = values.sum(1)
    torch.testing.assert_close(loss(z, target), wanted)
    by_z = [torch.autograd.grad(value.sum(), z, retain_graph=True)[0] for value in (loss(z, target), wanted)]
    torch.testing.assert_close(*by_z)
    by_weights = torch.autograd.grad(loss(z, target).sum(), loss.weights)[0]
    by_layers = torch.autograd.grad(wanted.sum(), list(modules.parameters()))
    torch.testing.assert_close(by_weights, torch.cat([part.reshape(-1) for part in by_layers]))


def test_autocast_leaves_its_matrix_products_in_float32():
    loss, z, target = NetworkLoss(), torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(z, target)
    assert torch.equal(found, loss(z, target))


def test_new_weights_are_drawn_from_the_key_with_the_deviation_of_he():
    state = torch.get_rng_state()
    loss = NetworkLoss(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loss.weights, NetworkLoss(seed=1).weights) and not torch.equal(
        loss.weights, NetworkLoss().weights
    )
    many = torch.stack([NetworkLoss(seed=seed).weights.detach() for seed in range(100)])
    for part, inputs in zip(many.split([100, 2500, 50], 1), (2, 50, 50), strict=True):
        assert part.std().item() == pytest.approx(math.sqrt(2 / inputs), rel=0.03)
        assert abs(part.mean().item()) < 0.05
    loss.reset_parameters(random.key(7))
    again = NetworkLoss()
    again.reset_parameters(random.key(7))
    assert torch.equal(loss.weights, again.weights)


def test_smooth_leaky_relu_is_leaky_far_out_and_has_slopes_between():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    far = x.detach().abs() > 2
    torch.testing.assert_close(smooth_leaky_relu(x)[far], functional.leaky_relu(x, 0.01)[far], rtol=1e-6, atol=1e-8)
    slope = torch.autograd.grad(smooth_leaky_relu(x).sum(), x)[0]
    assert (slope >= 0.01).all() and (slope <= 1.0).all() and slope.diff().min() >= -1e-12


def test_weights_and_activation_survive_a_file(tmp_path):
    loss = NetworkLoss(activation="smooth_leaky_relu", seed=3, ignore_index=1)
    loss.save(tmp_path / "loss.json")
    again = load_loss(tmp_path / "loss.json")
    assert isinstance(again, NetworkLoss) and again.to_json() == loss.to_json()
    assert torch.equal(again.weights, loss.weights) and not again.weights.requires_grad


@pytest.mark.parametrize(
    "options", [{"weights": [0.0]}, {"weights": [math.inf] * NUM_WEIGHTS}, {"activation": "gelu"}, {"activation": []}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; accepted"):
        NetworkLoss(**options)
