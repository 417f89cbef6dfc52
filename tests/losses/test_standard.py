import math

import pytest
import torch
from losses.conftest import assert_same_with_gradient
from torch import nn
from torch.nn import functional

from metalearn.losses.learned import load_loss
from metalearn.losses.standard import STANDARD

GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
INDEX = torch.tensor([0, 3, 1, 2, 1, -100])
Y = torch.rand(6, 4, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
def test_label_smoothing_matches_torch(reduction, weight, epsilon):
    ours = load_loss("label_smoothing", epsilon=epsilon, reduction=reduction, weight=weight)
    theirs = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=epsilon)
    assert_same_with_gradient(ours, theirs, Z, INDEX)
    assert_same_with_gradient(ours, theirs, Z, Y.softmax(1))


def test_label_smoothing_of_one_sigmoid_output_has_two_classes():
    def smoothed(z, y):
        return functional.binary_cross_entropy_with_logits(z, 0.8 * y + 0.1)

    ours = load_loss("label_smoothing", epsilon=0.2, output="sigmoid")
    assert_same_with_gradient(ours, smoothed, Z[:, 0], (Y[:, 0] > 0.5).double())


def test_regression_losses_match_torch():
    pairs = {"mse": nn.MSELoss(), "mae": nn.L1Loss()}
    for name, theirs in pairs.items():
        assert_same_with_gradient(load_loss(name, output="identity"), lambda a, b, of=theirs: 4 * of(a, b), Z, Y)
    for delta in (0.3, 1.0, 5.0):
        ours = load_loss("huber", output="identity", delta=delta, reduction="sum")
        assert_same_with_gradient(ours, nn.HuberLoss(reduction="sum", delta=delta), Z, Y)
        assert_same_with_gradient(ours, lambda a, b, d=delta: d * nn.SmoothL1Loss(reduction="sum", beta=d)(a, b), Z, Y)


def test_losses_of_probabilities_match_their_definitions():
    index = INDEX.clamp(min=0)
    p, y = Z.softmax(1), functional.one_hot(index, 4).double()
    wanted = {"brier": (p - y).square(), "mse": (p - y).square(), "mae": (p - y).abs()}
    for name, terms in wanted.items():
        torch.testing.assert_close(load_loss(name)(Z, index), terms.sum(1).mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_matches_its_definition_and_cross_entropy_at_0(gamma):
    kept = INDEX[:-1]

    def definition(z, target):
        p = z.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
        return ((1 - p) ** gamma * -p.log()).mean()

    assert_same_with_gradient(load_loss("focal", gamma=gamma), definition, Z[:-1], kept)

    def binary(z, target):
        p = torch.where(target > 0, z.sigmoid(), 1 - z.sigmoid())
        return ((1 - p) ** gamma * -p.log()).mean()

    assert_same_with_gradient(
        load_loss("focal", gamma=gamma, output="sigmoid"), binary, Z[:, 0], (Y[:, 0] > 0.5).double()
    )
    if gamma == 0:
        assert_same_with_gradient(load_loss("focal", gamma=gamma), nn.CrossEntropyLoss(), Z, INDEX)


@pytest.mark.parametrize("name", list(STANDARD))
def test_gradients_are_finite_far_out_and_twice_differentiable(name):
    extreme = torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0], [-90.0, 90.0, 1.0]], requires_grad=True)
    for options in ({}, {"gamma": 0.3} if name == "focal" else {}):
        loss = load_loss(name, **options)
        for target in (torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1])):
            assert torch.autograd.grad(loss(extreme, target), extreme)[0].isfinite().all()
        z = Z[:2].clone().requires_grad_()
        assert torch.autograd.gradgradcheck(lambda z, of=loss: of(z, INDEX[:2]), z)


@pytest.mark.parametrize("name", list(STANDARD))
def test_settings_survive_a_file(name, tmp_path):
    own = {"huber": {"delta": 0.7}, "focal": {"gamma": 1.5}, "label_smoothing": {"epsilon": 0.3}}.get(name, {})
    loss = load_loss(name, reduction="sum", weight=[1.0, 2.0, 3.0, 4.0], ignore_index=2, **own)
    loss.save(tmp_path / "loss.json")
    again = load_loss(tmp_path / "loss.json")
    assert type(again) is STANDARD[name] and again.to_json() == loss.to_json()
    assert again(Z, INDEX.clamp(min=0)) == loss(Z, INDEX.clamp(min=0))
    assert load_loss(tmp_path / "loss.json", reduction="mean").reduction == "mean"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("focal", {"gamma": -1}),
        ("focal", {"gamma": math.nan}),
        ("focal", {"gamma": "2"}),
        ("huber", {"delta": 0}),
        ("label_smoothing", {"epsilon": 1.1}),
        ("cross_entropy", {"output": "identity"}),
        ("brier", {"output": "identity"}),
    ],
)
def test_settings_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*; accepted: "):
        load_loss(name, **options)
