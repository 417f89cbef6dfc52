"""Hypergradients of whole programs, and what a graph refuses, shows and resumes."""

import pytest
import torch
from estimators.conftest import ridge
from multilevel.conftest import (
    CG,
    KEY,
    RATE,
    D,
    Vector,
    Watched,
    batch_normalised,
    chain,
    curvature,
    diamond,
    distance,
    matrix,
    minimum,
    objective,
    of_top,
    pair,
    reweighting,
    top,
    vector,
    with_dropout,
)
from torch import nn

from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardGradient, ForwardMode, ZerothOrder
from metalearn.estimators.implicit import SAMA, ConjugateGradient, Identity, Neumann
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD, Adam, Clipped
from metalearn.tree import pack, unpack


def chain_gradient():
    """d/dt objective(t, low*(middle*(t))) by linear algebra."""
    t = vector("top")
    residual = matrix("E") @ minimum("low", middle=minimum("middle", top=t)) - vector("e")
    by_middle = matrix("low middle").T @ torch.linalg.solve(curvature("low"), matrix("E").T @ residual)
    return 0.1 * t + matrix("middle top").T @ torch.linalg.solve(curvature("middle"), by_middle)


EXACT = [*(Unrolled(mode) for mode in MODES), CG, Neumann(20, RATE)]
PAIRS = [(estimator, CG) for estimator in EXACT] + [(CG, estimator) for estimator in EXACT if estimator is not CG]


@pytest.mark.parametrize(("low", "middle"), PAIRS, ids=lambda e: type(e).__name__ + vars(e).get("mode", ""))
def test_matches_the_closed_form_of_three_levels(low, middle):
    assert distance(of_top(chain(low, middle)), chain_gradient()) <= 1e-8


@pytest.mark.parametrize("estimator", [Unrolled(), ConjugateGradient(6, damping=0.0)], ids=lambda e: type(e).__name__)
def test_matches_the_analytic_hypergradient_of_ridge(estimator):
    problem, meta = ridge()

    def inner(nets, batch):
        penalty = nets.outer.params["x"].exp() * nets.inner.params["x"].square()
        return half_square(nets, batch) + penalty.sum() / 2

    def half_square(nets, batch):
        return (batch[0] @ nets.inner.params["x"] - batch[1]).square().mean() / 2

    outer = Problem("outer", Vector(meta["log_penalty"]), SGD(0.1), half_square, lambda k: problem.validation)
    start = Vector(torch.zeros_like(meta["log_penalty"]))
    lower = Problem("inner", start, SGD(0.3), inner, lambda k: problem.train, 250, estimator)
    graph = Graph([outer, lower], {"outer": ["inner"]}, {"inner": ["outer"]})
    found = graph.gradients(graph.init(KEY), KEY)["outer"]["x"]
    assert distance(found, problem.hypergradient(meta)["log_penalty"]) <= 1e-10


@pytest.mark.parametrize("fake", [0.0, 1.0])
@pytest.mark.parametrize("middle", [False, True])
def test_three_levels_need_every_response(fake, middle):
    estimators = (CG, Watched(fake)) if middle else (Watched(fake), CG)
    assert distance(of_top(chain(*estimators)), chain_gradient()) > 0.1


def test_matches_finite_differences_where_paths_meet():
    graph = diamond()
    assert len(list(graph.edges.paths("top"))) == 4

    def end_to_end(t):
        left, right = minimum("left", bent=True, top=t), minimum("right", bent=True, top=t)
        low = minimum("low", bent=True, left=left, right=right, top=t)
        return objective(t, low) + (left @ vector("direct")).sin()

    t, basis = vector("top"), torch.eye(D).double() * 1e-5
    wanted = torch.stack([(end_to_end(t + e) - end_to_end(t - e)) / 2e-5 for e in basis])
    assert distance(of_top(graph), wanted) <= 1e-7


