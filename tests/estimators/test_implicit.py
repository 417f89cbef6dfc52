import pytest
import torch
from estimators.conftest import DIMENSION, relative, ridge
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import tree
from metalearn.base import Batches, InnerProblem, StepOutput
from metalearn.estimators.implicit import (
    NO_RULE,
    SAMA,
    ConjugateGradient,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
)
from metalearn.estimators.unrolled import Unrolled
from metalearn.estimators.windowed import NO_INNER_LOSS, NOT_TERMINAL, OPAQUE
from metalearn.optim.first_order import SGD, Adam, AdamW, Clipped
from metalearn.problems.hyperparameters import Ridge
from metalearn.random import fold, key, normal
from metalearn.unroll import Descent, Tasks, differentiable_kernels, seeded

EYE = torch.eye(DIMENSION, dtype=torch.float64)
ALL = (ConjugateGradient(), Neumann(), Nystrom(rank=3), Identity(), FiniteDifference(), SAMA())


def solved(kind=None, lr=0.3):
    plain, meta = ridge()
    return (kind or Solved)(*plain.train, *plain.validation, SGD(lr)), meta


def exact_cg(iterations=DIMENSION, damping=0.0, **options):
    return ConjugateGradient(iterations, damping, tolerance=0.0, **options)


class Solved(Ridge):
    """Ridge that begins at its solution, so that a short window ends there as well."""

    def init(self, meta, key):
        w = self.solution(tree.detach(meta))
        return self.start(meta, {"w": w}, {})


class Scaled(Solved):
    """The same minima, the inner loss a tenth: a solver that mixes up scaled and unscaled products is wrong on it."""

    def inner_loss(self, meta, state, batch, key):
        loss, buffers = super().inner_loss(meta, state, batch, key)
        return 0.1 * loss, buffers


class Saddle(Descent):
    """g = theta^T A theta / 2 - meta^T theta, so that the vector-Jacobian product of a response is its x."""

    def __init__(self, matrix, rule=None):
        super().__init__(rule or SGD(0.01))
        self.matrix = matrix

    def init_meta(self, key):
        return {"b": torch.linspace(-1, 1, len(self.matrix), dtype=torch.float64)}

    def init(self, meta, key):
        return self.start(meta, {"theta": torch.linspace(1, 2, len(self.matrix), dtype=torch.float64)}, {})

    def inner_loss(self, meta, state, batch, key):
        theta = state.params["theta"]
        return theta @ self.matrix @ theta / 2 - meta["b"] @ theta, {}

    def outer(self, meta, state, batch):
        return state.params["theta"].square().sum()


class Network(Descent):
    """Example weights for a network with attention, batch statistics and dropout."""

    def __init__(self):
        super().__init__(SGD(0.1))
        self.global_generator = True
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, activation="gelu", batch_first=True)
        layer.self_attn.dropout = 0.0  # so that attention would take a fused kernel, which has no second derivative
        self.module = nn.Sequential(layer, nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3)).double()
        self.x, self.y = normal(key(1), (9, 3, 4)).double(), torch.arange(9) % 3

    def init_meta(self, key):
        return {"weight": torch.linspace(-1, 1, 9, dtype=torch.float64)}

    def init(self, meta, key):
        return self.start(meta, *tree.initialise(self.module, key))

    def inner_loss(self, meta, state, batch, key):
        logits, buffers = tree.call(self.module, state.params, state.buffers, self.x)
        return (meta["weight"].sigmoid() * cross_entropy(logits, self.y, reduction="none")).mean(), buffers

    def outer(self, meta, state, batch):
        logits, _ = tree.call(self.module.eval(), state.params, state.buffers, self.x)
        self.module.train()
        return cross_entropy(logits, self.y)


class Drawn(Ridge):
    """Ridge whose rows come from the key of its batches."""

    def batches(self, key, steps):
        x, y = normal(fold(key, "x"), (40, 4)).double(), normal(fold(key, "y"), (40,)).double()
        return Batches(lambda k: (x, y), (x.flip(0), y.roll(1)), steps)


def symmetric(*eigenvalues):
    q, _ = torch.linalg.qr(normal(key(3), (len(eigenvalues), len(eigenvalues))).double())
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def respond(estimator, problem, v, steps=1):
    """The response's vector-Jacobian product, and what was reported."""
    k = key(0)
    meta = problem.init_meta(k)
    window = estimator.run(problem, meta, problem.init(meta, k), problem.batches(k, steps), k)
    response = estimator.response(problem, window)
    return response.vjp(v), estimator.diagnostics(response)


