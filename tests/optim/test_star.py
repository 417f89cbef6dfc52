"""STAR against float64 numpy: its nominal term alone, and all of its terms."""

import numpy as np
import pytest
import torch
from optim.factored_oracle import Tensor as Reference
from optim.factored_oracle import network

from metalearn import random
from metalearn.optim.star import STAR

SHAPES = {"matrix": (4, 3), "bias": (5,), "scalar": (), "kernel": (2, 3, 2, 2)}


def drawn(label, *shape):
    return random.normal(random.key(11, label), shape).double()


def trees(label):
    return {name: drawn(f"{label} {name}", *shape) for name, shape in SHAPES.items()}


def weights_of(rule):
    return {n: v.double() + (0.02 if "decay" in n else 0.3) * drawn(n, *v.shape) for n, v in rule.weights.items()}


def adam_aggmo(lr, steps):
    """By hand: the mean over momenta of m / sqrt(v + 1e-6), without corrections."""
    params = {name: p.numpy() for name, p in trees("params").items()}
    m, v = ({name: np.zeros((3, *p.shape)) for name, p in params.items()} for _ in range(2))
    for step in range(steps):
        for name, g in trees(f"grads {step}").items():
            for i, kept in enumerate((0.9, 0.99, 0.999)):
                m[name][i] = kept * m[name][i] + (1 - kept) * g.numpy()
            v[name][0] = 0.999 * v[name][0] + 0.001 * g.numpy() ** 2
            params[name] = params[name] - lr * sum(m[name]) / 3 / np.sqrt(v[name][0] + 1e-6)
    return params


def run(rule, meta, steps):
    params = trees("params")
    state = rule.init(meta, params)
    for step in range(steps):
        params, state = rule.update(meta, trees(f"grads {step}"), state, params)
    return params


def assert_close(found, expected):
    for name, p in expected.items():
        np.testing.assert_allclose(found[name].numpy(), p, rtol=1e-12, atol=1e-13, err_msg=name)


def test_without_black_box_matches_adam_aggmo():
    """d = 0, and m_n = 1: set so by hand, or not controlled."""
    rule, expected = STAR(nominal_lr=0.01), adam_aggmo(0.01 * np.exp(0.001), 10)
    own = {name: value.double() for name, value in rule.weights.items()}
    assert_close(run(rule, own | {"bias_2": torch.tensor([0.0, 0.3, 1.0, 0.7]).double()}, 10), expected)
    rule = STAR(nominal_lr=0.01, step_mult=0.0, magnitude_control=False)
    still = {name: value for name, value in own.items() if "decay" in name}
    assert_close(run(rule, weights_of(rule) | still, 10), expected)


def test_untrained_rule_is_its_nominal_term():
    assert_close(run(STAR(), {}, 5), adam_aggmo(1e-3, 5))


ESTIMATES = {
    "sgd": lambda tensor: tensor.g,
    "momentum": lambda tensor: tensor.m[2],
    "aggmo": lambda tensor: np.mean(tensor.m, 0),
    "adam": lambda tensor: tensor.scaled_momenta()[2],
    "adam_aggmo": lambda tensor: np.mean(tensor.scaled_momenta(), 0),
}


@pytest.mark.parametrize("magnitude_control", [True, False])
@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("nominal", ESTIMATES)
def test_all_terms_match_numpy(nominal, precondition, magnitude_control):
    rule = STAR([5, 4], 0.3, 0.02, 0.1, nominal, 0.2, precondition, magnitude_control)
    meta = weights_of(rule)
    values = {name: value.numpy() for name, value in meta.items()}
    references = {name: Reference(shape, values) for name, shape in SHAPES.items()}
    expected = {name: p.numpy() for name, p in trees("params").items()}
    for step in range(3):
        for name, g in trees(f"grads {step}").items():
            tensor, p = references[name], expected[name]
            tensor.add(g.numpy())
            d, m_b, m_n, m_r = np.moveaxis(network(values, tensor.features(p)), -1, 0)
            if not magnitude_control:
                m_n, m_r = 1.0, 0.0
            black_box = 0.02 * d * np.exp(0.3 * m_b) / (np.sqrt(tensor.v + 1e-6) if precondition else 1.0)
            kept = 1 - 0.2 * np.exp(0.3 * m_r)
            p = kept * p.reshape(tensor.shape) - black_box - 0.1 * np.exp(0.3 * m_n) * ESTIMATES[nominal](tensor)
            expected[name] = p.reshape(SHAPES[name])
    assert_close(run(rule, meta, 3), expected)


def test_number_of_weights():
    assert sum(value.numel() for value in STAR().weights.values()) == 200 + 7


@pytest.mark.parametrize(
    "given", [{"nominal": "rmsprop"}, {"nominal_lr": -1.0}, {"weight_decay": -0.1}, {"step_mult": -1.0}]
)
def test_refuses_settings_out_of_range(given):
    with pytest.raises(ValueError, match=rf"{next(iter(given))} is .*accepted"):
        STAR(**given)
