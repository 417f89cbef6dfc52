"""Function tasks against their laws, and the predictors that are said to be best against explicit posteriors in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from metalearn.base import BASE, MetaTest, MetaTrain, MetaValidation
from metalearn.tasks import regression
from metalearn.tasks.regression import (
    LARGEST_POOL,
    LinearRegression,
    MLPTeachers,
    Sinusoids,
    discrete_posterior_mean,
    linear_posterior_mean,
    relu_moments,
    running_mean,
)

UNSEEN, SEEN = MetaValidation("unseen"), MetaValidation("seen")
T = 7
FAMILIES = {
    "linear": lambda **settings: LinearRegression(3, **{"seed": 0} | settings),
    "sinusoids": lambda **settings: Sinusoids(**{"seed": 0} | settings),
    "teachers": lambda **settings: MLPTeachers(3, 8, **{"seed": 0} | settings),
}
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def opened(tasks):
    tasks.open(test=True)
    return tasks


@pytest.fixture(scope="module")
def sequences():
    """Sequences of linear regression in float64, from tasks that are in no pool."""
    batch = LinearRegression(3, seed=1).batch(0, 0, 20, T, UNSEEN)
    return batch.x.double(), batch.y.double()


# -- the laws ----------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_mean_square_matches_the_chance_loss(make, noise):
    tasks = make(noise=noise)
    means_B = tasks.batch(0, 0, 20_000, 4, MetaTrain()).y.square().mean(1)
    assert abs(means_B.mean().item() - tasks.chance_loss) < 4 * means_B.std().item() / math.sqrt(len(means_B))


def test_linear_targets_match_the_weights_of_the_pool_and_the_noise():
    tasks = LinearRegression(3, num_tasks=4, noise=0.5, seed=0)
    x_BTD, y_BT = tasks.batch(2, 0, 40, 2000, MetaTrain())
    pool_KD = tasks.weights(tasks.pool_keys(torch.arange(4)))
    found_BD = torch.linalg.lstsq(x_BTD, y_BT.unsqueeze(-1)).solution.squeeze(-1)
    distance_BK = torch.cdist(found_BD, pool_KD)
    assert distance_BK.min(1).values.max() < 0.1
    assert distance_BK.argmin(1).unique().tolist() == [0, 1, 2, 3]
    residual_BT = y_BT - (x_BTD * pool_KD[distance_BK.argmin(1)].unsqueeze(1)).sum(-1)
    for numbers in (residual_BT / 0.5, x_BTD):
        assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 1e-3
    fresh_BD = tasks.weights(tasks.pool_keys(torch.arange(3000)))
    assert stats.kstest(fresh_BD.flatten().numpy(), "norm").pvalue > 1e-3


def test_sinusoids_match_their_law():
    x_BT1, y_BT = Sinusoids(seed=0).batch(0, 0, 1000, 20, MetaTrain())
    waves_BT2 = torch.cat([x_BT1.sin(), x_BT1.cos()], dim=-1).double()
    found_B2 = torch.linalg.lstsq(waves_BT2, y_BT.double().unsqueeze(-1)).solution.squeeze(-1)
    torch.testing.assert_close((waves_BT2 @ found_B2.unsqueeze(-1)).squeeze(-1).float(), y_BT, rtol=0, atol=1e-5)
    amplitude_B, phase_B = found_B2.norm(dim=1), torch.atan2(-found_B2[:, 1], found_B2[:, 0])
    for numbers, low, high in ((amplitude_B, 0.1, 5), (phase_B, 0, math.pi), (x_BT1.flatten(), -5, 5)):
        assert stats.kstest(numbers.numpy(), "uniform", (low, high - low)).pvalue > 1e-3


def test_relu_moments_match_quadrature_in_the_plane():
    generator = torch.Generator().manual_seed(0)
    u_BHD, a_BH = (torch.randn(*shape, generator=generator).double() for shape in ((4, 6, 2), (4, 6)))
    angle_N = torch.arange(100_000, dtype=torch.float64) * (2 * math.pi / 100_000)
    circle_N2 = torch.stack([angle_N.cos(), angle_N.sin()], dim=1)
    f_BN = ((circle_N2 @ u_BHD.mT).relu() * a_BH.unsqueeze(1)).sum(-1)  # f(r e) = r f(e), E r = √(π / 2), E r² = 2
    mean_B = math.sqrt(math.pi / 2) * f_BN.mean(1)
    found_mean_B, found_deviation_B = relu_moments(u_BHD, a_BH)
    torch.testing.assert_close(found_mean_B.double(), mean_B, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found_deviation_B.double(), (2 * f_BN.square().mean(1) - mean_B**2).sqrt(), rtol=1e-5, atol=0
    )


def test_every_teacher_has_mean_zero_and_variance_one():
    y_BT = MLPTeachers(4, 16, num_tasks=5, seed=0).batch(0, 0, 12, 20_000, MetaTrain()).y
    assert y_BT.mean(1).abs().max() < 0.04 and (y_BT.var(1) - 1).abs().max() < 0.08


# -- streams, keys, pools ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("split", [MetaTrain(), SEEN, MetaTest("unseen")])
def test_a_sequence_is_a_function_of_seed_step_and_index_alone(make, split):
    tasks = opened(make(num_tasks=64, noise=0.3))
    whole = tasks.batch(5, 0, 12, T, split)
    for first, count in ((0, 1), (3, 4), (7, 5)):  # other batch sizes, other ranks
        part = tasks.batch(5, first, count, T, split)
        assert torch.equal(part.x, whole.x[first : first + count])
        torch.testing.assert_close(part.y, whole.y[first : first + count], rtol=1e-6, atol=1e-6)
    again = opened(make(num_tasks=64, noise=0.3)).batch(5, 0, 12, T, split)
    assert torch.equal(again.x, whole.x) and torch.equal(again.y, whole.y)
    other = opened(make(num_tasks=64, noise=0.3, seed=1)).batch(5, 0, 12, T, split)
    assert not torch.equal(other.x, whole.x) and not torch.equal(other.y, whole.y)


@every_family
def test_streams_differ_and_only_training_depends_on_the_step(make):
    tasks = opened(make(num_tasks=4))
    splits = [MetaTrain(), SEEN, UNSEEN, MetaTest("seen"), MetaTest("unseen")]
    batches = [tasks.batch(step, 0, 4, T, split) for split in splits for step in (0, 9)]
    assert len({tuple(batch.x.flatten().tolist()) for batch in batches}) == 2 + 4
    for earlier, later in zip(batches[2::2], batches[3::2], strict=True):
        assert torch.equal(earlier.y, later.y)


@every_family
@pytest.mark.parametrize(("split", "different"), [(MetaTrain(), 4), (SEEN, 4), (MetaTest("seen"), 4), (UNSEEN, 60)])
def test_tasks_are_of_the_pool_or_always_new_and_pools_are_nested(make, split, different):
    tasks = opened(make(num_tasks=4))
    visit_B = tasks._key("visits", device="cpu") + torch.arange(60)
    drawn = set(tasks.task_keys(visit_B, split).tolist())
    larger = set(make(num_tasks=16).pool_keys(torch.arange(16)).tolist())
    assert len(drawn) == different and (drawn < larger) == (different == 4)
    assert len(set(make(num_tasks=None).task_keys(visit_B, MetaTrain()).tolist())) == 60


def test_says_what_it_is_and_seals_meta_test():
    tasks = LinearRegression(3, num_tasks=4, seed=0)
    with pytest.raises(ValueError, match=r"sealed until open\(test=True\)"):
        tasks.batch(0, 0, 1, T, MetaTest("seen"))
    tasks.open(test=False)
    with pytest.raises(ValueError, match="sealed"):
        tasks.batch(0, 0, 1, T, MetaTest("seen"))
    assert tasks.streams() == ("seen", "unseen") and LinearRegression().streams() == ("unseen",)
    others = [LinearRegression(4, 4), LinearRegression(3, 4, 0.1), Sinusoids(), MLPTeachers(3, 4), MLPTeachers(3, 5)]
    prints = {other.record()["fingerprint"][BASE] for other in (tasks, *others)}
    assert len(prints) == 6 and tasks.record() == LinearRegression(3, 9, seed=0).record()


# -- predictors --------------------------------------------------------------------------------------------------------


def test_ridge_matches_the_normal_equations(sequences):
    x, y = sequences
    answers = LinearRegression(3, noise=0.5).oracles()["ridge"](x, y, range(T))
    for b in range(len(x)):
        for t in range(T):
            seen, targets = x[b, :t].numpy(), y[b, :t].numpy()
            w = np.linalg.inv(seen.T @ seen + 0.25 * np.eye(3)) @ seen.T @ targets
            assert answers[b, t].item() == pytest.approx(float(w @ x[b, t].numpy()), abs=1e-10)


def test_linear_posterior_mean_matches_gaussian_conditioning(sequences):
    """As a Gaussian process conditions: m·x + K(x, X) (K(X, X) + variance · I)⁻¹ (y - X m), K = x diag(v) x'."""
    (x, y), mean, spread = sequences, torch.tensor([0.3, -2.0, 1.0]).double(), torch.tensor([0.1, 4.0, 2.0]).double()
    answers = linear_posterior_mean(x, y, range(T), 0.7, mean.tolist(), spread.tolist())
    for t in range(T):
        kernel = x[:, :t] * spread @ x[:, :t].mT + 0.7 * torch.eye(t).double()
        told = torch.linalg.solve(kernel, y[:, :t] - x[:, :t] @ mean)
        expected = x[:, t] @ mean + ((x[:, t : t + 1] * spread @ x[:, :t].mT).squeeze(1) * told).sum(1)
        torch.testing.assert_close(answers[:, t], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [1e-3, 0.5, 10.0])
