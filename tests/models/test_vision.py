import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch.nn import functional

from metalearn import random, tree
from metalearn.models.vision import MLP, LeNet, SmallResNet
from metalearn.tasks.sources import ImageSource


@pytest.mark.parametrize("channels", [1, 3])
def test_matches_lenet_written_out(channels):
    model = LeNet(64 * channels, 10, image_channels=channels).double()
    x = random.normal(random.key(0), (5, 64 * channels)).double()
    p = dict(model.named_parameters())
    maps = x.reshape(5, channels, 8, 8)
    for layer in ("features.0", "features.3"):
        maps = functional.conv2d(maps, p[layer + ".weight"], p[layer + ".bias"], padding=2).tanh()
        maps = (maps[..., ::2, :] + maps[..., 1::2, :]) / 2
        maps = (maps[..., ::2] + maps[..., 1::2]) / 2
    hidden = maps.reshape(5, 16 * 2 * 2)
    for layer in ("head.0", "head.2"):
        hidden = (hidden @ p[layer + ".weight"].T + p[layer + ".bias"]).tanh()
    torch.testing.assert_close(model(x), hidden @ p["head.4.weight"].T + p["head.4.bias"], rtol=1e-12, atol=1e-12)


def group_norm(maps, groups, weight, bias):
    grouped = maps.reshape(len(maps), groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal.reshape(maps.shape) * weight[:, None, None] + bias[:, None, None]


def test_matches_resnet_written_out():
    model = SmallResNet(3 * 81, 4, image_channels=3, width=4, blocks=2, groups=2).double()
    p = {
        name: value.detach() + 0.1 * random.normal(random.key(2), tuple(value.shape))
        for name, value in model.named_parameters()
    }
    x = random.normal(random.key(0), (5, 3 * 81)).double()

    def layer(name, maps, stride=1):
        weight = p[f"{name}.0.weight"]
        maps = functional.conv2d(maps, weight, stride=stride, padding=weight.shape[-1] // 2)
        return group_norm(maps, 2, p[f"{name}.1.weight"], p[f"{name}.1.bias"])

    maps = layer("stem", x.reshape(5, 3, 9, 9)).relu()
    for block in range(6):
        name, halves = f"blocks.{block}", block in (2, 4)
        inside = layer(f"{name}.second", layer(f"{name}.first", maps, 1 + halves).relu())
        maps = (inside + (layer(f"{name}.past", maps, 2) if halves else maps)).relu()
    assert maps.shape == (5, 16, 3, 3)
    wanted = maps.mean((2, 3)) @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(tree.call(model, p, {}, x)[0], wanted, rtol=1e-12, atol=1e-12)


def test_a_colour_image_is_seen_as_the_source_has_it():
    """Red, green and blue planes one after the other: a kernel on the first channel sees the red plane alone."""
    pixels = np.zeros((9, 8, 8, 3), np.uint8)
    pixels[..., 0] = np.arange(9)[:, None, None]
    pixels[..., 1] = np.random.default_rng(0).integers(0, 9, (9, 8, 8))
    rows = Dataset.from_dict(
        {"image": list(pixels), "label": [0] * 9},
        features=Features({"image": Image(), "label": ClassLabel(names=["0"])}),
    )
    source = ImageSource(rows, test=0.0, validation=0.0, normalise="scalar")
    model = LeNet(192, 1, channels=(1, 1), widths=(1, 1), image_channels=3)
    weight = torch.zeros(1, 3, 5, 5)
    weight[0, 0, 2, 2] = 1
    model.features[0].load_state_dict({"weight": weight, "bias": torch.zeros(1)})
    maps = model.features[0](source.read("train").inputs.unflatten(-1, source.image_shape))
    assert torch.equal(maps.amin((1, 2, 3)), maps.amax((1, 2, 3))) and len(maps[:, 0, 0, 0].unique()) == 9
    assert torch.equal(model(source.read("train").inputs), model.head(model.features[1:](maps)))


@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_matches_layers_written_out(activation, function):
    model = MLP(4, 3, hidden=[6, 5], activation=activation)
    x = random.normal(random.key(0), (7, 4))
    a, b, c = (part for part in model if isinstance(part, torch.nn.Linear))
    assert torch.equal(model(x), c(function(b(function(a(x))))))


@pytest.mark.parametrize("model", [MLP(64, 10), LeNet(64, 10), SmallResNet(64, 10, width=4)])
def test_every_parameter_is_drawn_from_the_key(model):
    first, _ = tree.initialise(model, random.key(1))
    again, _ = tree.initialise(model, random.key(1))
    other, _ = tree.initialise(model, random.key(2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    norms = {id(p) for part in model.modules() if isinstance(part, torch.nn.GroupNorm) for p in part.parameters()}
    fixed = {name for name, p in model.named_parameters() if id(p) in norms}
    assert {name for name in first if torch.equal(first[name], other[name])} == fixed


@pytest.mark.parametrize("model", [LeNet(64, 10), SmallResNet(64, 10, width=4)])
def test_runs_of_a_batch_are_each_their_own(model):
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
        (lambda: LeNet(64, 10, image_channels=3), "num_inputs is 64"),
        (lambda: LeNet(64, 10, image_channels=0), "image_channels is 0"),
        (lambda: SmallResNet(64, 10, width=6), "width is 6"),
        (lambda: SmallResNet(64, 10, blocks=0), "blocks is 0"),
    ],
)
def test_refuses(build, named):
    with pytest.raises(ValueError, match=named):
        build()
