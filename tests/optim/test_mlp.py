"""The 19-feature MLP against its own writing in numpy, tensor by tensor and feature by feature, in float64."""

import numpy as np
import pytest
import torch

from metalearn.optim.layout import Layout
from metalearn.optim.mlp import MLPRule

SHAPES = {"scalar": (), "bias": (3,), "matrix": (4, 3), "kernel": (2, 3, 2, 2)}
LAYOUT = Layout.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
SCALES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
GOLDEN = [4.47867321899292e-05, 1.84020111964373e-05, -8.371982940783319e-05]


def wave(size: int, speed: float) -> np.ndarray:
    return np.sin(speed * np.arange(1, size + 1))


def numpy_network(meta: dict[str, np.ndarray], features_NF: np.ndarray) -> np.ndarray:
    """Rows of features through the layers: (N, 2)."""
    values = features_NF
    for layer in range(len(meta) // 2):
        values = (np.maximum(values, 0) if layer else values) @ meta[f"weight_{layer}"] + meta[f"bias_{layer}"]
    return values


def numpy_directions(meta: dict[str, np.ndarray], steps: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The directions of one tensor for gradients and parameters, step by step."""
    means, found = {kept: 0.0 for kept in (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)}, []
    for t, (g, p) in enumerate(steps):
        means = {kept: kept * mean + (1 - kept) * g for kept, mean in means.items()}
        features = np.stack([g, p, *means.values()], -1).reshape(-1, 8)
        features = features / np.sqrt(1e-5 + (features**2).mean(0))
        time = np.tile([np.tanh(t / scale - 1) for scale in SCALES], (len(features), 1))
        outputs = numpy_network(meta, np.concatenate([features, time], -1))
        found.append((outputs[:, 0] * np.exp(outputs[:, 1] * 1e-3) * 1e-3).reshape(g.shape))
    return found


def test_matches_numpy_and_golden_values():
    rule, total = MLPRule(), sum(LAYOUT.sizes)
    meta = {n: 0.3 * wave(v.numel(), 0.7 + k).reshape(v.shape) for k, (n, v) in enumerate(rule.weights.items())}
    weights = {name: torch.from_numpy(value) for name, value in meta.items()}
    flats = [(0.03 * wave(total, 1.3 + t), wave(total, 0.4 + t)) for t in range(5)]
    pieces = [[LAYOUT.unpack(torch.from_numpy(x)) for x in pair] for pair in flats]
    expected = {n: numpy_directions(meta, [(g[n].numpy(), p[n].numpy()) for g, p in pieces]) for n in SHAPES}
    np.testing.assert_allclose(expected["bias"][-1], GOLDEN, rtol=1e-12)
    state = rule.start(weights, LAYOUT, torch.from_numpy(flats[0][1]))
    for t, (g, p) in enumerate(flats):
        direction, state = rule.direction(weights, LAYOUT, torch.from_numpy(g), state, torch.from_numpy(p), None)
        for name, part in LAYOUT.unpack(direction).items():
            np.testing.assert_allclose(part, expected[name][t], rtol=1e-12, atol=1e-16)


def test_has_the_published_number_of_weights_and_six_numbers_of_state_per_parameter():
    rule = MLPRule()
    assert sum(value.numel() for value in rule.weights.values()) == 1762
    state = rule.start(rule.weights, LAYOUT, torch.zeros(sum(LAYOUT.sizes)))
    assert sum(leaf.numel() for leaf in state["momentum"].values()) == 6 * sum(LAYOUT.sizes)


@pytest.mark.parametrize(
    "wrong", [{"hidden_sizes": []}, {"hidden_sizes": [0]}, {"step_mult": 0.0}, {"output_std": -1.0}]
)
def test_refuses_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="accepted"):
        MLPRule(**wrong)
