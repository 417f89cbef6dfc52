import pytest
import torch
from torch.nn import functional

from metalearn import random, tree
from metalearn.models.vision import MLP, LeNet


def test_matches_lenet_written_out():
    model = LeNet(64, 10).double()
    x = random.normal(random.key(0), (5, 64)).double()
    p = dict(model.named_parameters())
    maps = x.reshape(5, 1, 8, 8)
    for layer in ("features.0", "features.3"):
        maps = functional.conv2d(maps, p[layer + ".weight"], p[layer + ".bias"], padding=2).tanh()
        maps = (maps[..., ::2, :] + maps[..., 1::2, :]) / 2
        maps = (maps[..., ::2] + maps[..., 1::2]) / 2
    hidden = maps.reshape(5, 16 * 2 * 2)
    for layer in ("head.0", "head.2"):
        hidden = (hidden @ p[layer + ".weight"].T + p[layer + ".bias"]).tanh()
    torch.testing.assert_close(model(x), hidden @ p["head.4.weight"].T + p["head.4.bias"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_matches_layers_written_out(activation, function):
    model = MLP(4, 3, hidden=[6, 5], activation=activation)
    x = random.normal(random.key(0), (7, 4))
    a, b, c = (part for part in model if isinstance(part, torch.nn.Linear))
    assert torch.equal(model(x), c(function(b(function(a(x))))))


@pytest.mark.parametrize("model", [MLP(64, 10), LeNet(64, 10)])
def test_every_parameter_is_drawn_from_the_key(model):
    first, _ = tree.initialise(model, random.key(1))
    again, _ = tree.initialise(model, random.key(1))
    other, _ = tree.initialise(model, random.key(2))
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)


def test_runs_of_a_batch_are_each_their_own():
    model = LeNet(64, 10)
    drawn = [tree.initialise(model, random.key(seed))[0] for seed in range(3)]
    x = random.normal(random.key(9), (2, 64))
    together = torch.vmap(lambda params: tree.call(model, params, {}, x)[0])(tree.stack(drawn))
    alone = torch.stack([tree.call(model, params, {}, x)[0] for params in drawn])
    torch.testing.assert_close(together, alone)


def test_has_dropout_only_where_asked():
    assert not any(isinstance(part, torch.nn.Dropout) for part in MLP(4, 2))
    assert sum(isinstance(part, torch.nn.Dropout) for part in MLP(4, 2, [3, 3], dropout=0.1)) == 2


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: MLP(4, 2, activation="sine"), "activation is 'sine'"),
        (lambda: MLP(4, 2, dropout=1.5), "dropout is 1.5"),
        (lambda: MLP(4, 2, hidden=[0]), "width is 0"),
        (lambda: LeNet(63, 10), "num_inputs is 63"),
        (lambda: LeNet(9, 10), "num_inputs is 9"),
        (lambda: LeNet(64, 0), "num_outputs is 0"),
    ],
)
def test_refuses(build, named):
    with pytest.raises(ValueError, match=named):
        build()
