"""Which edges make a program, and what is shared where paths do."""

import pytest
from multilevel.conftest import Vector, Watched, level, objective, of_top, strangers, vector

from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD


def test_takes_one_product_per_problem_however_many_paths():
    """Six rungs of two problems each, all connected: 2^6 paths, 12 responses."""
    rungs = [[f"a{i}", f"b{i}"] for i in range(6)]
    above = {name: (rungs[i - 1] if i else ["top"]) for i, rung in enumerate(rungs) for name in rung}
    watched = {name: Watched() for name in above}
    levels = [level(name, above[name], 1, watched[name]) for name in above]

    def loss(nets, batch):
        return objective(nets.top.params["x"], nets.a5.params["x"] + nets.b5.params["x"])

    graph = Graph([Problem("top", Vector(vector("top")), SGD(0.1), loss), *levels], {"top": rungs[-1]}, above)
    assert len(list(graph.edges.paths("top"))) == 2**6
    of_top(graph)
    assert [estimator.calls for estimator in watched.values()] == [1] * 12


@pytest.mark.parametrize(
    ("names", "sees", "seen_by", "message"),
    [
        ("", {}, {}, "problems is []"),
        ("aa", {}, {}, "two problems have the name 'a'"),
        ("ab", {"a": ["c"]}, {}, "upper_to_lower names 'c'; accepted: a, b"),
        ("ab", {}, {"c": ["a"]}, "lower_to_upper names 'c'; accepted: a, b"),
        ("ab", {}, {"b": "a"}, "accepted: a list of names"),
        ("ab", {}, {"b": ["a", "a"]}, "accepted: different names"),
        ("abc", {}, {"a": ["b"], "b": ["c"], "c": ["a"]}, "the cycle a -> b -> c -> a"),
        ("a", {}, {"a": ["a"]}, "the cycle a -> a"),
        ("ab", {"a": ["b"]}, {}, "no path of lower_to_upper leads from b back to a"),
        ("abc", {"a": ["b"]}, {"b": ["c"]}, "no path of lower_to_upper leads from b back to a"),
        ("ab", {"a": ["b"], "b": ["a"]}, {"b": ["a"]}, "b sees a, but no path"),
    ],
)
def test_refuses_edges_that_make_no_sense(names, sees, seen_by, message):
    with pytest.raises(ValueError) as error:
        Graph(strangers(names), sees, seen_by)
    assert message in str(error.value)
