"""Muon bit by bit against torch's Muon beside torch's AdamW, and as Trainers use optimizers."""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from metalearn.optim.muon import Muon

HIDDEN = {"hidden.weight", "deep.0.weight", "deep.1.weight"}
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adam_lr": 0.01, "adam_weight_decay": 0.05}


class Net(nn.Module):
    """Matrices in and out of hidden layers, and parameters of no, one and three dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(4, 3)
        self.deep = nn.ModuleList([nn.Linear(7, 4, bias=False), nn.Linear(4, 4)])
        self.table = nn.Parameter(torch.randn(9, 5))
        self.kernel, self.scale = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.tensor(1.0))


def gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def run(optimizers, net, steps, schedules=()):
    for step in steps:
        gradients(net, step)
        for each in (*optimizers, *schedules):
            each.step()


def assert_equal(ours, theirs):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def halved(step):
    return 0.5**step


def separate(net, hidden):
    """Torch's two optimizers with SETTINGS, the first for the parameters named ``hidden``."""
    of = {which: [p for name, p in net.named_parameters() if (name in hidden) is which] for which in (True, False)}
    muon = torch.optim.Muon(of[True], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(of[False], lr=0.01, weight_decay=0.05)


@pytest.mark.parametrize("named", [True, False])
def test_matches_torchs_two_optimizers_under_a_schedule(named):
    ours, theirs = Net(), Net()
    optimizer = Muon(ours.named_parameters() if named else ours.parameters(), **SETTINGS)
    twins = separate(theirs, HIDDEN if named else HIDDEN | {"embed.weight", "head.weight", "table"})
    run([optimizer], ours, range(5), [LambdaLR(optimizer, halved)])
    run(twins, theirs, range(5), [LambdaLR(twin, halved) for twin in twins])
    assert_equal(ours, theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 32, 0.01 / 32]
    if named:
        assert set(optimizer.param_groups[0]["param_names"]) == HIDDEN


def test_one_rate_serves_both_unless_the_rest_has_its_own():
    net = Net()
    assert [group["lr"] for group in Muon(net.named_parameters(), lr=0.3).param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("saved_by", ["state_dict", "deepcopy"])
def test_continues_bit_by_bit(saved_by):
    whole, net = Net(), Net()
    make = functools.partial(Muon, **SETTINGS)
    run([make(whole.named_parameters())], whole, range(6))
    optimizer = make(net.named_parameters())
    run([optimizer], net, range(3))
    if saved_by == "deepcopy":
        net, optimizer = copy.deepcopy((net, optimizer))
    else:
        torch.save(optimizer.state_dict(), file := io.BytesIO())
        file.seek(0)
        net = copy.deepcopy(net)
        optimizer = make(net.named_parameters())
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    run([optimizer], net, range(3, 6))
    assert_equal(whole, net)
    assert {len(optimizer.state[p]) for p in optimizer.param_groups[0]["params"]} == {1}  # Muon's momentum
    assert {len(optimizer.state[p]) for p in optimizer.param_groups[1]["params"]} == {3}  # Adam's step and averages


def test_groups_have_settings_of_their_own():
    ours, theirs = Net(), Net()
    groups = [{"params": list(ours.hidden.named_parameters()), "lr": 0.5, "adam_lr": 0.25, "adjust_lr": "original"}]
    optimizer = Muon(groups, lr=0.1)
    optimizer.add_param_group({"params": list(ours.deep.named_parameters(prefix="deep"))})
    first = torch.optim.Muon([theirs.hidden.weight], lr=0.5, weight_decay=0.0)
    second = torch.optim.AdamW([theirs.hidden.bias], lr=0.25, weight_decay=0.0)
    third = torch.optim.Muon(
        [theirs.deep[0].weight, theirs.deep[1].weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    fourth = torch.optim.AdamW([theirs.deep[1].bias], lr=0.1, weight_decay=0.0)
    run([optimizer], ours, range(3))
    run([first, second, third, fourth], theirs, range(3))
    assert_equal(ours, theirs)


def test_closure_is_called_once_for_both():
    calls, net = [], Net()

    def closure():
        calls.append(gradients(net, 0))
        return 3.0

    before = copy.deepcopy(net.state_dict())
    assert Muon(net.named_parameters()).step(closure) == 3.0 and len(calls) == 1
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("shapes", [[(3,)], [(3, 2)]])
def test_works_on_networks_of_one_kind_alone(shapes):
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Muon(params, lr=0.1)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert (params[0] < 1).all() and len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"adam_lr": -1.0}, "adam_lr is -1.0"),
        ({"momentum": -0.5}, "momentum is -0.5"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas is 1.0"),
        ({"adjust_lr": "none"}, "adjust_lr is 'none'; accepted: 'match_rms_adamw', 'original'"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Muon(Net().named_parameters(), **settings)


def test_refuses_settings_of_a_group_that_there_are_not():
    with pytest.raises(ValueError, match=r"has \['betas'\]; accepted: lr"):
        Muon([{"params": list(Net().parameters()), "betas": (0.9, 0.9)}])
