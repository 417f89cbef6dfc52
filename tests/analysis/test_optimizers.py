"""What is found of rules is what was put into them; Jacobians and modes against runs of the rules themselves."""

import math
from collections.abc import Callable
from itertools import repeat

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from metalearn.analysis.coordinates import Coordinate
from metalearn.analysis.optimizers import (
    adaptation,
    adaptation_exponent,
    autonomous,
    both_signs,
    clipping,
    drive,
    findings,
    fixed_point,
    half_life,
    impulse_response,
    linearise,
    modes,
    momentum,
    running_mean,
    update_curve,
)
from metalearn.base import Params, Rule, Tree
from metalearn.optim.first_order import SGD, Adam, Clipped, RMSProp, Scheduled
from metalearn.optim.lstm import CoordinateLSTM
from metalearn.optim.schedules import Cosine, InverseTime


class Map(Rule):
    """``h <- after(h, g)``, ``p <- p + read(h, g)`` for every coordinate."""

    def __init__(self, after: Callable[[Tensor, Tensor], Tensor], read: Callable[[Tensor, Tensor], Tensor]):
        self.after, self.read = after, read

    def init(self, meta: Params, params: Params) -> Tree:
        return {"h": {name: torch.zeros_like(p) for name, p in params.items()}}

    def update(
        self, meta: Params, grads: Params, state: Tree, params: Params, *, loss: Tensor | None = None
    ) -> tuple[Params, Tree]:
        new = {name: p + self.read(state["h"][name], grads[name]) for name, p in params.items()}
        return new, {"h": {name: self.after(h, grads[name]) for name, h in state["h"].items()}}


def at_rest(rule: Rule, grad: float = 0.0) -> pd.DataFrame:
    coordinate = Coordinate(rule)
    return modes(linearise(coordinate, fixed_point(coordinate, grad)))


# -- planted rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [0.0, 0.5, 0.9, 0.99])
def test_finds_momentum_and_nothing_else(planted: float) -> None:
    found = findings(Coordinate(SGD(0.1, momentum=planted)))
    assert found["momentum"] == pytest.approx(planted, abs=1e-6)
    assert found["running_mean"] == pytest.approx(planted, abs=1e-6)
    assert found["explains"] == pytest.approx(1)
    assert found["effective_step"] == pytest.approx(0.1)
    assert found["clipping"] == found["half_life"] == math.inf
    assert found["adaptation_exponent"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("planted", "scale"), [(1.0, 1.0), (0.5, 0.1)])
def test_finds_clipping_and_nothing_else(planted: float, scale: float) -> None:
    found = findings(Coordinate(Clipped(SGD(0.1), planted)), scale)
    assert found["clipping"] == pytest.approx(planted, rel=1e-4)
    assert found["momentum"] == 0 and found["half_life"] == math.inf
    assert found["adaptation_exponent"] == pytest.approx(0, abs=1e-6)


def test_finds_a_decaying_step_and_nothing_else() -> None:
    rule = Coordinate(Scheduled(SGD(0.1), InverseTime(20, power=1.0)))
    found = findings(rule)
    assert found["half_life"] == pytest.approx(20)
    assert found["momentum"] == 0 and found["clipping"] == math.inf
    assert found["adaptation_exponent"] == pytest.approx(0, abs=1e-6)
    assert half_life(autonomous(Coordinate(Scheduled(SGD(0.1), Cosine(60))), 60)) == pytest.approx(30)
    frame = autonomous(rule, 50)
    np.testing.assert_allclose(frame["effective_step"], 0.1 / (1 + frame["step"] / 20))
    assert not frame["drift"].any()


