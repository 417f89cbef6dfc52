"""SignMomentum against its formula, number by number, and as Trainers use optimizers."""

import copy
import functools

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from metalearn.optim.sign_momentum import SignMomentum


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ((3, 2), (4,), ())]


def gradients(step):
    return [p.detach() for p in parameters(100 + step)]


def run(optimizer, params, steps, schedule=None):
    for step in steps:
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad
        optimizer.step()
        if schedule:
            schedule.step()


@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.99), (0.0, 0.5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_matches_the_formula_number_by_number(betas, weight_decay):
    params = parameters()
    expected = [p.detach().flatten().tolist() for p in params]
    averages = [[0.0] * len(values) for values in expected]
    run(SignMomentum(params, 0.01, betas, weight_decay), params, range(6))
    for step in range(6):
        for values, average, grad in zip(expected, averages, gradients(step), strict=True):
            for i, g in enumerate(grad.flatten().tolist()):
                direction = betas[0] * average[i] + (1 - betas[0]) * g
                values[i] -= 0.01 * ((direction > 0) - (direction < 0) + weight_decay * values[i])
                average[i] = betas[1] * average[i] + (1 - betas[1]) * g
    for p, values in zip(params, expected, strict=True):
        assert p.flatten().tolist() == pytest.approx(values, abs=1e-14)


def test_equal_betas_match_the_sign_of_torchs_dampened_momentum():
    ours, theirs = parameters(), parameters()
    twin = torch.optim.SGD(theirs, lr=1.0, momentum=0.8, dampening=0.2)  # whose first average is g, ours is 0.2 g
    optimizer = SignMomentum(ours, 0.1, (0.8, 0.8))
    for p in theirs:
        twin.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for step in range(5):
        run(optimizer, ours, [step])
        before = [p.detach().clone() for p in theirs]
        run(twin, theirs, [step])
        for p, old in zip(theirs, before, strict=True):
            p.data = old + 0.1 * (p.detach() - old).sign()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_groups_have_settings_of_their_own_and_follow_a_schedule():
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = SignMomentum([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)
    run(optimizer, params, [0, 1], LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0))
    steps = [(p.detach() - old).abs().max().item() for p, old in zip(params, start, strict=True)]
    assert steps == pytest.approx([0.5, 0.1, 0.1])  # the second step has a rate of nothing


def test_a_state_dict_continues_bit_by_bit():
    whole, first = parameters(), parameters()
    make = functools.partial(SignMomentum, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    run(make(whole), whole, range(6))
    optimizer = make(first)
    run(optimizer, first, range(3))
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))
    forgetful = make(fresh := [torch.nn.Parameter(p.detach().clone()) for p in first])
    run(forgetful, fresh, range(3, 6))
    assert not torch.equal(whole[0], fresh[0])  # the average matters


def test_returns_the_loss_of_a_closure_and_leaves_parameters_without_gradients():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SignMomentum([used, unused], lr=0.1)

    def closure():
        loss = (3 * used).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    torch.testing.assert_close(used.detach(), torch.full((2,), 0.9))
    assert torch.equal(unused.detach(), torch.ones(2)) and unused not in optimizer.state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is 1.0"),
        ({"betas": (-0.1, 0.9)}, "betas is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SignMomentum(parameters(), **settings)
    with pytest.raises(ValueError, match=message):
        SignMomentum([{"params": parameters(), **settings}])
