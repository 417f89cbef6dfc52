"""Small problems for ``LearnedOptimizer``, and rules that are given lively weights."""

import torch
from torch import nn

from metalearn import random
from metalearn.optim.learned import LearnedRule, count


class LossScaled(LearnedRule):
    """Gradient descent at the rate of the loss, which counts its steps."""

    needs_loss = True

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate

    def init_meta(self, key):
        return {"factor": torch.ones(())}

    def start(self, meta, layout, params_P):
        return {"step": count(params_P)}

    def direction(self, meta, layout, grads_P, state, params_P, loss):
        return self.rate * meta["factor"] * loss * grads_P, {"step": state["step"] + 1}


def lively(kind, **settings):
    """A rule whose every weight matters."""
    rule = kind(**settings)
    drawn = rule.init_meta(random.key(1, "weights"))
    rule.weights = {
        name: value + 0.1 * random.normal(random.key(2, name), value.shape) for name, value in drawn.items()
    }
    return rule


def problem(dtype=torch.float32):
    """Parameters of 0, 1, 2 and 4 axes, and a loss that all of them enter."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (3,), (4, 3), (3, 2, 2, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    targets = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return params, lambda: sum(((p - t) ** 4).sum() for p, t in zip(params, targets, strict=True))


def descend(optimizer, loss, steps, without=()):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        for p in without:
            p.grad = None
        optimizer.step()


def by_name(params):
    return {str(place): p.detach().clone() for place, p in enumerate(params)}


def functional_run(rule, params, loss, steps):
    """The parameters after updates of the rule alone, and its state."""
    values, state = by_name(params), rule.init({}, by_name(params))
    for _ in range(steps):
        for name, p in enumerate(params):
            p.data = values[str(name)].clone()
            p.grad = None
        loss().backward()
        values, state = rule.update({}, {str(name): p.grad for name, p in enumerate(params)}, state, values)
    return values, state


def assert_same(params, others, tolerance=0.0):
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=0, atol=tolerance)
