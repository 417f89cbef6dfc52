"""Schedules against their formulas in plain Python."""

import math

import pytest
import torch

from metalearn.optim.first_order import SGD, Scheduled
from metalearn.optim.schedules import Cosine, InverseTime, Linear


def warm(t: int, warmup: int) -> float:
    return min(1.0, (t + 1) / warmup) if warmup else 1.0


def ratio(t: int, warmup: int, total: int) -> float:
    return min(max((t - warmup) / (total - warmup), 0.0), 1.0)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (Linear(20, 4, 0.1), lambda t: warm(t, 4) * (1 - 0.9 * ratio(t, 4, 20))),
        (Cosine(20), lambda t: (1 + math.cos(math.pi * ratio(t, 0, 20))) / 2),
        (Cosine(20, 4, 0.1), lambda t: warm(t, 4) * (0.1 + 0.9 * (1 + math.cos(math.pi * ratio(t, 4, 20))) / 2)),
        (InverseTime(5, 1.5), lambda t: (1 + t / 5) ** -1.5),
    ],
)
def test_matches_formula(schedule, formula):
    together = schedule(torch.arange(30))
    for t in range(30):
        assert float(schedule(torch.tensor(t))) == pytest.approx(formula(t), abs=1e-14)
        assert float(together[t]) == pytest.approx(formula(t), abs=1e-14)


def test_linear_decay_matches_torch():
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([p], lr=1.0)
    twin = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=7)
    schedule = Linear(7, final=0.2)
    for t in range(10):
        assert float(schedule(torch.tensor(t))) == pytest.approx(twin.get_last_lr()[0], abs=1e-14)
        optimizer.step()
        twin.step()


def test_builds_from_a_configuration():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rule", type=Scheduled)
    decay = {"class_path": "metalearn.optim.schedules.Cosine", "init_args": {"total_steps": 9}}
    inner = {"class_path": "metalearn.optim.first_order.SGD", "init_args": {"lr": 0.5}}
    config = {
        "rule": {"class_path": "metalearn.optim.first_order.Scheduled", "init_args": {"rule": inner, "schedule": decay}}
    }
    rule = parser.instantiate(parser.parse_object(config)).rule
    assert isinstance(rule.rule, SGD)
    assert rule.settings["lr"] == 0.5
    assert rule.schedule.total_steps == 9


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Cosine(5, 5), "total_steps is 5"),
        (lambda: Linear(5, -1), "warmup_steps is -1"),
        (lambda: Linear(5, final=-0.1), "final is -0.1"),
        (lambda: InverseTime(0), "steps is 0"),
        (lambda: InverseTime(5, -1.0), "power is -1.0"),
    ],
)
def test_refuses(build, named):
    with pytest.raises(ValueError, match=named):
        build()