def test_dmmse_matches_the_enumerated_posterior(sequences, noise, monkeypatch):
    (x, y), tasks = sequences, LinearRegression(3, num_tasks=5, noise=noise, seed=0)
    pool_KD = tasks.weights(tasks.pool_keys(torch.arange(5))).double()
    answers = tasks.oracles()["dMMSE"](x, y, range(T))
    for b in range(len(x)):
        log_posterior_K = torch.zeros(5).double()
        for t in range(T):
            posterior_K = (log_posterior_K - log_posterior_K.max()).exp()
            expected = posterior_K @ pool_KD @ x[b, t] / posterior_K.sum()
            assert answers[b, t].item() == pytest.approx(expected.item(), abs=1e-9)
            log_posterior_K -= (y[b, t] - pool_KD @ x[b, t]).square() / (2 * noise**2)
    monkeypatch.setattr(regression, "_BLOCK", 2 * y.numel())
    torch.testing.assert_close(tasks.oracles()["dMMSE"](x, y, range(T)), answers, rtol=0, atol=1e-9)


def test_dmmse_of_an_immense_pool_approaches_ridge(sequences):
    """The posterior over many draws from the prior is a Monte Carlo estimate of the posterior under the prior."""
    (x, y), distances = sequences, []
    ridge = linear_posterior_mean(x, y, range(4), 0.25)
    for number in (2**6, 2**10, 2**14):
        tasks = LinearRegression(3, number, seed=0)
        distances.append((tasks.oracles()["dMMSE"](x, y, range(4)) - ridge).square().mean().item())
    assert distances[0] > 4 * distances[1] > 16 * distances[2] and distances[2] < 0.01