@pytest.mark.parametrize(("rule", "memory"), [(RMSProp(0.1), 0.0), (Adam(0.1), 0.9)])
def test_finds_the_adaptation_of_root_mean_squares(rule: Rule, memory: float) -> None:
    found = findings(Coordinate(rule))
    assert found["adaptation_exponent"] == pytest.approx(1, abs=0.01)
    assert found["momentum"] == pytest.approx(memory, abs=1e-6)
    assert found["running_mean"] == pytest.approx(memory, abs=0.01)
    half = Map(lambda h, g: 0.9 * h + 0.1 * g * g, lambda h, g: -g / (h + 1e-20) ** 0.25)
    assert adaptation_exponent(adaptation(Coordinate(half), [0.01, 1.0, 100.0])) == pytest.approx(0.5, abs=0.01)


def test_a_smooth_cut_is_where_its_tangent_meets_its_ceiling() -> None:
    grads = both_signs(1e-3, 1e3)
    for cut in (0.3, 2.0):
        rule = Coordinate(Map(lambda h, g: h, lambda h, g, c=cut: 0.7 - torch.tanh(g / c)))
        curve = update_curve(rule, fixed_point(rule), grads)
        assert clipping(curve, scale=0.01) == pytest.approx((1 / cut, cut), rel=1e-3)  # the offset is not part of it
    grows = pd.DataFrame({"grad": grads, "update": -np.cbrt(grads)})
    assert clipping(grows, 0.01).threshold == math.inf
    assert math.isnan(clipping(grows.assign(update=-grows["update"]), 0.01).threshold)  # up the gradient
    with pytest.raises(ValueError, match=r"scale is 0\.0001; accepted"):
        clipping(grows, 1e-4)


def test_steps_that_are_not_positive_have_no_exponent_and_no_half_life() -> None:
    frame = pd.DataFrame({"magnitude": [1.0, 2.0], "effective_step": [-0.1, 0.1]})
    assert math.isnan(adaptation_exponent(frame)) and math.isnan(half_life(frame))


# -- fixed points ------------------------------------------------------------------------------------------------------


def test_finds_the_fixed_point_of_a_nonlinear_map() -> None:
    rule = Coordinate(Map(lambda h, g: (h + g).cos(), lambda h, g: h))
    point = fixed_point(rule, iterations=20)
    assert float(point.h_N) == pytest.approx(0.7390851332151607, abs=1e-11)
    assert point.residual < 1e-11
    moved = fixed_point(rule, 0.5, iterations=20)
    assert float(moved.h_N) == pytest.approx(math.cos(float(moved.h_N) + 0.5), abs=1e-11)


def test_newton_reaches_what_iteration_does_not() -> None:
    slow = Coordinate(SGD(momentum=0.9999))
    assert float(fixed_point(slow, 0.3, iterations=30).h_N) == pytest.approx(0.3 / 1e-4, rel=1e-6)


def test_says_how_far_it_is_from_rest_where_nothing_rests() -> None:
    assert fixed_point(Coordinate(Map(lambda h, g: h + 1, lambda h, g: h))).residual == pytest.approx(1)
    # h <- h + h^2 + 0.01 is slowest at 0, where it still moves by 0.01.
    ghost = fixed_point(Coordinate(Map(lambda h, g: h + h * h + 0.01, lambda h, g: h)))
    assert ghost.residual == pytest.approx(0.01, rel=1e-3) and abs(float(ghost.h_N)) < 0.01


# -- Jacobians and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [Adam(0.1, beta2=0.95), RMSProp(0.1, alpha=0.9, momentum=0.5), CoordinateLSTM([3, 2], "none", scale=1.0)],
    ids=["adam", "rmsprop", "lstm"],
)
def test_matches_the_answer_of_the_rule_to_a_small_impulse(rule: Rule) -> None:
    coordinate, lags, tiny = Coordinate(rule), 8, 1e-6
    point = fixed_point(coordinate, grad=0.7, step=300)
    assert point.residual < 1e-9
    grads_MT = torch.full((2, lags + 1), 0.7, dtype=torch.float64)
    grads_MT[:, 0] += tiny * torch.tensor([1.0, -1.0])
    updates_MT, _ = coordinate.run(grads_MT, repeat(300), point.h_N)
    answer = ((updates_MT[0] - updates_MT[1]) / (2 * tiny)).numpy()
    linear = linearise(coordinate, point)
    found = impulse_response(linear, lags)
    np.testing.assert_allclose(found["response"], answer, rtol=1e-5, atol=1e-8)
    parts = modes(linear)
    powers = parts["eigenvalue"].to_numpy()[:, None] ** np.arange(lags)
    np.testing.assert_allclose((parts["coefficient"].to_numpy() @ powers).real, answer[1:], rtol=1e-5, atol=1e-8)


