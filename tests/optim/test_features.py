"""Features against numpy in float64, and what float32 would spoil."""

import numpy as np
import torch

from metalearn.optim.features import (
    TIME_SCALES,
    running_mean,
    second_moment_normaliser,
    spread,
    tensor_means,
    time_features,
    weights_held,
)
from metalearn.optim.layout import Layout

LAYOUT = Layout.of({"scalar": torch.zeros(()), "bias": torch.zeros(3), "matrix": torch.zeros(2, 4)})
PIECES = (slice(0, 1), slice(1, 4), slice(4, 12))
X = torch.linspace(-2.0, 3.0, 2 * 5 * 12, dtype=torch.float64).reshape(2, 5, 12).sin() / 100


def test_normaliser_and_means_match_numpy_tensor_by_tensor():
    x = X.numpy()
    for place, piece in enumerate(PIECES):
        expected = 1 / np.sqrt(1e-5 + np.square(x[..., piece]).mean(-1))
        np.testing.assert_allclose(second_moment_normaliser(LAYOUT, X)[..., place], expected, rtol=1e-14)
        np.testing.assert_allclose(tensor_means(LAYOUT, X)[..., place], x[..., piece].mean(-1), rtol=1e-12)


def test_spread_gives_every_entry_its_tensors_value():
    values = torch.arange(6.0).reshape(2, 3)
    expected = np.repeat(values.numpy(), [1, 3, 8], axis=-1)
    np.testing.assert_array_equal(spread(LAYOUT, values), expected)


def test_time_matches_golden_values():
    step = torch.tensor([[0, 1], [100, 250_000]])
    time = time_features(step, TIME_SCALES, torch.float64)
    expected = np.tanh(step.numpy()[..., None] / np.array([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5]) - 1)
    np.testing.assert_allclose(time, expected, rtol=1e-15, atol=1e-15)
    golden = [0.0, -0.5827829453479101, -0.7162978701990245, -0.7472358212839743, -0.7573623242165263]
    np.testing.assert_allclose(time[0, 1, :5], golden, rtol=1e-12)


def test_running_mean_over_its_weight_is_the_weighted_mean():
    values, kept = X[0], 0.9
    mean = torch.zeros(12, dtype=torch.float64)
    for value in values:
        mean = running_mean(mean, value, kept)
    share = kept ** np.arange(4, -1, -1)
    held = weights_held(torch.tensor(5), [kept, 0.0], torch.float64)
    np.testing.assert_allclose(mean / held[0], share @ values.numpy() / share.sum(), rtol=1e-13)
    assert held[1] == 1


def test_weight_of_few_values_keeps_its_digits_in_float32():
    held = weights_held(torch.tensor([1, 2]), [0.9999], torch.float32)
    np.testing.assert_allclose(held.squeeze(-1), [1e-4, 1.9999e-4], rtol=1e-7)
