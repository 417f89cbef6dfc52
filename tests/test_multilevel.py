import functools
import threading

import pytest
import torch
from estimators.conftest import ridge
from torch import nn

from metalearn import tree
from metalearn.base import Response
from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardGradient, ForwardMode, ZerothOrder
from metalearn.estimators.implicit import SAMA, ConjugateGradient, Identity, Neumann
from metalearn.estimators.unrolled import MODES, Unrolled
from metalearn.multilevel import Graph, Problem
from metalearn.optim.first_order import SGD, Adam, Clipped
from metalearn.random import integers, key, normal
from metalearn.tree import pack, unpack

D = 4
RATE = 2 / 2.6
KEY = key(7)
CG = ConjugateGradient(D, damping=0.0)


class Vector(nn.Module):
    """Raw parameters."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(start.clone())


# -- quadratic levels, with closed forms --


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


def chain_gradient():
    """d/dt objective(t, low*(middle*(t))) by linear algebra."""
    t = vector("top")
    residual = matrix("E") @ minimum("low", middle=minimum("middle", top=t)) - vector("e")
    by_middle = matrix("low middle").T @ torch.linalg.solve(curvature("low"), matrix("E").T @ residual)
    return 0.1 * t + matrix("middle top").T @ torch.linalg.solve(curvature("middle"), by_middle)


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


def diamond(low=15, left=15, right=15):
    """top sees low and left; low depends on left, right and top, and they on top."""
    above = {"low": ["left", "right", "top"], "left": ["top"], "right": ["top"]}
    steps = {"low": low, "left": left, "right": right}
    levels = [level(name, above[name], steps[name], CG, bent=True) for name in above]

    def loss(nets, batch):
        return objective(nets.top.params["x"], nets.low.params["x"]) + (nets.left.params["x"] @ vector("direct")).sin()

    return Graph([Problem("top", Vector(vector("top")), SGD(0.1), loss), *levels], {"top": ["low", "left"]}, above)


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


# -- the schedule --


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


# -- networks, minibatches, ranks --


def batch_normalised():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()


def with_dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)).double()


def reweighting(module, rule=None, estimator=None, top_estimator=None, **options):
    """A regression of which half the training rows, those with -1 in the last column, have the wrong sign; all are weighted.

    The weights come from a small network that is shown that column, learned on rows that are right.
    """
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


@pytest.mark.parametrize("mode", MODES)
def test_matches_finite_differences_of_the_program_itself(mode):
    """Adam, minibatches, batch statistics: whatever is done between two steps of the top is differentiated."""
    graph = reweighting(batch_normalised(), estimator=Unrolled(mode))
    state = graph.init(KEY)
    found = graph.gradients(state, KEY)["outer"]
    along = {name: normal(key(5, name), tuple(value.shape)).double() for name, value in found.items()}
    torch.testing.assert_close(tree.dot(found, along), slope(graph, state, "outer", along), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("estimator", [None, Identity(0.02)], ids=["Unrolled", "Identity"])
def test_ranks_match_one_process_on_the_whole_batch(estimator):
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    one, ranks, found = reweighting(module, SGD(0.5), estimator), Ranks(2), {}
    start = one.init(KEY)
    wanted = pack(one.step(start, KEY)[0])

    def run(rank):
        graph = reweighting(module, SGD(0.5), estimator)
        graph.distribute(rank, 2, ranks.mean(rank))
        found[rank] = pack(graph.step(start, KEY)[0])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(leaf, found[1][name]) for name, leaf in found[0].items())
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[0][name], leaf, rtol=1e-11, atol=1e-13)


def test_half_precision_is_of_the_loss_alone():
    def run(precision):
        graph = reweighting(nn.Linear(4, 1), SGD(0.1), precision=precision)
        return graph.gradients(graph.init(KEY), KEY)["outer"]

    full, half = run("32"), run("bf16")
    assert all(value.dtype == torch.float32 for value in half.values())
    assert 1e-6 < tree.norm(tree.add(half, full, -1.0)) / tree.norm(full) < 0.1


def test_validation_is_in_evaluation_mode():
    graph = reweighting(with_dropout())
    graph.problems["inner"].validate = lambda nets: {"mean": float(nets.inner(torch.ones(1, 4).double()))}
    state = graph.init(KEY)
    assert graph.validate(state) == graph.validate(state)
    assert graph.validate(state).keys() == {"inner/mean"}
    assert graph.problems["inner"].module[2].training


# -- estimators of the whole program --


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


# -- the picture, and what is refused --


def test_the_picture_shows_levels_edges_estimators_and_paths():
    picture = str(chain(SAMA(), ConjugateGradient(5), steps=(3, 2), roll_back=True)).splitlines()
    assert picture[0].startswith("level 0  top  (SGD")
    assert picture[1].strip() == "sees the solution of low"
    assert picture[2].startswith("level 1  middle  (SGD, 2 steps")
    assert "responds to top by ConjugateGradient(" in picture[3] and "iterations=5" in picture[3]
    assert "responds to middle by SAMA(" in picture[5]
    assert picture[6:] == ["path  top -> low -> middle -> top", "roll back"]


def strangers(names):
    return [
        Problem(name, Vector(vector(name)), SGD(0.1), lambda nets, batch: nets.b.params["x"].sum()) for name in names
    ]


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