def test_modes_of_two_running_means_are_theirs() -> None:
    frame = at_rest(RMSProp(0.1, alpha=0.95, momentum=0.8), grad=1.0)
    assert sorted(frame["modulus"]) == pytest.approx([0.8, 0.95])
    np.testing.assert_allclose(frame["timescale"], -1 / np.log(frame["modulus"]))
    slow = frame[frame["modulus"] > 0.9].iloc[0]
    # d update / d gradient that the mean square passes on with the slow decay: lr/2 v^-3/2 . 2 g (1 - alpha) . alpha, times
    # the momentum's answer to a decaying input, 1 / (1 - .8/.95).
    assert slow["coefficient"].real == pytest.approx(0.1 * 0.05 * 0.95 / (1 - 0.8 / 0.95), rel=1e-6)
    assert slow["strength"] == pytest.approx(abs(slow["coefficient"]) / math.sqrt(1 - 0.95**2))


def test_what_does_not_fade_and_what_is_not_read() -> None:
    total = at_rest(Map(lambda h, g: h + g, lambda h, g: h))
    assert total["timescale"].item() == total["strength"].item() == math.inf
    unread = at_rest(Map(lambda h, g: h + g, lambda h, g: g))
    assert unread["strength"].item() == 0 and momentum(unread) == 0
    assert momentum(at_rest(SGD())) == 0  # a state of no numbers


def test_refuses_a_kink() -> None:
    root = Coordinate(Map(lambda h, g: 0.5 * h + g * g, lambda h, g: -g / (1 + h.sqrt())))
    with pytest.raises(ValueError, match=r"no derivative at grad 0\.0; accepted: the fixed point of another gradient"):
        linearise(root, fixed_point(root))
    assert math.isfinite(linearise(root, fixed_point(root, 0.1)).direct)


def test_eigenvectors_that_do_not_span_have_no_coefficients() -> None:
    class Register(Map):
        def init(self, meta: Params, params: Params) -> Tree:
            return {"h": {name: p.new_zeros(2, len(p)) for name, p in params.items()}}

    shift = Register(lambda h, g: torch.stack([g, h[0]]), lambda h, g: h[1])
    assert at_rest(shift)["coefficient"].isna().all()
    rule = Coordinate(shift)
    assert list(impulse_response(linearise(rule, fixed_point(rule)), 3)["response"]) == [0, 0, 1, 0]


def test_the_running_mean_of_a_rule_that_mixes_two_lies_between_them() -> None:
    nesterov = running_mean(drive(Coordinate(SGD(momentum=0.9, nesterov=True)), length=400))
    assert 0.8 < nesterov.decay < 0.9 and nesterov.explained < 0.99
    drifting = Map(lambda h, g: 0.7 * h + g, lambda h, g: 5 - 0.7 * h - g)
    assert running_mean(drive(Coordinate(drifting), length=400)) == pytest.approx((0.7, 1.0), abs=1e-6)
    opposite = running_mean(drive(Coordinate(Map(lambda h, g: g, lambda h, g: h)), length=400))  # the gradient before
    assert opposite.explained < 0.6


def test_refuses_what_is_out_of_range() -> None:
    rule = Coordinate(SGD())
    for call, message in (
        (lambda: fixed_point(rule, step=-1), "step is -1"),
        (lambda: drive(rule, scale=0.0), "scale is 0.0"),
        (lambda: autonomous(rule, 0), "steps is 0"),
        (lambda: adaptation(rule, [0.0, 1.0]), "least of magnitudes is 0.0"),
        (lambda: Coordinate(SGD(), others=-1), "others is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
