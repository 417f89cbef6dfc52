"""Two optimizers under a guard on a small regression."""

import functools

import torch
from torch import nn
from torch.nn import functional

from metalearn.optim.guard import LossGuard
from metalearn.optim.small_mlp import SmallMLP
from metalearn.optim.torch_face import LearnedOptimizer

PERIOD, STEPS = 4, 18
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
LEARNED = {
    "adam": functools.partial(torch.optim.Adam, lr=0.05),  # good on some periods and not on others
    "rule": functools.partial(LearnedOptimizer, rule=SmallMLP(), lr=20.0),
    "explodes": functools.partial(torch.optim.SGD, lr=30.0),
}


class Breaks(torch.optim.SGD):
    """Goes to no number at all at its third step, and keeps none of its momenta sound."""

    def step(self, closure=None):
        returned = super().step(closure)
        for p in self.param_groups[0]["params"]:
            count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
            if count == 3:
                with torch.no_grad():
                    p.fill_(float("nan"))
                self.state[p]["momentum_buffer"].fill_(float("inf"))
        return returned


LEARNED["breaks"] = functools.partial(Breaks, lr=0.2, momentum=0.9)


class Task:
    """A regression whose batch is a function of the step."""

    def __init__(self, dropout=0.0):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1)).double()
        self.params = list(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(STEPS + 2, 8, 3, generator=generator, dtype=torch.float64)
        self.y = self.x.sin().sum(-1, keepdim=True)

    def loss(self, step):
        return functional.mse_loss(self.model(self.x[step]), self.y[step])

    def closure(self, step, calls=None):
        def closure():
            self.model.zero_grad()
            loss = self.loss(step)
            loss.backward()
            if calls is not None:
                calls.append(loss.item())
            return loss

        return closure

    def point(self):
        return [p.detach().clone() for p in self.params]

    def move(self, point):
        for p, value in zip(self.params, point, strict=True):
            p.data = value.clone()


def alone(optimizer, steps=STEPS):
    """The points that an optimizer goes through by itself."""
    task = Task()
    optimizer, points = optimizer(task.params), []
    for step in range(steps):
        optimizer.step(task.closure(step))
        points.append(task.point())
    return points


def guarded(learned, guard=SGD, kind=LossGuard, task=None, **settings):
    task = task or Task()
    return kind(learned(task.params), guard(task.params), **settings), task


def run(optimizer, task, steps):
    points = []
    for step in steps:
        optimizer.step(task.closure(step))
        points.append(task.point())
    return points


def assert_same(points, others):
    torch.testing.assert_close(points, others, rtol=0, atol=0)


def descended(p, loss):
    p.grad = None
    loss.backward()
    return loss