def at_converged_ridge(solve):
    """-e^l w x, the hypergradient of ridge for x = solve(H, v)."""
    problem, meta = ridge()
    w = problem.solution(meta)
    (x, _), (xv, yv) = problem.train, problem.validation
    matrix = x.T @ x / len(x) + meta["log_penalty"].exp().diag()
    return {"log_penalty": -meta["log_penalty"].exp() * w * solve(matrix, xv.T @ (xv @ w - yv) / len(yv))}


def test_conjugate_gradient_matches_the_analytic_hypergradient(quick_estimate):
    problem, meta = ridge()
    found = quick_estimate(exact_cg(), problem, meta, 250)
    assert relative(found.grad, problem.hypergradient(meta)) <= 1e-10
    assert found.diagnostics["residual"] <= 1e-12 and found.diagnostics["negative_curvature"] == 0


def test_conjugate_gradient_matches_the_damped_system(quick_estimate):
    problem, meta = solved()
    found = quick_estimate(exact_cg(damping=0.3), problem, meta, 1)
    wanted = at_converged_ridge(lambda matrix, v: torch.linalg.solve(matrix + 0.3 * EYE, v))
    assert relative(found.grad, wanted) <= 1e-10


@pytest.mark.parametrize("kind", [Solved, Scaled])
def test_conjugate_gradient_improves_with_every_iteration(kind, quick_estimate):
    problem, meta = solved(kind)
    found = [quick_estimate(exact_cg(j), problem, meta, 1) for j in range(1, DIMENSION + 1)]
    errors = [relative(each.grad, problem.hypergradient(meta)) for each in found]
    assert sorted(errors, reverse=True) == errors
    assert errors[2] <= 0.05 and errors[-1] <= 1e-10
    assert [float(each.diagnostics["iterations"]) for each in found] == list(range(1, DIMENSION + 1))


def test_conjugate_gradient_stops_at_its_tolerance(quick_estimate):
    problem, meta = solved()
    found = quick_estimate(ConjugateGradient(50, 0.0, tolerance=1e-2), problem, meta, 1).diagnostics
    assert found["residual"] <= 1e-2 and found["iterations"] < DIMENSION


def test_conjugate_gradient_goes_on_over_a_saddle_when_damped():
    matrix, v = symmetric(-2.0, 1.0, 3.0), normal(key(1), (3,)).double()
    x, report = respond(exact_cg(3, damping=2.5), Saddle(matrix), {"theta": v})
    torch.testing.assert_close(x["b"], torch.linalg.solve(matrix + 2.5 * torch.eye(3), v))
    assert report["negative_curvature"] == 0 and -2 <= report["smallest_curvature"] < 0


def test_reused_solutions_add_up_to_an_exact_solve():
    problem, meta = solved()
    batches, k = problem.batches(key(0), 1), key(0)
    errors = {}
    for reuse in (False, True):
        estimator, errors[reuse] = exact_cg(2, reuse_solution=reuse, warm_start=False), []
        state = estimator.init(problem, meta, k)
        for _ in range(6):
            found = estimator.estimate(problem, meta, state, batches, k)
            state = found.state
            errors[reuse].append(relative(found.grad, problem.hypergradient(meta)))
    assert errors[True][0] == errors[False][0] == errors[False][-1] > 1e-3
    assert errors[True][-1] < 1e-2 * errors[True][0]
    assert estimator.last_solution is None


@pytest.mark.parametrize("terms", [1, 10, 100])
def test_neumann_matches_its_series(terms, quick_estimate):
    problem, meta = solved()
    found = quick_estimate(Neumann(terms, 0.3), problem, meta, 1)

    def series(matrix, v):
        power = torch.linalg.matrix_power(EYE - 0.3 * matrix, terms + 1)
        return torch.linalg.solve(matrix, v - power @ v)

    assert relative(found.grad, at_converged_ridge(series)) <= 1e-10
    unrolled = quick_estimate(Unrolled(), problem, meta, terms + 1)
    assert relative(found.grad, unrolled.grad) <= 1e-10


def test_neumann_converges_at_its_rate_and_says_when_it_does_not():
    matrix, v = torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64)), torch.tensor([1.0, 0.0]).double()
    for terms in (1, 10, 100):
        x, report = respond(Neumann(terms, 0.4), Saddle(matrix), {"theta": v})
        torch.testing.assert_close(
            1 - x["b"][0] * 0.5, torch.tensor(0.8 ** (terms + 1)).double(), rtol=1e-4, atol=1e-15
        )
        torch.testing.assert_close(report["ratio"], torch.tensor(0.8).double())
    _, report = respond(Neumann(10, 1.2), Saddle(matrix), {"theta": v.flip(0)})
    torch.testing.assert_close(report["ratio"], torch.tensor(1.4).double())


