"""Curves against runs one by one; the learning rate that is chosen; what a comparison says."""

import functools
import math

import pytest
import torch
from problems.conftest import Clusters, WithDropout, opened
from problems.learned_rules import Scaled, keys

from metalearn.models.vision import MLP
from metalearn.optim.first_order import SGD, Adam
from metalearn.problems.baselines import HAND_MADE, RATES, curves, decayed, tuned
from metalearn.problems.comparison import RIVALS, compare, mean_loss, speed_up
from metalearn.problems.optimizees import Optimizee

MLP_4 = functools.partial(MLP, hidden=(4,))


def optimizee(horizon=10, rule=None, **options):
    return opened(Optimizee(Clusters(), MLP_4, rule or Scaled(), horizon=horizon, batch_size=8, **options))


def test_a_run_is_a_function_of_its_key_whatever_runs_beside_it():
    problem, meta = optimizee(), {"lr": torch.tensor(0.1)}
    together = curves(problem, Adam(), meta, keys(5), 10)
    alone = torch.cat([curves(problem, Adam(), meta, keys(5)[i : i + 1], 10) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    rates = {"lr": torch.tensor([0.1, 0.3, 0.1, 0.3, 0.1])}
    each = curves(problem, Adam(), rates, keys(5), 10, per_run=True)
    torch.testing.assert_close(each[::2], together[::2], rtol=1e-4, atol=1e-5)
    assert (each[1::2, 2:] != together[1::2, 2:]).all()


def test_dropout_is_drawn_from_the_keys():
    problem = opened(Optimizee(Clusters(), WithDropout, Scaled(), horizon=10, batch_size=8))
    first, second = (curves(problem, SGD(), {"lr": torch.tensor(0.1)}, keys(3), 5) for _ in range(2))
    assert torch.equal(first, second)
    steps = first[:, 1:] - first[:, :-1]
    assert len(steps.unique()) == steps.numel()


def test_the_best_rate_is_that_of_the_smallest_mean_loss():
    problem = optimizee()
    found = tuned(problem, SGD(), keys(6), 20)
    scores = {lr: float(curves(problem, SGD(), {"lr": torch.tensor(lr)}, keys(6), 20).mean()) for lr in RATES}
    assert found.lr == min(scores, key=lambda lr: scores[lr])
    assert 1e-4 < found.lr < 1.0 + 1e-9
    torch.testing.assert_close(torch.tensor(found.grid[found.lr]), torch.tensor(scores[found.lr]))


def test_a_rate_that_diverges_is_not_chosen():
    problem = optimizee(target="input")
    found = tuned(problem, SGD(), keys(4), 20, rates=(1e28, 1e26, 1e24, 1e22, 1e20, 1e18, 1e-3, 0.1))
    assert found.lr == 0.1 and math.isinf(found.grid[1e28])


def test_a_grid_whose_best_rate_is_at_an_end_goes_on():
    problem, rates = optimizee(), [2.0**k for k in range(-12, -4)]
    found = tuned(problem, SGD(), keys(4), 10, rates=rates)
    assert (
        list(found.grid)[:8] == rates
        and found.lr > rates[-1]
        and list(found.grid).index(found.lr) < len(found.grid) - 1
    )
    score = float(curves(problem, SGD(), {"lr": torch.tensor(found.lr)}, keys(4), 10).mean())
    assert score == pytest.approx(found.grid[found.lr], rel=1e-5)
    assert found.grid[found.lr] == min(found.grid.values())
    downwards = tuned(problem, SGD(), keys(4), 10, rates=[2.0**k for k in range(1, 9)])
    assert next(iter(downwards.grid)) < downwards.lr <= 2.0
    still = tuned(problem, SGD(), keys(2), 1, rates=rates)  # before the first update all rates are alike
    assert list(still.grid) == rates


def test_a_grid_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="learning rates of a baseline is 2; accepted: 8 <="):
        tuned(optimizee(), SGD(), keys(2), 5, rates=(0.1, 0.2))


def test_decayed_baselines_end_with_a_rate_of_zero():
    rule = decayed(HAND_MADE["SGD"]).rule(4)
    params, grads = {"p": torch.ones(1)}, {"p": torch.ones(1)}
    state, moves = rule.init({"lr": torch.tensor(1.0)}, params), []
    for _ in range(5):
        after, state = rule.update({"lr": torch.tensor(1.0)}, grads, state, params)
        moves.append(float(params["p"] - after["p"]))
    wanted = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)]
    assert moves == pytest.approx(wanted, abs=1e-6)


def test_a_learned_rule_that_is_descent_is_worth_as_much_as_descent():
    """The rule's weight is the logarithm of tuned SGD's learning rate: ratio and curves are those of SGD itself."""
    problem = optimizee(horizon=20)
    lr = tuned(problem, SGD(), keys(8), 20).lr
    meta = {"log_rate": torch.tensor(math.log(lr))}
    rivals = {"SGD": HAND_MADE["SGD"], **RIVALS}
    found = compare(
        [problem], meta, tuning=keys(8), judging=keys(8, 1), part="validation", horizons=(1, 2), rivals=rivals
    )
    numbers = found.numbers
    assert numbers["1x/SGD/lr"] == lr
    assert numbers["1x/learned/mean_loss"] == pytest.approx(numbers["1x/SGD/mean_loss"], rel=1e-4)
    assert numbers["1x/learned/mean_loss"] == pytest.approx(mean_loss(problem, meta, keys(8, 1), "validation"))
    assert numbers["1x/ratio"] == pytest.approx(numbers["1x/learned/mean_loss"] / numbers["1x/Adam/mean_loss"])
    steps = {multiple: [row["step"] for row in found.rows if row["horizon"] == multiple] for multiple in (1, 2)}
    assert max(steps[1]) == 19 and max(steps[2]) == 39 and len(steps[1]) == 20 * 5


def test_speed_up_counts_the_steps_that_the_reference_needs():
    fast, slow = torch.arange(100, 0, -1.0).expand(2, -1), torch.arange(200, 0, -2.0).expand(2, -1) - 80
    assert speed_up(fast, fast) == 1.0
    assert math.isinf(speed_up(fast * 0, fast))
    assert math.isnan(speed_up(fast.index_fill(1, torch.tensor(99), math.nan), fast))  # a run that diverges is not fast
    # The mean over ten steps ends at 5.5; 120 - 2 t over ten steps is 111 - 2 t, and is there from t = 53 on.
    assert speed_up(fast, slow) == pytest.approx((53 + 10) / 100)
