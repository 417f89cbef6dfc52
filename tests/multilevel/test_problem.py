"""What a problem refuses, what its loss may see, which rows a rank gets."""

import pytest
import torch
from multilevel.conftest import KEY, Vector, strangers, vector

from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a-b"}, "accepted: a Python identifier"),
        ({"loss": None}, "one has the loss None"),
        ({"unroll_steps": 0}, "unroll_steps is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"precision": "16"}, "precision is '16'"),
    ],
)
def test_refuses_problems_that_make_no_sense(options, message):
    usual = {"name": "one", "module": Vector(vector("one")), "rule": SGD(0.1), "loss": lambda nets, batch: None}
    with pytest.raises(ValueError, match=message):
        Problem(**usual | options)


def test_a_loss_may_see_only_what_it_has_edges_to():
    graph = Graph(strangers("ab"), {}, {})
    with pytest.raises(ValueError, match="a asks for the network 'b'; accepted: a"):
        graph.step(graph.init(KEY), KEY)


def test_a_loss_must_be_a_scalar():
    graph = Graph([Problem("a", Vector(vector("a")), SGD(0.1), lambda nets, batch: nets.a.params["x"])], {}, {})
    with pytest.raises(ValueError, match=r"the loss of a returned .*\(4,\).*; accepted: a scalar"):
        graph.step(graph.init(KEY), KEY)


def test_ranks_share_rows_equally_or_not_at_all():
    problem = Problem("a", Vector(vector("a")), SGD(0.1), lambda nets, batch: None, lambda batch_key: torch.arange(6))
    problem.rank, problem.world = 1, 3
    assert problem.data(KEY).tolist() == [2, 3]
    problem.world = 4
    with pytest.raises(ValueError, match=r"shape \(6,\); accepted: a first axis that is a multiple of the 4 ranks"):
        problem.data(KEY)
