"""Estimators at the top, to which all levels below are one inner problem."""

import pytest
import torch
from multilevel.conftest import KEY, D, Vector, curvature, distance, level, objective, of_top, pair, slope, top, vector
from torch import nn

from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardGradient, ForwardMode, ZerothOrder
from metalearn.estimators.unrolled import Unrolled
from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD
from metalearn.random import key, normal
from metalearn.tree import pack


@pytest.mark.parametrize("warm_start", [False, True])
def test_forward_mode_at_the_top_matches_the_graphs_own_gradient(warm_start):
    own, forward = pair(), pair(ForwardMode(warm_start=warm_start))
    states = [own.init(KEY), forward.init(KEY)]
    for _ in range(3):
        wanted, found = (
            graph.gradients(state, KEY)["top"]["x"] for graph, state in zip((own, forward), states, strict=True)
        )
        assert distance(found, wanted) <= 1e-10
        states = [graph.step(state, KEY)[0] for graph, state in zip((own, forward), states, strict=True)]
    ends = [state["levels"]["low"].params["x"] for state in states]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=0)


class Dropped(Vector):
    """Raw parameters, and the same after dropout."""

    def __init__(self, start):
        super().__init__(start)
        self.dropout = nn.Dropout(0.4)

    def forward(self):
        return self.dropout(self.x)


def noisy_pair(estimator=None):
    """A pair in which nothing but the top's loss draws: masks for the lower's parameters, and a batch."""

    def loss(nets, batch):
        return objective(nets.top.params["x"] + batch, nets.low())

    def noise(batch_key):
        return normal(batch_key, (D,)).double()

    above = Problem("top", Vector(vector("top")), SGD(0.1), loss, noise, estimator=estimator)
    below = level("low", ["top"], 5)
    below.module = Dropped(vector("low"))
    return Graph([above, below], {"top": ["low"]}, {"low": ["top"]})


NOISY = {
    "Unrolled": lambda: Unrolled("store", warm_start=True),
    "ForwardMode": lambda: ForwardMode(warm_start=True),
    "ForwardGradient": lambda: ForwardGradient(1, warm_start=True),
    "ForwardGradient by vmap": lambda: ForwardGradient(3, warm_start=True),
}


@pytest.mark.parametrize("name", NOISY)
def test_draws_of_the_tops_loss_come_from_the_key_alone(name):
    graph, ends = noisy_pair(NOISY[name]()), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before, state = torch.get_rng_state(), graph.init(KEY)
        for _ in range(2):
            state, log = graph.step(state, KEY)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(pack(state) | {"loss": log["top/loss"]})
    assert all(torch.equal(leaf, ends[1][place]) for place, leaf in ends[0].items())


@pytest.mark.parametrize("name", ["Unrolled", "ForwardMode", "ForwardGradient"])
def test_draws_of_the_tops_loss_are_those_of_the_graphs_own_gradient(name):
    """A single random direction v of signs gives ``<gradient, v> v``, whose signs are those of v or -v."""
    own, graph = noisy_pair(), noisy_pair(NOISY[name]())
    for run in (key(seed) for seed in range(3)):
        wanted, found = (each.gradients(each.init(run), run)["top"]["x"] for each in (own, graph))
        if name == "ForwardGradient":
            wanted = (wanted @ found.sign()) * found.sign()
        assert distance(found, wanted) <= 1e-10


def scalar_chain(estimator):
    """A chain with one parameter at the top, where any direction gives the whole gradient."""

    def loss(nets, batch):
        x = nets.middle.params["x"]
        return x @ curvature("middle") @ x / 2 - (x * nets.top.params["x"]).sum()

    middle = Problem("middle", Vector(vector("middle")), SGD(0.5), loss, unroll_steps=2)
    levels = [top(estimator, size=1), middle, level("low", ["middle"], 3)]
    return Graph(levels, {"top": ["low"]}, {"low": ["middle"], "middle": ["top"]})


def wanted_of_scalar_chain():
    plain = scalar_chain(None)
    return slope(plain, plain.init(KEY), "top", {"x": torch.ones(1).double()})


def test_zeroth_order_above_three_levels_matches_a_difference_of_runs():
    found = of_top(scalar_chain(ZerothOrder(1, 1e-5, method="central", chunk=1)))
    assert distance(found, wanted_of_scalar_chain()) <= 1e-6


def test_evolution_above_three_levels_has_the_right_sign():
    """Its estimate is the derivative times the mean over pairs of eps^2 / std^2, which is 1 on average."""
    ratio = of_top(scalar_chain(PersistentES(4, 1e-3, vectorised=False))) / wanted_of_scalar_chain()
    assert 0.1 < ratio < 4