def test_each_predictor_is_best_where_it_is_said_to_be():
    tasks = LinearRegression(3, num_tasks=8, seed=0)
    errors = {}
    for stream in tasks.streams():
        x, y = tasks.batch(0, 0, 4000, T, MetaValidation(stream))
        errors[stream] = {
            name: (oracle(x, y, range(T)) - y).square().mean() for name, oracle in tasks.oracles().items()
        }
    seen, unseen = errors["seen"], errors["unseen"]
    assert 0.25 < seen["dMMSE"] < 0.8 * seen["ridge"] and seen["ridge"] < 0.6 * seen["mean"]
    assert unseen["ridge"] < 0.7 * unseen["dMMSE"] and unseen["dMMSE"] < unseen["mean"]


def test_sine_regression_knows_the_function_from_the_third_example():
    tasks = Sinusoids(seed=0)
    x, y = tasks.batch(0, 0, 4000, 6, UNSEEN)
    errors_T = (tasks.oracles()["sine regression"](x, y, range(6)) - y).square()
    assert errors_T[:, 2:].quantile(0.99) < 1e-4  # two examples that almost say the same leave doubts
    # Before the first example, the best constant estimate of (a, b) leaves the variance of a sin x + b cos x.
    mean_square, mean_b = tasks.chance_loss, 5.1 / math.pi
    expected = mean_square - mean_b**2 * (0.5 + math.sin(10) / 20)
    assert errors_T[:, 0].mean().item() == pytest.approx(expected, rel=0.06)


