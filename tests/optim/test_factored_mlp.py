"""The folded form against a float64 numpy writing of the features, and against the unfolded form."""

import numpy as np
import pytest
import torch
from optim.factored_oracle import Tensor as Reference
from optim.factored_oracle import network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.bench.unfolded import Unfolded
from metalearn import random
from metalearn.optim import factored_mlp
from metalearn.optim.factored_mlp import FactoredMLP
from metalearn.optim.layout import Layout

SHAPES = {
    "wide": (3, 5),
    "tall": (5, 3),
    "square": (4, 4),
    "bias": (6,),
    "scalar": (),
    "kernel": (5, 4, 3, 2),
    "channels last": (2, 2, 3, 4),
    "single": (1, 3),
}
LAYOUT = Layout.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
SIZE = sum(LAYOUT.sizes)


def drawn(label, *shape):
    return random.normal(random.key(7, label), shape).double()


def weights_of(rule):
    """Weights away from the initial ones, those of decays by a little."""
    values = rule.init_meta(random.key(1)).items()
    return {n: v.double() + (0.02 if "decay" in n else 0.2) * drawn(n, *v.shape) for n, v in values}


def updates(rule, meta, steps, params):
    state = rule.init(meta, params)
    for step in range(steps):
        grads = {name: 0.1 * drawn(f"{name} {step}", *p.shape) + 0.1 * p for name, p in params.items()}
        params, state = rule.update(meta, grads, state, params)
    return params


def tensors():
    return LAYOUT.unpack(drawn("params", SIZE))


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_features_match_numpy():
    """39 networks at once, each of which answers with one feature: x = relu(x) - relu(-x)."""
    rule, num = FactoredMLP([2], step_mult=1.0), 39
    own = {name: 0.02 * drawn(name, *value.shape) for name, value in rule.weights.items() if "decay" in name}
    meta = {name: value.double().expand(num, *value.shape) for name, value in rule.weights.items()}
    meta["weight_0"] = torch.stack([torch.eye(num), -torch.eye(num)], -1).double()
    meta["weight_1"] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double().expand(num, 2, 2)
    meta |= {name: value.expand(num, *value.shape) for name, value in own.items()}
    params = drawn("params", SIZE)
    references = [Reference(shape, {name: value.numpy() for name, value in own.items()}) for shape in SHAPES.values()]
    state = rule.start(meta, LAYOUT, params.expand(num, SIZE))
    for step in range(3):
        grads = 10.0 ** (step - 2) * drawn(f"grads {step}", SIZE)
        found, state = rule.direction(meta, LAYOUT, grads.expand(num, SIZE), state, params.expand(num, SIZE), None)
        pieces = zip(SHAPES, references, LAYOUT.split(grads), LAYOUT.split(params), LAYOUT.split(found), strict=True)
        for name, reference, g, p, piece in pieces:
            reference.add(g.numpy())
            expected = reference.features(p.numpy()).reshape(-1, num).T
            np.testing.assert_allclose(piece.numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("hidden_sizes", [[4, 4], [5], [7, 6, 3]])
def test_step_matches_numpy(hidden_sizes):
    rule = FactoredMLP(hidden_sizes, exp_mult=0.5, step_mult=0.1)
    meta, params = weights_of(rule), tensors()
    grads = {name: drawn(name, *p.shape) for name, p in params.items()}
    new, _ = rule.update(meta, grads, rule.init(meta, params), params)
    values = {name: value.numpy() for name, value in meta.items()}
    for name, p in params.items():
        reference = Reference(SHAPES[name], values)
        reference.add(grads[name].numpy())
        direction, magnitude = np.moveaxis(network(values, reference.features(p.numpy())), -1, 0)
        expected = p.numpy() - (0.1 * direction * np.exp(0.5 * magnitude)).reshape(p.shape)
        np.testing.assert_allclose(new[name].numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("hidden_sizes", [[4, 4], [32, 32]])
@pytest.mark.parametrize("way", ["graph", "pieces", "compiler"])
def test_folded_matches_unfolded(hidden_sizes, way, monkeypatch):
    rule, other = (kind(hidden_sizes, step_mult=0.01) for kind in (FactoredMLP, Unfolded))
    meta = weights_of(rule)
    with torch.set_grad_enabled(way == "graph"):
        expected = updates(other, meta, 12, tensors())
        if way == "pieces":
            monkeypatch.setattr(factored_mlp, "PIECE", 8 * 64)  # 8 entries with 4 hidden units, 2 with 32
        elif way == "compiler":  # the writing that a compiler is given
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = updates(rule, meta, 12, tensors())
    assert_close(found, expected)
    assert max((found[name] - p).abs().max() for name, p in tensors().items()) > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # by torch's compiler
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # that of Layout.of
def test_compiled_matches_eager():
    rule, params = (
        FactoredMLP(step_mult=0.1),
        {name: p.float() for name, p in tensors().items() if name in ("wide", "bias")},
    )
    update = torch.compile(rule.update, fullgraph=True)
    with torch.no_grad():
        state = rule.init(rule.weights, params)
        for step in range(2):
            grads = {name: 0.1 * drawn(f"{name} {step}", *p.shape).float() for name, p in params.items()}
            found = update(rule.weights, grads, state, params)
            expected = params, state = rule.update(rule.weights, grads, state, params)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hidden_sizes", "num_weights"), [([4, 4], 197), ([32, 32], 2409), ([8], 345)])
def test_number_of_weights(hidden_sizes, num_weights):
    assert sum(value.numel() for value in FactoredMLP(hidden_sizes).weights.values()) == num_weights


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))]
        )
        return made


@pytest.mark.parametrize("shape", [(128, 196), (196, 128), (3, 20_000), (30_000,)])
def test_makes_no_tensor_wider_than_the_momenta(shape, monkeypatch):
    monkeypatch.setattr(factored_mlp, "PIECE", 2**17)
    rule, params = FactoredMLP([32, 32]), {"weight": torch.ones(shape)}
    state, numbers = rule.init({}, params), params["weight"].numel()
    assert sum(leaf.numel() for leaf in tree_leaves(state)) == 4 * numbers + 3 * sum(shape) + 1  # and the step
    with torch.no_grad(), Largest() as largest:
        rule.update({}, params, state, params)
    assert largest.numbers == 3 * numbers


@pytest.mark.parametrize(
    ("given", "message"), [({"hidden_sizes": []}, "number"), ({"hidden_sizes": [4, 0]}, "size is 0")]
)
def test_refuses_sizes_out_of_range(given, message):
    with pytest.raises(ValueError, match=f"{message}.*accepted"):
        FactoredMLP(**given)
    with pytest.raises(ValueError, match="step_mult is -1"):
        FactoredMLP(step_mult=-1.0)


def test_initial_weights_are_scaled_by_inputs():
    weights = FactoredMLP([64, 64]).weights
    assert weights["weight_0"].std().item() == pytest.approx(0.88 / 39**0.5, rel=0.05)
    assert weights["weight_1"].std().item() == pytest.approx(0.88 / 8, rel=0.05)
    assert not weights["bias_0"].any() and not weights["momentum_decay"].any()
