"""NNAdam against its own writing in numpy in float64, and what it becomes at its limits."""

import numpy as np
import pytest
import torch

from metalearn.optim.hyper import NNAdam
from metalearn.optim.layout import Layout

SHAPES = {"scalar": (), "bias": (3,), "matrix": (4, 3), "kernel": (2, 3, 2, 2)}
LAYOUT = Layout.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
TOTAL = sum(LAYOUT.sizes)
GOLDEN = [-0.04525040359735426, -0.015445907137906034, -0.04295128322799638]


def wave(size: int, speed: float) -> np.ndarray:
    return np.sin(speed * np.arange(1, size + 1))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def size_of(x: float) -> float:
    return 0.5 * np.clip(np.log(1e-8 + abs(x)), -5, 5)


def numpy_features(m: np.ndarray, v: np.ndarray, p: np.ndarray, g: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    """The 19 statistics of one tensor."""
    means = [float(x.mean()) for x in (m, v, p, g)]
    variances = [float(((x - x.mean()) ** 2).mean()) for x in (m, v, p, g)]
    kind = [1.0 if p.ndim == axes else -1.0 for axes in (0, 1)]
    sizes = [*map(size_of, means), *np.sign(means), *map(size_of, variances), size_of(np.abs(g).mean())]
    return np.array([*sizes, *kind, *(0.2 * np.clip(hyper, -5, 5))])


def numpy_directions(meta: dict[str, np.ndarray], steps: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """The directions of one tensor for gradients and parameters, step by step."""
    names = ("lr", "beta1", "beta2", "eps")
    low, high = np.log([1e-8, np.exp(-10), np.exp(-10), 1e-11]) / 10, np.log([1e3, 1, 1, 1e4]) / 10
    hyper = np.clip([meta[name] for name in names], low, high)
    m, v, h, c, found = 0.0, 0.0, meta["hidden"], meta["cell"], []
    for g, p in steps:
        g = np.clip(g, -1000, 1000)
        lr, lost1, lost2, eps = np.exp(10 * hyper)
        m, v = (1 - lost1) * m + lost1 * g, (1 - lost2) * v + lost2 * g**2
        found.append(lr * (1 + eps) / (eps + np.sqrt(v + 1e-10)) * m)
        features = numpy_features(m, v, p, g, hyper)
        i, f, o, j = np.split(np.concatenate([features, h]) @ meta["weight"] + meta["bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(j)
        h = sigmoid(o) * np.tanh(c)
        hyper = np.clip(hyper + 0.05 * (h @ meta["head_weight"] + meta["head_bias"]), low, high)
    return found


def weights_of(rule: NNAdam) -> dict[str, np.ndarray]:
    meta = {name: value.double().numpy() for name, value in rule.weights.items()}
    return {n: v + 0.2 * wave(v.size, 0.7 + k).reshape(v.shape) for k, (n, v) in enumerate(sorted(meta.items()))}


def test_matches_numpy_and_golden_values():
    rule = NNAdam(output_scale=0.05, lr=0.01)
    meta = weights_of(rule) | {"weight": 0.3 * wave(51 * 128, 0.9).reshape(51, 128)}
    weights = {name: torch.from_numpy(np.asarray(value)) for name, value in meta.items()}
    flats = [(4 * wave(TOTAL, 1.3 + t) ** 5, wave(TOTAL, 0.4 + t)) for t in range(6)]
    flats[2][0][5] = 5000.0  # beyond the bound of gradients
    pieces = [[LAYOUT.unpack(torch.from_numpy(x)) for x in pair] for pair in flats]
    expected = {n: numpy_directions(meta, [(g[n].numpy(), p[n].numpy()) for g, p in pieces]) for n in SHAPES}
    np.testing.assert_allclose(expected["bias"][-1], GOLDEN, rtol=1e-11)
    state = rule.start(weights, LAYOUT, torch.from_numpy(flats[0][1]))
    for t, (g, p) in enumerate(flats):
        direction, state = rule.direction(weights, LAYOUT, torch.from_numpy(g), state, torch.from_numpy(p), None)
        for name, part in LAYOUT.unpack(direction).items():
            np.testing.assert_allclose(part, expected[name][t], rtol=1e-11, atol=1e-16)


def run(rule: NNAdam, grads: torch.Tensor) -> torch.Tensor:
    params = torch.ones(TOTAL)
    state = rule.start(rule.weights, LAYOUT, params)
    for grad in grads:
        direction, state = rule.direction(rule.weights, LAYOUT, grad, state, params, None)
    return direction


def test_is_momentum_before_meta_training_where_eps_is_large():
    grads = torch.linspace(-1, 1, 5 * TOTAL).reshape(5, TOTAL).cos()
    mean = sum(0.1 * 0.9 ** (4 - t) * grad for t, grad in enumerate(grads))
    torch.testing.assert_close(run(NNAdam(lr=0.1, eps=1e4), grads), 0.1 * mean, rtol=1e-3, atol=0.0)


def test_step_of_small_eps_does_not_depend_on_the_gradients_scale():
    grads = torch.linspace(-1, 1, 5 * TOTAL).reshape(5, TOTAL).cos()
    torch.testing.assert_close(run(NNAdam(), grads), run(NNAdam(), 100 * grads), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(("output", "expected"), [(1e9, 1e3), (-1e9, 1e-8)])
def test_hyper_parameters_stay_in_bounds(output, expected):
    rule = NNAdam()
    rule.weights = {**rule.weights, "head_bias": torch.full((4,), output)}
    state = rule.start(rule.weights, LAYOUT, torch.ones(TOTAL))
    for _ in range(2):
        _, state = rule.direction(rule.weights, LAYOUT, torch.ones(TOTAL), state, torch.ones(TOTAL), None)
    torch.testing.assert_close((10 * state["hyper"]["lr"]).exp(), torch.full((4,), expected), rtol=1e-4, atol=0.0)
    assert all(bool((10 * value).exp().isfinite().all()) for value in state["hyper"].values())


def test_full_recall_forgets_earlier_moves():
    rule = NNAdam(recall=1.0)
    rule.weights = {**rule.weights, "head_bias": torch.ones(4)}
    state = rule.start(rule.weights, LAYOUT, torch.ones(TOTAL))
    first = state["hyper"]["lr"]
    for _ in range(3):
        _, state = rule.direction(rule.weights, LAYOUT, torch.ones(TOTAL), state, torch.ones(TOTAL), None)
        torch.testing.assert_close(state["hyper"]["lr"], first + 0.01)


def test_has_6856_weights():
    assert sum(value.numel() for value in NNAdam().weights.values()) == 6856


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"output_scale": 0.0}, {"recall": 2.0}, {"lr": 0.0}, {"beta1": 1.0}])
def test_refuses_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="accepted"):
        NNAdam(**wrong)
