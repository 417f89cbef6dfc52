"""One level: derivatives of its steps, its batches, its precision, its share of a distributed run."""

import threading

import pytest
import torch
from multilevel.conftest import KEY, Vector, batch_normalised, reweighting, slope
from torch import nn

from metalearn import tree
from metalearn.estimators.implicit import Identity
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD
from metalearn.random import key, normal
from metalearn.tree import pack


def test_accumulation_matches_a_joined_batch():
    def run(size, accumulate):
        rows = iter(normal(key(2, "rows"), (400, 3)).double().split(size))
        options = {"data": lambda batch_key: next(rows), "accumulate": accumulate}

        def fit(nets, batch):
            return (batch[:, :2] @ nets.inner.params["x"] - batch[:, 2]).square().mean()

        def penalised(nets, batch):
            return fit(nets, batch) + (nets.inner.params["x"] * nets.outer.params["x"]).square().sum()

        outer = Problem("outer", Vector(torch.ones(2).double()), SGD(0.3), fit, **options)
        inner = Problem(
            "inner", Vector(torch.zeros(2).double()), SGD(0.1, momentum=0.5), penalised, unroll_steps=3, **options
        )
        graph = Graph([outer, inner], {"outer": ["inner"]}, {"inner": ["outer"]})
        state = graph.init(KEY)
        for _ in range(2):
            state, _ = graph.step(state, KEY)
        return pack(state["levels"])

    joined, accumulated = run(20, 1), run(5, 4)
    assert not torch.equal(joined["outer/params/x"], torch.ones(2).double())
    for name, value in joined.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_matches_finite_differences_of_the_program_itself(mode):
    """Adam, minibatches, batch statistics: whatever is done between two steps of the top is differentiated."""
    graph = reweighting(batch_normalised(), estimator=Unrolled(mode))
    state = graph.init(KEY)
    found = graph.gradients(state, KEY)["outer"]
    along = {name: normal(key(5, name), tuple(value.shape)).double() for name, value in found.items()}
    torch.testing.assert_close(tree.dot(found, along), slope(graph, state, "outer", along), rtol=1e-6, atol=0)


class Ranks:
    """Means over threads that stand for the processes of a distributed run."""

    def __init__(self, world):
        self.barrier, self.given = threading.Barrier(world, timeout=60), [{}] * world

    def mean(self, rank):
        def reduce(grads):
            self.given[rank] = grads
            self.barrier.wait()
            means = {name: torch.stack([given[name] for given in self.given]).mean(0) for name in grads}
            self.barrier.wait()
            return means

        return reduce


def step_on_ranks(graphs, start):
    """What each rank has after a step from ``start``."""
    ranks, found = Ranks(len(graphs)), {}

    def run(rank):
        graphs[rank].distribute(rank, len(graphs), ranks.mean(rank))
        found[rank] = pack(graphs[rank].step(start, KEY)[0])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(graphs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(graphs))]


@pytest.mark.parametrize("estimator", [None, Identity(0.02)], ids=["Unrolled", "Identity"])
def test_ranks_match_one_process_on_the_whole_batch(estimator):
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    one, *two = (reweighting(module, SGD(0.5), estimator) for _ in range(3))
    start = one.init(KEY)
    wanted = pack(one.step(start, KEY)[0])
    found, other = step_on_ranks(two, start)
    assert all(torch.equal(leaf, other[name]) for name, leaf in found.items())
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-11, atol=1e-13)


def watch(graph):
    """The rows that every loss is given from now on, by problem: no mean over ranks tells shares from whole batches."""
    seen = {name: [] for name in graph.problems}
    for name, problem in graph.problems.items():

        def loss(nets, batch, own=problem.loss, rows=seen[name]):
            rows.append(batch[0])
            return own(nets, batch)

        problem.loss = loss
    return seen


@pytest.mark.parametrize("estimator", [None, Identity(0.02)], ids=["Unrolled", "Identity"])
def test_ranks_see_their_share_of_every_batch_and_no_more(estimator):
    one, *two = (reweighting(nn.Linear(4, 1).double(), SGD(0.5), estimator) for _ in range(3))
    start = one.init(KEY)
    whole, *shares = (watch(graph) for graph in (one, *two))
    one.step(start, KEY)
    step_on_ranks(two, start)
    for name, batches in whole.items():
        assert batches and all(len(batch) == 16 for batch in batches)
        for batch, first, second in zip(batches, *(seen[name] for seen in shares), strict=True):
            assert torch.equal(torch.cat([first, second]), batch) and len(first) == len(second)


def test_half_precision_is_of_the_loss_alone():
    def run(precision):
        graph = reweighting(nn.Linear(4, 1), SGD(0.1), precision=precision)
        return graph.gradients(graph.init(KEY), KEY)["outer"]

    full, half = run("32"), run("bf16")
    assert all(value.dtype == torch.float32 for value in half.values())
    assert 1e-6 < tree.norm(tree.add(half, full, -1.0)) / tree.norm(full) < 0.1