def test_nystrom_matches_the_damped_solve_at_full_rank(quick_estimate):
    problem, meta = solved()
    found = quick_estimate(Nystrom(DIMENSION, 1e-2, chunk=4), problem, meta, 1)
    wanted = at_converged_ridge(lambda matrix, v: torch.linalg.solve(matrix + 1e-2 * EYE, v))
    assert relative(found.grad, wanted) <= 1e-8


def test_nystrom_matches_the_damped_solve_of_a_low_rank_hessian():
    matrix, v = symmetric(2.0, 1.0, 0.0, 0.0, 0.0), normal(key(1), (5,)).double()
    x, _ = respond(Nystrom(3, 0.1), Saddle(matrix), {"theta": v})
    torch.testing.assert_close(x["b"], torch.linalg.solve(matrix + 0.1 * torch.eye(5), v), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 5])
def test_nystrom_never_points_away_on_a_saddle(rank):
    v = normal(key(1), (5,)).double()
    x, report = respond(Nystrom(rank, 0.1), Saddle(symmetric(-2.0, -0.5, 0.1, 1.0, 3.0)), {"theta": v})
    assert x["b"] @ v > 0 and report["smallest_curvature"] < 0


def test_identity_matches_its_closed_form_and_finite_difference(quick_estimate):
    problem, meta = solved()
    found = quick_estimate(Identity(0.3), problem, meta, 1)
    assert relative(found.grad, at_converged_ridge(lambda matrix, v: 0.3 * v)) <= 1e-10
    darts = quick_estimate(FiniteDifference(), problem, meta, 1)
    assert relative(tree.scale(darts.grad, 0.3), found.grad) <= 1e-9
    sama = quick_estimate(SAMA(), problem, meta, 1)  # the rule is SGD(0.3)
    assert relative(sama.grad, found.grad) <= 1e-9


@pytest.mark.parametrize("estimator", ALL)
def test_nothing_pulled_gives_nothing(estimator):
    x, report = respond(estimator, Saddle(symmetric(1.0, 2.0, 3.0)), {"theta": torch.zeros(3).double()})
    assert x["b"].eq(0).all()
    assert not any(value.isnan() for value in report.values())


@pytest.mark.parametrize("rule", [SGD(0.05), Adam(0.1), AdamW(0.1, weight_decay=0.3), Clipped(Adam(0.1), 0.5)])
@pytest.mark.parametrize("steps", [1, 4])
def test_sama_matches_differences_of_the_rule(rule, steps):
    problem, k = Saddle(symmetric(0.5, 1.0, 3.0), rule), key(0)
    meta, v = problem.init_meta(k), torch.tensor([1.0, -2.0, 0.5]).double()
    window = SAMA().run(problem, meta, problem.init(meta, k), problem.batches(k, steps), k)
    state = window.states[steps - 1]
    grads = problem.matrix @ state.params["theta"] - meta["b"]

    def moved(grads):
        return -rule.update({}, {"theta": grads}, state.rule, state.params)[0]["theta"] @ v

    h = 1e-5
    wanted = torch.stack([(moved(grads + h * unit) - moved(grads - h * unit)) / (2 * h) for unit in torch.eye(3)])
    found = SAMA().response(problem, window).vjp({"theta": v})["b"]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_matches_the_dense_hessian_through_attention_batch_norm_and_dropout():
    problem, k = Network(), key(0)
    meta = problem.init_meta(k)
    estimator = ConjugateGradient(60, damping=1.0, tolerance=1e-13)
    window = SAMA().run(problem, meta, problem.init(meta, k), problem.batches(k, 2), k)
    flat, unravel = tree.ravel(window.end.params)
    v = normal(key(5), flat.shape).double()

    def slope(flat, meta):
        with seeded(problem, fold(k, 1)):
            return problem.inner_loss(meta, window.end._replace(params=unravel(flat)), None, fold(k, 1))[0]

    with differentiable_kernels():
        weight = meta["weight"].clone().requires_grad_()
        flat = flat.detach().requires_grad_()
        (along,) = torch.autograd.grad(slope(flat, {"weight": weight}), flat, create_graph=True)
        rows = [torch.autograd.grad(entry, (flat, weight), retain_graph=True) for entry in along]
        dense, mixed = (torch.stack(part) for part in zip(*rows, strict=True))
    values, vectors = torch.linalg.eigh(dense)
    assert -1 < values[0] < -0.1  # so damping is what makes it a minimum
    damped, positive = (vectors @ ((vectors.T @ v) / (1 + each)) for each in (values, values.clamp(min=0)))
    term = 0.1 * (v - 0.1 * dense @ v) + 0.1 * v
    nystrom = Nystrom(len(v), damping=1.0, chunk=64)
    for kind, x in (
        (estimator, damped),
        (nystrom, positive),
        (Neumann(1, 0.1), term),
        (Identity(), v),
        (FiniteDifference(1e-3), v),
        (SAMA(1e-3), 0.1 * v),  # the rule's learning rate
    ):
        response = kind.response(problem, window)
        for _ in range(2):
            found = response.vjp(unravel(v))
        assert relative(found, {"weight": -x @ mixed}) <= (1e-5 if isinstance(kind, FiniteDifference) else 1e-8)


