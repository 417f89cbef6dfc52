"""What every learned rule owes to whoever calls it; all in float64."""

import json

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from metalearn import random, tree
from metalearn.base import Params, Tree
from metalearn.optim.dynamic_mode import DynamicModeLSTM
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.hyper import NNAdam
from metalearn.optim.layout import Layout
from metalearn.optim.learnable import LearnableAdam, LearnableMomentum, LearnableSGD
from metalearn.optim.learned import LearnedRule
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.mlp import MLPRule
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.star import STAR

RULES = {
    "sgd": LearnableSGD(),
    "momentum": LearnableMomentum(),
    "adam": LearnableAdam(),
    "mlp": MLPRule(hidden_sizes=[6, 5]),
    "one layer": MLPRule(hidden_sizes=[4], exp_mult=0.1),
    "small mlp": SmallMLP(),
    "hyper": NNAdam(hidden=4, output_scale=0.5, recall=0.1),
    "factored": FactoredMLP(),
    "star": STAR(),
    "lstm": CoordinateLSTM([5, 4]),
    "dynamic modes": DynamicModeLSTM([5, 4], window=3, rank=2),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
SHAPES = {"scalar": (), "bias": (3,), "matrix": (4, 3), "kernel": (2, 3, 2, 2)}
LAYOUT = Layout.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
LEADING, STEPS = (2, 3), 5
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def drawn(label: str, *shape: int) -> Tensor:
    return random.normal(random.key(5, label), shape).double()


def weights_of(rule: LearnedRule, *leading: int) -> Params:
    """Weights of any leading axes away from the initial ones, of which some are 0."""
    return {name: value.double() + 0.1 * drawn(name, *leading, *value.shape) for name, value in rule.weights.items()}


def runs(
    rule: LearnedRule, meta: Params, params_P: Tensor, targets_P: Tensor, layout: Layout = LAYOUT
) -> tuple[Tensor, Tree]:
    """Parameters and state after a few steps towards targets; any leading axes."""
    state = rule.start(meta, layout, params_P)
    for _ in range(STEPS):
        grads_P = params_P - targets_P
        direction_P, state = rule.direction(meta, layout, grads_P, state, params_P, grads_P.square().mean(-1))
        params_P = params_P - direction_P
    return params_P, state


@every_rule
def test_leading_axes_match_vmap_and_loops(rule):
    size = sum(LAYOUT.sizes)
    meta, params, targets = (
        weights_of(rule, *LEADING),
        drawn("params", *LEADING, size),
        drawn("targets", *LEADING, size),
    )
    by_hand = runs(rule, meta, params, targets)

    def single(meta: Params, params: Tensor, targets: Tensor) -> tuple[Tensor, Tree]:
        return runs(rule, meta, params, targets)

    rows = [[single(*tree.index((meta, params, targets), (i, j))) for j in range(3)] for i in range(2)]
    looped = tree.stack([tree.stack(row) for row in rows])
    torch.testing.assert_close(by_hand, looped, **CLOSE)
    torch.testing.assert_close(vmap(vmap(single))(meta, params, targets), looped, **CLOSE)
    assert (looped[0][0, 0] - looped[0][1, 2]).abs().max() > 1e-6
    for leaf in tree.leaves(by_hand[1]):
        assert isinstance(leaf, Tensor) and leaf.shape[:2] == LEADING


@every_rule
def test_shared_weights_match_a_copy_for_each_run(rule):
    """Leaves of ``meta`` with no leading axes, all of them or every other one, are those of every run."""
    size, own = sum(LAYOUT.sizes), weights_of(rule)
    params, targets = drawn("params", 3, size), drawn("targets", 3, size)
    copies = {name: value.expand(3, *value.shape) for name, value in own.items()}
    mixed = {name: value if place % 2 else own[name] for place, (name, value) in enumerate(copies.items())}
    expected = runs(rule, copies, params, targets)
    for meta in (own, mixed):
        torch.testing.assert_close(runs(rule, meta, params, targets), expected, **CLOSE)


def trees(label: str) -> Params:
    return LAYOUT.unpack(drawn(label, sum(LAYOUT.sizes)))


@every_rule
def test_empty_meta_stands_for_the_rules_own_weights(rule):
    own, params, grads = {n: v.double() for n, v in rule.weights.items()}, trees("params"), trees("grads")
    found = [rule.update(meta, grads, rule.init(meta, params), params, loss=torch.tensor(1.0)) for meta in ({}, own)]
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


@every_rule
def test_changes_no_argument(rule):
    meta, params, grads = weights_of(rule), trees("params"), trees("grads")
    state = rule.init(meta, params)
    for _ in range(2):
        given = (meta, grads, state, params)
        before = tree.map(torch.clone, given)
        new, later = rule.update(*given, loss=torch.tensor(1.0))
        torch.testing.assert_close(given, before, rtol=0.0, atol=0.0)
        params, state = new, later
    assert {name: tuple(value.shape) for name, value in params.items()} == SHAPES


@every_rule
def test_settings_rebuild_the_rule(rule):
    again = type(rule)(**json.loads(json.dumps(rule.settings)))
    meta, size = weights_of(rule), sum(LAYOUT.sizes)
    torch.testing.assert_close(again.weights, rule.weights, rtol=0.0, atol=0.0)
    found = [runs(each, meta, drawn("params", size), drawn("targets", size)) for each in (rule, again)]
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


@every_rule
def test_derivative_by_the_weights_matches_finite_differences(rule):
    size, meta = sum(LAYOUT.sizes), weights_of(rule)
    along = {name: drawn("along " + name, *value.shape) for name, value in meta.items()}

    def moved(t: Tensor) -> Tensor:
        shifted = {name: value + t * along[name] for name, value in meta.items()}
        # No gradients that depend on the parameters: finite differences of features that are not differentiated would show.
        state, total = rule.start(shifted, LAYOUT, drawn("params", size)), torch.zeros((), dtype=t.dtype)
        for step in range(2):
            grads = 0.1 * drawn(f"grads {step}", size)
            direction, state = rule.direction(shifted, LAYOUT, grads, state, drawn("params", size), total.detach())
            total = total + (direction * drawn("weights", size)).sum()
        return total

    torch.autograd.gradcheck(moved, torch.zeros((), dtype=torch.float64, requires_grad=True), check_forward_ad=True)


@every_rule
def test_gradients_of_zero_give_finite_updates_and_derivatives(rule):
    size, meta = sum(LAYOUT.sizes), {name: value.requires_grad_() for name, value in weights_of(rule).items()}
    params = torch.zeros(size, dtype=torch.float64)
    state, total = rule.start(meta, LAYOUT, params), 0.0
    for _ in range(STEPS):
        direction, state = rule.direction(meta, LAYOUT, torch.zeros_like(params), state, params, params.sum())
        params, total = params - direction, total + direction.square().sum()
    found = torch.autograd.grad(total, list(meta.values()), allow_unused=True)
    assert bool(params.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in found if value is not None)


@every_rule
def test_order_of_tensors_does_not_matter(rule):
    meta, params, targets = weights_of(rule), trees("params"), trees("targets")
    turned = Layout.of(dict(reversed(params.items())))
    forwards, _ = runs(rule, meta, LAYOUT.pack(params), LAYOUT.pack(targets))
    backwards, _ = runs(rule, meta, turned.pack(params), turned.pack(targets), turned)
    torch.testing.assert_close(turned.unpack(backwards), LAYOUT.unpack(forwards), rtol=1e-9, atol=1e-12)


@every_rule
def test_a_tensor_without_entries_changes_nothing(rule):
    wider = Layout.of({name: torch.zeros(shape) for name, shape in (SHAPES | {"empty": (0, 3)}).items()})
    size = wider.pack({name: torch.zeros(shape) for name, shape in (SHAPES | {"empty": (0, 3)}).items()}).numel()
    meta, params_P, targets_P = weights_of(rule), drawn("params", size), drawn("targets", size)
    wanted, found = (runs(rule, meta, params_P, targets_P, layout)[0] for layout in (LAYOUT, wider))
    torch.testing.assert_close(found, wanted, **CLOSE)
    given = {name: value.detach().requires_grad_() for name, value in meta.items()}
    moved, slope = runs(rule, given, params_P, targets_P, wider)[0], []
    if moved.requires_grad:
        slope = torch.autograd.grad(moved.square().sum(), list(given.values()), allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in slope)


@every_rule
def test_refuses_weights_of_other_shapes(rule):
    name, value = next(iter(rule.weights.items()))
    with pytest.raises(ValueError, match=rf"{name}.*accepted"):
        type(rule)(**rule.settings).weights = {**rule.weights, name: value.unsqueeze(0)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SmallMLP, {"hidden_sizes": [8.5]}),
        (FactoredMLP, {"hidden_sizes": [4.0, 4]}),
        (CoordinateLSTM, {"layers": [4.0]}),
        (NNAdam, {"hidden": 4.5}),
        (DynamicModeLSTM, {"window": 4.5}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_sizes_are_whole_numbers(kind, settings):
    with pytest.raises(ValueError, match=r"is (8\.5|4\.0|4\.5); accepted: whole numbers, \d <= "):
        kind(**settings)
