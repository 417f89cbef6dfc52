"""Who steps when: the schedule, windows that are replayed or rolled back."""

import torch
from multilevel.conftest import (
    CG,
    KEY,
    RATE,
    Vector,
    Watched,
    chain,
    curvature,
    diamond,
    level,
    minimum,
    objective,
    pull,
    vector,
)

from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD
from metalearn.tree import pack


def pair_under_top():
    """top sees middle, which depends on it; middle sees low, which depends on middle."""

    def seen(nets, batch):
        return objective(nets.top.params["x"], nets.middle.params["x"])

    def seeing(nets, batch):
        x, t = nets.middle.params["x"], nets.top.params["x"]
        return x @ curvature("middle") @ x / 2 - x @ pull("middle", {"top": t}) + objective(x, nets.low.params["x"])

    first = Problem("top", Vector(vector("top")), SGD(0.1), seen)
    middle = Problem(
        "middle", Vector(vector("middle")), SGD(0.2, momentum=0.5), seeing, unroll_steps=3, estimator=Watched()
    )
    edges = {"top": ["middle"], "middle": ["low"]}, {"low": ["middle"], "middle": ["top"]}
    return Graph([first, middle, level("low", ["middle"], 15, CG)], *edges)


def test_a_middle_level_steps_by_its_whole_gradient_and_is_replayed_bit_by_bit():
    graph = pair_under_top()
    state, _ = graph.step(graph.init(KEY), KEY)
    x, momentum = vector("middle"), 0.0
    for _ in range(3):
        variable = x.clone().requires_grad_()
        low, t = minimum("low", middle=variable), vector("top")
        loss = (
            variable @ curvature("middle") @ variable / 2
            - variable @ pull("middle", {"top": t})
            + objective(variable, low)
        )
        momentum = 0.5 * momentum + torch.autograd.grad(loss, variable)[0]
        x = x - 0.2 * momentum
    middle = state["levels"]["middle"]
    torch.testing.assert_close(middle.params["x"], x, rtol=1e-8, atol=0)
    estimator = graph.problems["middle"].estimator
    assert estimator.calls == 1
    for name, leaf in pack(estimator.window.end).items():
        assert torch.equal(leaf, pack(middle)[name])


def steps_of(state):
    return {name: int(at.step) for name, at in state["levels"].items()}


def test_steps_as_often_as_the_levels_above_wait_for():
    graph = chain(steps=(3, 2))
    state = graph.init(KEY)
    for rounds in (1, 2):
        state, _ = graph.step(state, KEY)
        assert steps_of(state) == {"top": rounds, "middle": 2 * rounds, "low": 6 * rounds}


def test_a_level_below_several_others_serves_them_at_once():
    graph = diamond(low=3, left=2, right=1)
    assert steps_of(graph.step(graph.init(KEY), KEY)[0]) == {"top": 1, "low": 6, "left": 2, "right": 1}


def test_tops_of_different_pace_step_once_each():
    def seeing(name, lower):
        def loss(nets, batch):
            return objective(getattr(nets, name).params["x"], getattr(nets, lower).params["x"])

        return Problem(name, Vector(vector(name)), SGD(0.1), loss)

    levels = [level("middle", ["slow"], 3), level("low", ["middle", "quick"], 2)]
    sees = {"slow": ["low"], "quick": ["low"]}
    graph = Graph(
        [seeing("slow", "low"), seeing("quick", "low"), *levels], sees, {"middle": ["slow"], "low": ["middle", "quick"]}
    )
    state, log = graph.step(graph.init(KEY), KEY)
    assert steps_of(state) == {"slow": 1, "quick": 1, "middle": 3, "low": 6}
    assert {"slow/loss", "quick/loss", "middle/loss", "low/loss"} <= log.keys()


def test_a_level_under_two_paces_sees_a_change_above_it_at_once():
    """``a`` steps in the third sweep, in the middle of ``middle``'s second window, which four steps of ``p`` prolong."""
    seen = []

    def watching(nets, batch):
        seen.append(nets.a.params["x"].detach())
        return nets.middle.params["x"].square().sum()

    def simple(name, steps=1):
        return Problem(
            name,
            Vector(vector(name)),
            SGD(0.1),
            lambda nets, batch: getattr(nets, name).params["x"].square().sum(),
            unroll_steps=steps,
        )

    middle = Problem("middle", Vector(vector("middle")), SGD(0.1), watching, unroll_steps=2)
    others = [simple("a"), simple("b"), simple("p", 4), simple("n", 3), simple("low"), simple("lower")]
    above = {"p": ["b"], "n": ["a"], "middle": ["a", "p"], "low": ["middle"], "lower": ["n"]}
    state, _ = (graph := Graph([middle, *others], {}, above)).step(graph.init(KEY), KEY)
    assert steps_of(state) == {"a": 1, "b": 1, "p": 4, "n": 3, "middle": 8, "low": 8, "lower": 3}
    moved = state["levels"]["a"].params["x"]
    assert [torch.equal(x, moved) for x in seen] == [False] * 3 + [True] * 5


def test_roll_back_takes_one_step_from_the_start_of_the_window():
    graph = chain(steps=(3, 1), roll_back=True)
    state = graph.init(KEY)
    after, without = graph.step(state, KEY)[0], chain(steps=(3, 1)).step(state, KEY)[0]
    x = {name: at.params["x"] for name, at in after["levels"].items()}
    assert torch.equal(x["top"], without["levels"]["top"].params["x"])
    for name, above in (("middle", "top"), ("low", "middle")):
        start = vector(name)
        wanted = start - RATE * (curvature(name) @ start - pull(name, {above: x[above]}))
        torch.testing.assert_close(x[name], wanted, rtol=1e-12, atol=0)
    assert steps_of(after) == {"top": 1, "middle": 1, "low": 1}