@pytest.mark.parametrize("estimator", [exact_cg(4), Nystrom(4, 1e-9)])
def test_solves_each_of_several_tasks_by_itself(estimator, quick_estimate):
    plain, _ = ridge(dimension=4)
    problem = Drawn(*plain.train, *plain.validation, SGD(0.5))
    meta = {"log_penalty": normal(key(2), (4,)).double() * 0.5 - 1}
    found = quick_estimate(estimator, Tasks(problem, 3), meta, 100)
    wanted = tree.zeros_like(meta)
    for task in range(3):
        data = problem.batches(fold(key(0), task), 1)
        (x, y), (xv, yv) = data.inner(0), data.outer
        alone = Ridge(x, y, xv, yv, SGD(0.3))
        wanted = tree.add(wanted, alone.hypergradient(meta), 1 / 3)
    assert relative(found.grad, wanted) <= 1e-7
    others = [Identity(0.5), FiniteDifference(), SAMA()]
    identity, darts, sama = (quick_estimate(each, Tasks(problem, 3), meta, 5).grad for each in others)
    assert relative(tree.scale(darts, 0.5), identity) <= 1e-9
    assert relative(sama, identity) <= 1e-9


@pytest.mark.parametrize("estimator", ALL)
def test_goes_on_from_estimate_to_estimate(estimator):
    problem, meta = ridge(rule=Adam(0.05))
    k, state = key(0), estimator.init(problem, meta, key(0))
    for _ in range(2):
        state = estimator.estimate(problem, meta, state, problem.batches(k, 5), k).state
    whole = estimator.run(problem, meta, problem.init(meta, k), problem.batches(k, 10), k)
    torch.testing.assert_close(state["inner"].params, whole.end.params, rtol=0, atol=1e-12)
    assert int(state["inner"].step) == 10


def _refused(*, has_inner_loss=True, terminal=True, differentiable=True, rule=None):
    class Refused(InnerProblem):
        def init_meta(self, key):
            return {}

        def init(self, meta, key):
            raise AssertionError("a refused problem is not begun")

        def step(self, meta, state, batch, key):
            return state, StepOutput(state.step, state.step > 0)

    class WithLoss(Refused):
        def inner_loss(self, meta, state, batch, key):
            return state.step, {}

    problem = WithLoss() if has_inner_loss else Refused()
    problem.terminal, problem.differentiable, problem.rule = terminal, differentiable, rule
    return problem


@pytest.mark.parametrize("estimator", ALL)
def test_refuses_by_name(estimator):
    cases = {
        NO_INNER_LOSS: {"has_inner_loss": False},
        NOT_TERMINAL: {"terminal": False},
        OPAQUE: {"differentiable": False},
    }
    cases |= {NO_RULE: {}} if isinstance(estimator, SAMA) else {}
    for reason, lacking in cases.items():
        assert estimator.refusal(_refused(**lacking)) == reason
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} cannot be used on "):
            estimator.init(_refused(**lacking), {}, key(0))


@pytest.mark.parametrize("estimator", ALL)
def test_refuses_a_loss_without_the_meta_parameters(estimator):
    class Fixed(Saddle):
        def inner_loss(self, meta, state, batch, key):
            return super().inner_loss({"b": torch.ones(3, dtype=torch.float64)}, state, batch, key)

    with pytest.raises(ValueError, match="depends on both the parameters and b"):
        respond(estimator, Fixed(symmetric(1.0, 2.0, 3.0)), {"theta": torch.ones(3).double()})


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (ConjugateGradient, {"iterations": 0}),
        (ConjugateGradient, {"damping": -0.1}),
        (ConjugateGradient, {"tolerance": 1.0}),
        (Neumann, {"terms": 0}),
        (Neumann, {"step_size": 0.0}),
        (Nystrom, {"rank": 0}),
        (Nystrom, {"damping": 0.0}),
        (Identity, {"scale": -1.0}),
        (FiniteDifference, {"radius": 0.0}),
    ],
)
def test_refuses_bad_settings(kind, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; accepted"):
        kind(**bad)


def test_refuses_more_columns_than_parameters():
    with pytest.raises(ValueError, match="rank is 4; accepted: 1 <= rank <= 3"):
        respond(Nystrom(4), Saddle(symmetric(1.0, 2.0, 3.0)), {"theta": torch.ones(3).double()})
