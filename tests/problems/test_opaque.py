import math

import pytest
import torch

from metalearn.estimators.evolution import PersistentES
from metalearn.estimators.forward import ForwardGradient, ZerothOrder
from metalearn.estimators.implicit import Neumann
from metalearn.estimators.unrolled import Unrolled
from metalearn.problems.opaque import Burgers, TransparentBurgers
from metalearn.random import key


def gradient(problem, estimator, meta, number=0):
    batches = problem.batches(key(0), problem.horizon)
    state = estimator.init(problem, meta, key(0))
    return estimator.estimate(problem, meta, state, batches, key(1, number)).grad["velocity"]


def flow(problem, u_N):
    for _ in range(problem.horizon):
        u_N = problem.solve(u_N)
    return u_N


def test_small_velocities_match_the_heat_equation():
    """Without convection a wave shrinks by exp(-4 pi^2 k^2 viscosity duration)."""
    problem = Burgers(64, viscosity=0.02, duration=0.2, substeps=100, smoothness=0.0)
    wave_N = (2 * math.pi * 2 * torch.arange(64).double() / 64).sin()
    wanted_N = wave_N * math.exp(-4 * math.pi**2 * 4 * 0.02 * 0.2)
    torch.testing.assert_close(flow(problem, 1e-6 * wave_N) / 1e-6, wanted_N, rtol=0, atol=3e-3)


def test_matches_a_travelling_solution_of_cole_and_hopf():
    """u = c - 2 nu phi_x / phi at speed c, where phi = 1 + exp(-4 pi^2 nu t) cos(2 pi x) / 2 solves the heat equation."""
    nu, speed, duration, points = 0.02, 0.3, 0.2, 64
    problem = Burgers(points, viscosity=nu, duration=duration, substeps=200, smoothness=0.0)

    def exact(time):
        x = 2 * math.pi * (torch.arange(points).double() / points - speed * time)
        shrunk = 0.5 * math.exp(-4 * math.pi**2 * nu * time)
        return speed + 4 * math.pi * nu * shrunk * x.sin() / (1 + shrunk * x.cos())

    torch.testing.assert_close(flow(problem, exact(0.0)), exact(duration), rtol=0, atol=2e-3)
    assert (exact(0.0) - exact(duration)).abs().max() > 0.05


def test_smoother_shrinks_each_wave_by_its_factor():
    problem = Burgers(32, smoothness=0.05)
    for wave in (0, 1, 5):
        wave_N = (2 * math.pi * wave * torch.arange(32).double() / 32).cos()
        factor = math.exp(-2 * math.pi**2 * wave**2 * 0.05**2)
        torch.testing.assert_close(problem.first({"velocity": wave_N}), factor * wave_N, rtol=0, atol=1e-12)


def test_transparent_flow_matches_opaque():
    opaque, transparent = Burgers(16, seed=4), TransparentBurgers(16, seed=4)
    assert torch.equal(opaque.observed_N, transparent.observed_N)
    meta = opaque.init_meta(key(0))
    assert torch.equal(flow(opaque, meta["velocity"]), flow(transparent, meta["velocity"]))


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("method", ["forward", "central"])
def test_zeroth_order_matches_gradient_of_transparent_flow(chain, method):
    """Up to sqrt((N - 1)/b), the relative error of b random directions."""
    opaque, transparent = Burgers(8, seed=2), TransparentBurgers(8, seed=2)
    meta = opaque.init_meta(key(0))
    exact_N = gradient(transparent, Unrolled(), meta)
    estimator = ZerothOrder(256, 1e-5, method, chain=chain, chunk=1)
    error = float((gradient(opaque, estimator, meta) - exact_N).norm() / exact_N.norm())
    assert error < 3 * math.sqrt(7 / 256)


def test_chained_difference_leaves_out_the_curvature_of_outer():
    """At the sought velocity the gradient is zero; differences of the squared distance alone see its curvature."""
    problem = Burgers(8, smoothness=0.0, seed=1)
    meta = {"velocity": problem.sought_N}
    assert gradient(problem, ZerothOrder(8, 0.1, chain=True, chunk=1), meta).abs().max() < 1e-12
    assert gradient(problem, ZerothOrder(8, 0.1, chunk=1), meta).abs().max() > 1e-3


def test_persistent_evolution_runs_on_it():
    problem = Burgers(8)
    meta = problem.init_meta(key(0))
    assert gradient(problem, PersistentES(pairs=2, std=0.01, vectorised=False), meta).isfinite().all()


@pytest.mark.parametrize("estimator", [Unrolled(), ForwardGradient(2), Neumann()])
def test_refuses_estimators_that_differentiate_steps(estimator):
    problem = Burgers(8)
    with pytest.raises(ValueError, match="its steps cannot be differentiated"):
        estimator.init(problem, problem.init_meta(key(0)), key(0))
    with pytest.raises(RuntimeError, match="requires grad"):
        problem.solve(problem.observed_N.clone().requires_grad_())


def test_sought_field_has_no_error_and_no_misfit_without_noise():
    problem = Burgers(16, smoothness=0.0)
    assert problem.evaluate({"velocity": problem.sought_N}, key(0), test=False) == pytest.approx({"error": 0.0})
    start = problem.init({"velocity": problem.sought_N}, key(0))
    end = start._replace(params={"velocity": flow(problem, start.params["velocity"])})
    assert float(problem.outer({}, end, problem.batches(key(0), 5).outer)) == pytest.approx(0.0, abs=1e-28)
    noisy = Burgers(16, smoothness=0.0, noise=0.1)
    assert (noisy.observed_N - problem.observed_N).std() == pytest.approx(0.1, rel=0.6)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_points": 3},
        {"viscosity": 0.0},
        {"duration": -1.0},
        {"horizon": 0},
        {"num_waves": 32},
        {"noise": -0.1},
        {"smoothness": -0.1},
        {"substeps": 1},
    ],
)
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="accepted"):
        Burgers(**settings)