@pytest.mark.parametrize(
    "estimator", [None, SAMA(), Identity(0.02), ConjugateGradient(3)], ids=lambda e: type(e).__name__
)
def test_learns_which_rows_are_wrong(estimator):
    graph = reweighting(batch_normalised(), estimator=estimator)
    state = graph.init(KEY)

    def preference(state):
        right, wrong = graph.nets(state).outer(torch.tensor([[1.0], [-1.0]]).double()).sigmoid()
        return float(right - wrong)

    before = preference(state)
    for _ in range(12):
        state, log = graph.step(state, KEY)
    assert preference(state) > before + 0.3
    assert 0 < log["inner/weight"] < 1 and log["inner/loss"] > 0 and log["outer/gradient_norm"] > 0
    assert ("inner/residual" in log) == isinstance(estimator, ConjugateGradient)
    assert not torch.equal(state["levels"]["inner"].buffers["1.running_mean"], torch.zeros(8).double())


LINEAR = nn.Linear(4, 1).double()
PROGRAMS = {
    "two levels": lambda: reweighting(with_dropout(), Clipped(Adam(0.1), 0.1)),
    "three levels": lambda: chain(SAMA(), None, steps=(3, 2)),
    "an estimator at the top": lambda: reweighting(LINEAR, SGD(0.1), top_estimator=ForwardGradient(2, warm_start=True)),
    "particles at the top": lambda: reweighting(LINEAR, SGD(0.1), top_estimator=PersistentES(2, 0.1)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_resumes_bit_by_bit(program):
    graph, again, packed = PROGRAMS[program](), PROGRAMS[program](), []
    state = graph.init(KEY)
    for _ in range(3):
        state = graph.step(state, KEY)[0]
        packed.append(pack(state))
    saved = {name: leaf.clone() for name, leaf in packed[0].items()}
    resumed = unpack(again.init(KEY), saved)
    for _ in range(2):
        resumed = again.step(resumed, KEY)[0]
    assert all(torch.equal(leaf, packed[2][name]) for name, leaf in pack(resumed).items())
    assert all(torch.equal(leaf, packed[0][name]) for name, leaf in saved.items())
    assert all(not torch.equal(leaf, packed[2][name]) for name, leaf in saved.items() if "/params/" in name)


def test_validation_is_in_evaluation_mode():
    graph = reweighting(with_dropout())
    graph.problems["inner"].validate = lambda nets: {"mean": float(nets.inner(torch.ones(1, 4).double()))}
    state = graph.init(KEY)
    assert graph.validate(state) == graph.validate(state)
    assert graph.validate(state).keys() == {"inner/mean"}
    assert graph.problems["inner"].module[2].training


def test_the_picture_shows_levels_edges_estimators_and_paths():
    picture = str(chain(SAMA(), ConjugateGradient(5), steps=(3, 2), roll_back=True)).splitlines()
    assert picture[0].startswith("level 0  top  (SGD")
    assert picture[1].strip() == "sees the solution of low"
    assert picture[2].startswith("level 1  middle  (SGD, 2 steps")
    assert "responds to top by ConjugateGradient(" in picture[3] and "iterations=5" in picture[3]
    assert "responds to middle by SAMA(" in picture[5]
    assert picture[6:] == ["path  top -> low -> middle -> top", "roll back"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: pair(low_estimator=ForwardMode()),
            "low is below the top and has the estimator ForwardMode, which knows no",
        ),
        (
            lambda: pair(None, ConjugateGradient(reuse_solution=True)),
            "low is below the top and has reuse_solution=True",
        ),
        (
            lambda: chain(top_estimator=ForwardMode()),
            "top has the estimator ForwardMode, which cannot be used: its steps",
        ),
        (lambda: chain(top_estimator=ZerothOrder(2)), "top has the estimator ZerothOrder, which batches runs"),
        (lambda: pair(CG), "top has the estimator ConjugateGradient, which cannot be used: it has no inner_loss"),
        (lambda: Graph([top(ForwardMode())], {}, {}), "accepted: at the only top"),
        (lambda: pair(None, Unrolled("mixed")).distribute(0, 2, dict), "low is unrolled in mode 'mixed' on 2 ranks"),
        (lambda: pair(ForwardMode()).distribute(0, 2, dict), "top has an estimator, on 2 ranks"),
    ],
)
def test_refuses_estimators_where_they_cannot_work(build, message):
    with pytest.raises(ValueError, match=message):
        build()
