import copy
import math

import pytest
import torch
from optim.guard_tasks import LEARNED, SGD, STEPS, alone, assert_same, descended, guarded, run
from torch import nn

from metalearn.optim.guard import GL2O


@pytest.mark.parametrize("learned_lr", [0.3, 1.9, 2.5])
def test_matches_safe_l2o_on_a_parabola(learned_lr):
    """f = x^2 / 2: the guard's step of rate b is ``(1 - b) x``, and its residual b |x|."""
    x, (alpha, theta, b) = 3.0, (0.95, 0.4, 0.5)
    p = nn.Parameter(torch.tensor(x, dtype=torch.float64))
    optimizer = GL2O(torch.optim.SGD([p], lr=learned_lr), torch.optim.SGD([p], lr=b), alpha, theta)

    def closure():
        optimizer.zero_grad()
        loss = p**2 / 2
        loss.backward()
        return loss

    mu, accepted = b * x, 0
    for _ in range(12):
        loss = optimizer.step(closure)
        assert loss.item() == pytest.approx(x**2 / 2)
        y = (1 - learned_lr) * x
        if b * abs(y) <= alpha * mu:
            x, mu, accepted = y, theta * b * abs(y) + (1 - theta) * mu, accepted + 1
        else:
            x = (1 - b) * x
        assert p.item() == pytest.approx(x, rel=1e-12) and optimizer.mu == pytest.approx(mu, rel=1e-12)
    assert optimizer.accepted == accepted and optimizer.fraction_learned == accepted / 12


def test_safe_l2o_follows_the_guard_exactly_where_the_learned_optimizer_diverges():
    """With a guard that has momentum, which residuals leave as it was."""
    optimizer, task = guarded(LEARNED["explodes"], kind=GL2O)
    assert_same(run(optimizer, task, range(STEPS)), alone(SGD))
    assert optimizer.accepted == 0


def test_safe_l2o_does_without_a_first_gradient():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = GL2O(torch.optim.SGD([p], lr=0.5), torch.optim.SGD([p], lr=0.1))
    for step in range(12):
        optimizer.step(lambda target=1.0 if step < 2 else 5.0: descended(p, (p - target).square().sum() / 2))
    assert p.item() == pytest.approx(5.0, abs=0.05) and optimizer.fraction_learned > 0.5


def test_safe_l2o_measures_anew_after_a_gradient_that_overflowed():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = GL2O(torch.optim.SGD([p], lr=3.0), torch.optim.SGD([p], lr=0.1))
    optimizer.mu = math.inf  # beside which every step of the learned optimizer would be small
    for _ in range(3):
        optimizer.step(lambda: descended(p, p.square().sum() / 2))
    assert optimizer.accepted == 0 and p.item() == pytest.approx(0.9**3)


def test_safe_l2o_goes_on_bit_for_bit():
    whole, task = guarded(LEARNED["rule"], kind=GL2O)
    expected = run(whole, task, range(STEPS))
    assert 0 < whole.accepted < STEPS
    first, task = guarded(LEARNED["rule"], kind=GL2O)
    run(first, task, range(7))
    second, other = guarded(LEARNED["rule"], kind=GL2O)
    other.move(task.point())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(run(second, other, range(7, STEPS)), expected[7:])
    assert second.accepted == whole.accepted
