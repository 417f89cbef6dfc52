"""Programs that several files ask about: quadratic levels, which have closed forms, and a regression that weights its rows."""

import copy
import functools

import torch
from torch import nn

from metalearn import tree
from metalearn.base import Response
from metalearn.estimators.implicit import ConjugateGradient
from metalearn.estimators.unrolled import Unrolled
from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD, Adam
from metalearn.random import integers, key, normal

D = 4
RATE = 2 / 2.6
KEY = key(7)
CG = ConjugateGradient(D, damping=0.0)


class Vector(nn.Module):
    """Raw parameters."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(start.clone())


def vector(*labels, size=D):
    return normal(key(3, *labels), (size,)).double()


@functools.cache
def matrix(label):
    return normal(key(3, label), (D, D)).double() / 2


@functools.cache
def curvature(label):
    """A dense symmetric matrix with eigenvalues between 1 and 1.6: gradient descent at RATE gains a factor of 4.3 a step."""
    q, _ = torch.linalg.qr(matrix(label))
    return q @ torch.diag(torch.linspace(1, 1.6, D).double()) @ q.T


def pull(name, values, bent=False):
    """b + sum_i B_i u_i, or of tanh(u_i)."""
    terms = [matrix(f"{name} {of}") @ (u.tanh() if bent else u) for of, u in values.items()]
    return vector(name, "b") + sum(terms)


def minimum(name, bent=False, **values):
    return torch.linalg.solve(curvature(name), pull(name, values, bent))


def level(name, above, steps, estimator=None, bent=False):
    """The loss x^T A x / 2 - x^T pull(uppers)."""

    def loss(nets, batch):
        x = getattr(nets, name).params["x"]
        return x @ curvature(name) @ x / 2 - x @ pull(name, {of: getattr(nets, of).params["x"] for of in above}, bent)

    return Problem(name, Vector(vector(name)), SGD(RATE), loss, unroll_steps=steps, estimator=estimator)


def objective(t, low):
    return (matrix("E") @ low - vector("e")).square().sum() / 2 + 0.05 * t.square().sum()


def top(estimator=None, size=D):
    def loss(nets, batch):
        return objective(nets.top.params["x"], nets.low.params["x"])

    return Problem("top", Vector(vector("top", size=size)), SGD(0.1), loss, estimator=estimator)


def pair(top_estimator=None, low_estimator=None):
    low = level("low", ["top"], 5, low_estimator)
    return Graph([top(top_estimator), low], {"top": ["low"]}, {"low": ["top"]})


def chain(low=None, middle=None, steps=(15, 15), top_estimator=None, roll_back=False):
    """top sees low, low depends on middle, middle depends on top."""
    levels = [level("middle", ["top"], steps[1], middle), level("low", ["middle"], steps[0], low)]
    edges = {"top": ["low"]}, {"low": ["middle"], "middle": ["top"]}
    return Graph([top(top_estimator), *levels], *edges, roll_back=roll_back)


def of_top(graph):
    return graph.gradients(graph.init(KEY), KEY)["top"]["x"]


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def shifted(graph, state, name, along, shift):
    """The loss that the top logs after a round from parameters moved by ``shift * along``."""
    at = state["levels"][name]
    levels = state["levels"] | {name: at._replace(params=tree.add(at.params, along, shift))}
    return graph.step(state | {"levels": levels}, KEY)[1][f"{name}/loss"]


def slope(graph, state, name, along, step=1e-5):
    forth, back = (shifted(graph, state, name, along, shift) for shift in (step, -step))
    return (forth - back) / (2 * step)


class WatchedResponse(Response):
    def __init__(self, estimator, window, inner):
        self.estimator, self.window, self.inner = estimator, window, inner

    def vjp(self, cotangent):
        self.estimator.calls += 1
        if self.estimator.fake is None:
            return self.inner.vjp(cotangent)
        return {name: self.estimator.fake * cotangent["x"] for name in self.window.meta}


class Watched(Unrolled):
    """Counts vector-Jacobian products, and can put a multiple of the identity in the place of each."""

    def __init__(self, fake=None):
        super().__init__()
        self.fake, self.calls = fake, 0

    def response(self, problem, window):
        self.window = window
        return WatchedResponse(self, window, super().response(problem, window))


def diamond(low=15, left=15, right=15):
    """top sees low and left; low depends on left, right and top, and they on top."""
    above = {"low": ["left", "right", "top"], "left": ["top"], "right": ["top"]}
    steps = {"low": low, "left": left, "right": right}
    levels = [level(name, above[name], steps[name], CG, bent=True) for name in above]

    def loss(nets, batch):
        return objective(nets.top.params["x"], nets.low.params["x"]) + (nets.left.params["x"] @ vector("direct")).sin()

    return Graph([Problem("top", Vector(vector("top")), SGD(0.1), loss), *levels], {"top": ["low", "left"]}, above)


def batch_normalised():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()


def with_dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)).double()


def reweighting(module, rule=None, estimator=None, top_estimator=None, **options):
    """A regression of which half the training rows, those with -1 in the last column, have the wrong sign; all are weighted.

    The weights come from a small network that is shown that column, learned on rows that are right.
    """
    module = copy.deepcopy(module)  # a functional call borrows the module, which threads must not share
    dtype = next(module.parameters()).dtype
    x = normal(key(1, "x"), (64, 4)).to(dtype)
    x[:, 3] = torch.tensor([1, -1]).repeat(32)
    y = x[:, :3] @ torch.tensor([1.0, -2.0, 0.5], dtype=dtype)

    def draw(batch_key):
        rows = integers(batch_key, (16,), 64)
        return x[rows], y[rows]

    def error(nets, batch):
        return (nets.inner(batch[0]).squeeze(-1) - batch[1]).square()

    def weighted(nets, batch):
        weights = nets.outer(batch[0][:, 3:]).sigmoid().squeeze(-1)
        return {"loss": (weights * error(nets, (batch[0], batch[1] * batch[0][:, 3]))).mean(), "weight": weights.mean()}

    weigh = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    outer = Problem(
        "outer", weigh, rule or Adam(0.1), lambda nets, batch: error(nets, batch).mean(), draw, estimator=top_estimator
    )
    inner = Problem("inner", module, Adam(0.02), weighted, draw, 5, estimator, **options)
    return Graph([outer, inner], {"outer": ["inner"]}, {"inner": ["outer"]})


def strangers(names):
    return [
        Problem(name, Vector(vector(name)), SGD(0.1), lambda nets, batch: nets.b.params["x"].sum()) for name in names
    ]
