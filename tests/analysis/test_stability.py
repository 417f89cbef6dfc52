"""Spectral radii say exactly where runs diverge."""

import math

import pytest
import torch
from torch import Tensor

from metalearn import random
from metalearn.analysis.coordinates import Coordinate
from metalearn.analysis.optimizers import Linearised, fixed_point, linearise
from metalearn.analysis.stability import NoisyQuadratic, growth, simulate, spectral_radius, stability
from metalearn.base import Params, Rule, Tree
from metalearn.optim.first_order import SGD

LARGEST = 10.0
AROUND = [0.5, 0.98, 0.999, 1.001, 1.02, 1.5]  # of the learning rate at which runs begin to diverge


class Preconditioned(Rule):
    """``x <- x - (alpha I + P) g`` with P the rule's own and alpha the meta-parameter."""

    def __init__(self, preconditioner_DD: Tensor):
        self.preconditioner_DD = preconditioner_DD

    def init(self, meta: Params, params: Params) -> Tree:
        return {}

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        g = grads["x"]
        return {"x": params["x"] - meta["alpha"] * g - self.preconditioner_DD @ g}, state


def linearised(rule: Rule) -> Linearised:
    coordinate = Coordinate(rule)
    return linearise(coordinate, fixed_point(coordinate))


@pytest.fixture(scope="module")
def hessian_DD() -> Tensor:
    turn_DD, _ = torch.linalg.qr(random.normal(random.key(2), (4, 4)).double())
    product = turn_DD @ torch.diag(torch.tensor([0.5, 2.0, 5.0, LARGEST], dtype=torch.float64)) @ turn_DD.T
    return (product + product.T) / 2


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_diverges_exactly_where_the_radius_is_above_one(hessian_DD: Tensor, noise: float) -> None:
    alphas = torch.tensor(AROUND, dtype=torch.float64) * 2 / LARGEST
    runs = simulate(SGD(), hessian_DD, {"lr": alphas}, steps=120, noise=noise)
    for alpha, (_, run) in zip(alphas.tolist(), runs.groupby("run"), strict=True):
        radius = spectral_radius(hessian_DD, alpha)
        assert radius == pytest.approx(max(abs(1 - alpha * k) for k in (0.5, LARGEST)))
        if not noise:
            assert growth(run["loss"]) == pytest.approx(radius, rel=1e-4)
        elif abs(radius - 1) > 0.01:  # nearer to 1, noise hides the trend of 120 steps
            losses = run["loss"].to_numpy()
            assert (losses[-20:].max() > 20 * losses[20:40].max()) == (radius > 1)


def test_diverges_exactly_where_the_radius_of_a_preconditioned_rule_is_above_one(hessian_DD: Tensor) -> None:
    drawn_DD = random.normal(random.key(4), (4, 4)).double()
    preconditioner_DD = 0.02 * drawn_DD
    alphas = torch.linspace(0.02, 0.4, 12, dtype=torch.float64)
    runs = simulate(Preconditioned(preconditioner_DD), hessian_DD, {"alpha": alphas}, steps=100)
    radii = [spectral_radius(hessian_DD, alpha, preconditioner_DD) for alpha in alphas.tolist()]
    assert min(radii) < 0.98 and max(radii) > 1.02
    for radius, (_, run) in zip(radii, runs.groupby("run"), strict=True):
        assert growth(run["loss"]) == pytest.approx(radius, rel=5e-3)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_matches_the_roots_of_heavy_ball_momentum(momentum: float) -> None:
    linear = linearised(SGD(0.1, momentum=momentum))
    edge = 2 * (1 + momentum) / 0.1
    frame = stability(linear, [0.01 * edge, 0.5 * edge, 0.999 * edge, 1.001 * edge])
    for curvature, radius in frame.itertuples(index=False):
        middle = (1 + momentum - 0.1 * curvature) / 2
        roots = [middle + sign * complex(middle**2 - momentum) ** 0.5 for sign in (1, -1)]
        assert radius == pytest.approx(max(map(abs, roots)), rel=1e-7)
    assert list(frame["radius"] > 1) == [False, False, False, True]


def test_a_rule_with_a_state_diverges_exactly_where_its_radius_is_above_one(hessian_DD: Tensor) -> None:
    rates = torch.tensor(AROUND, dtype=torch.float64) * 2 * 1.9 / LARGEST
    runs = simulate(SGD(momentum=0.9), hessian_DD, {"lr": rates}, steps=120)
    for lr, (_, run) in zip(rates.tolist(), runs.groupby("run"), strict=True):
        linear = linearised(SGD(lr, momentum=0.9))
        radius = stability(linear, torch.linalg.eigvalsh(hessian_DD).tolist())["radius"].max()
        if radius > 1:
            assert growth(run["loss"]) == pytest.approx(radius, rel=2e-3)
        assert (growth(run["loss"]) > 1) == (radius > 1)


def test_runs_on_equal_noise_differ_by_what_they_began_with_alone(hessian_DD: Tensor) -> None:
    once, twice = (simulate(SGD(0.05), hessian_DD, steps=20, noise=0.5, seed=seed) for seed in (0, 0))
    other = simulate(SGD(0.05), hessian_DD, steps=20, noise=0.5, seed=1)
    assert once.equals(twice) and not once.equals(other)
    assert list(once["step"]) == list(range(1, 21)) and set(once["run"]) == {0}


def test_growth_stops_where_the_loss_overflows() -> None:
    losses = [1e100**step for step in range(4)] + [math.inf, math.nan]
    assert growth(losses) == pytest.approx(1e50)
    with pytest.raises(ValueError, match="overflows or vanishes is 3; accepted: 4"):
        growth(losses[:3])
    with pytest.raises(ValueError, match="not symmetric and positive definite"):
        NoisyQuadratic(-torch.eye(2))