def test_ridge_of_teachers_has_the_best_of_penalties():
    tasks = MLPTeachers(4, 16, noise=0.3, seed=0)
    x, y = tasks.batch(0, 0, 6000, 13, UNSEEN)

    def error(answers):
        return (answers[:, 0] - y[:, 12]).square().mean().item()

    share = math.pi / (2 * math.pi - 2)
    others = [linear_posterior_mean(x, y, [12], (1 - share + 0.09) * factor * 4 / share) for factor in (0.25, 4.0)]
    best = error(tasks.oracles()["ridge"](x, y, [12]))
    same = error(linear_posterior_mean(x, y, [12], (1 - share + 0.09) * 4 / share))
    assert best == pytest.approx(same, rel=1e-5) and best < min(map(error, others))
    assert 1 - share + 0.09 < best < 0.8 * tasks.chance_loss


@every_family
def test_oracles_answer_from_earlier_examples_alone_and_in_the_targets_type(make):
    tasks = make(num_tasks=4)
    x, y = tasks.batch(0, 0, 5, T, UNSEEN)
    for oracle in tasks.oracles().values():
        answers, some = oracle(x, y, range(T)), oracle(x, y, [4, 2])
        assert answers.shape == (5, T) and answers.dtype == y.dtype and torch.equal(some, answers[:, [4, 2]])
        for t in range(T):
            later = torch.where(torch.arange(T) < t, y, y.flip(0) + 1)
            torch.testing.assert_close(oracle(x, later, [t])[:, 0], answers[:, t], rtol=0, atol=1e-5)


def test_running_mean_matches_a_loop(sequences):
    x, y = sequences
    answers = running_mean(x, y, range(T))
    expected = torch.stack([y[:, :t].mean(1) if t else torch.zeros(len(y)).double() for t in range(T)], 1)
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-12)


def test_a_pool_too_large_for_its_posterior_has_ridge_alone():
    assert "dMMSE" in LinearRegression(num_tasks=LARGEST_POOL).oracles()
    for num_tasks in (None, LARGEST_POOL + 1):
        assert list(LinearRegression(num_tasks=num_tasks).oracles()) == ["ridge", "mean"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LinearRegression(0), "num_features is 0; accepted: 1 <="),
        (lambda: LinearRegression(3, 0), "num_tasks is 0; accepted: 1 <="),
        (lambda: LinearRegression(3, 2**31 + 1), "num_tasks is 2147483649; accepted"),
        (lambda: LinearRegression(3, noise=0.0), r"noise is 0.0; accepted: 0.001 <="),
        (lambda: Sinusoids(noise=-1.0), "noise is -1.0; accepted: 0 <="),
        (lambda: MLPTeachers(3, 0), "hidden is 0; accepted: 1 <="),
        (lambda: LinearRegression().batch(0, 0, 1, 1, MetaTrain()), "seed is None; accepted: an integer"),
        (lambda: Sinusoids(seed=0).batch(0, 0, 1, 1, SEEN), "stream is 'seen'; accepted: unseen"),
    ],
)
def test_refuses_what_makes_no_sense(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_likelihood_that_is_lost_in_float32_still_tells_tasks_apart():
    pool_KD = torch.tensor([[0.0], [100.0], [101.0]])
    x, y = torch.ones(1, 3, 1), torch.full((1, 3), 1e4)
    answers = discrete_posterior_mean(x, y, [0, 2], pool_KD, variance=1e-6)
    assert answers.tolist() == [[67.0, 101.0]]
