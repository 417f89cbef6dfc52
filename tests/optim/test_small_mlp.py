"""The small rule against its own writing in numpy in float64; it begins harmless, and it can learn."""

import numpy as np
import torch
from torch import Tensor

from metalearn import random, tree
from metalearn.base import Params
from metalearn.optim.layout import Layout
from metalearn.optim.learned import LearnedRule
from metalearn.optim.small_mlp import SmallMLP

SHAPES = {"scalar": (), "bias": (3,), "matrix": (4, 3), "kernel": (2, 3, 2, 2)}
LAYOUT = Layout.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
GOLDEN = [-0.035395429874231284, -0.034437689314725704, -0.10474802690464903]


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
    means, square, found = {kept: 0.0 for kept in (0.5, 0.9, 0.99)}, 0.0, []
    for t, (g, p) in enumerate(steps):
        means = {kept: kept * mean + (1 - kept) * g for kept, mean in means.items()}
        square = 0.999 * square + 0.001 * g**2
        root = np.sqrt(square / (1 - 0.999 ** (t + 1)) + 1e-10)
        plain = np.stack([g, p, *means.values()], -1).reshape(-1, 5)
        plain = plain / np.sqrt(1e-5 + (plain**2).mean(0))
        ratios = [g / root, *(mean / (1 - kept ** (t + 1)) / root for kept, mean in means.items())]
        time = np.tile([np.tanh(t / scale - 1) for scale in (1, 3, 10, 30, 100, 300)], (len(plain), 1))
        outputs = numpy_network(meta, np.concatenate([plain, np.stack(ratios, -1).reshape(-1, 4), time], -1))
        found.append((0.01 * outputs[:, 0] * np.exp(0.01 * outputs[:, 1])).reshape(g.shape))
    return found


def test_matches_numpy_and_golden_values():
    rule, total = SmallMLP(), sum(LAYOUT.sizes)
    meta = {n: wave(v.numel(), 0.7 + k).reshape(v.shape) for k, (n, v) in enumerate(rule.weights.items())}
    weights = {name: torch.from_numpy(value) for name, value in meta.items()}
    flats = [(1e-3 * wave(total, 1.3 + t), wave(total, 0.4 + t)) for t in range(5)]
    pieces = [[LAYOUT.unpack(torch.from_numpy(x)) for x in pair] for pair in flats]
    expected = {n: numpy_directions(meta, [(g[n].numpy(), p[n].numpy()) for g, p in pieces]) for n in SHAPES}
    np.testing.assert_allclose(expected["bias"][-1], GOLDEN, rtol=1e-12)
    state = rule.start(weights, LAYOUT, torch.from_numpy(flats[0][1]))
    for t, (g, p) in enumerate(flats):
        direction, state = rule.direction(weights, LAYOUT, torch.from_numpy(g), state, torch.from_numpy(p), None)
        for name, part in LAYOUT.unpack(direction).items():
            np.testing.assert_allclose(part, expected[name][t], rtol=1e-12, atol=1e-16)


def test_has_218_weights_and_four_numbers_of_state_per_parameter():
    rule, total = SmallMLP(), sum(LAYOUT.sizes)
    assert sum(value.numel() for value in rule.weights.values()) == 218
    state = rule.start(rule.weights, LAYOUT, torch.zeros(total))
    assert sum(leaf.numel() for leaf in [*state["momentum"].values(), state["square"]]) == 4 * total


def losses(rule: LearnedRule, meta: Params, steps: int) -> Tensor:
    """Of a quadratic of two curvatures, the loss before each of so many updates and after the last: (steps + 1, …)."""
    layout, leading = Layout.of({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}), meta["bias_0"].shape[:-1]
    curvature, flat = torch.tensor([1.0] * 12 + [4.0] * 4), random.normal(random.key(1), (16,)).expand(*leading, 16)
    state, found = rule.start(meta, layout, flat), [(curvature * flat.square()).mean(-1)]
    for _ in range(steps):
        direction, state = rule.direction(meta, layout, curvature * flat, state, flat, None)
        flat = flat - direction
        found.append((curvature * flat.square()).mean(-1))
    return torch.stack(found)


def test_begins_harmless():
    rule = SmallMLP()
    meta = tree.stack([rule.init_meta(random.key(seed)) for seed in range(8)])
    found = losses(rule, meta, 50)
    assert float((found / found[0] - 1).abs().max()) < 0.1


def test_learns_to_descend():
    rule = SmallMLP()
    meta = {name: value.requires_grad_() for name, value in rule.init_meta(random.key(0)).items()}
    optimizer = torch.optim.Adam(meta.values(), lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        losses(rule, meta, 8).mean().backward()
        optimizer.step()
    found = losses(rule, meta, 8).detach()
    assert float(found[-1]) < 0.5 * float(found[0])
