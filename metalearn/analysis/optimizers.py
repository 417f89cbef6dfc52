"""What an optimizer does, learned or hand-made: its memory, its clipping, its schedule and its adaptation.

A rule is looked at as what it does to one parameter (``Coordinate``): a state ``h <- F(h, g)`` and an update ``delta =
r(h, g)`` of a gradient g. Letters: N numbers of h, T updates, M systems side by side.

Source: Maheswaranathan et al. 2021, "Reverse Engineering Learned Optimizers Reveals Known and Novel Mechanisms".
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false, reportCallIssue=false
# (To pandas' stubs any selection of a frame may be a column, and any key of a group a single value.)

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from scipy.signal import lfilter
from torch import Tensor
from torch.func import jacrev

from metalearn import random
from metalearn.analysis.coordinates import SMALLEST, Coordinate
from metalearn.base import require_range

AT_REST = 1e-12  # of |h| that F may still move at a fixed point
SATURATED = 0.1  # d log |delta| / d log |g| below which an update no longer follows the gradient

# -- fixed points and what lies around them ----------------------------------------------------------------------------


class FixedPoint(NamedTuple):
    """A state that the rule leaves where it is, or nearly: ``residual`` is ``|F(h, g) - h|``."""

    h_N: Tensor
    grad: float
    step: int
    residual: float


class Linearised(NamedTuple):
    """The first order around a fixed point: ``dh <- A dh + b dg``, ``d delta = c dh + direct dg``."""

    a_NN: Tensor
    b_N: Tensor
    c_N: Tensor
    direct: float


def fixed_point(coordinate: Coordinate, grad: float = 0.0, step: int = 0, iterations: int = 100) -> FixedPoint:
    """The state in which the rule comes to rest under a constant gradient, the clock standing still.

    ``iterations`` updates from the start; from the state among these that moved least, up to as many damped Newton steps on
    ``|F(h, g) - h|^2 / 2``, which end nearby also where there is no fixed point: the residual says how far F still moves.

    Args:
        coordinate: the rule.
        grad: the gradient.
        step: updates that the rule takes to have been made, at least 0.
        iterations: of either kind, at least 1.

    Raises:
        ValueError: for values out of range.

    Source: Sussillo and Barak 2013, "Opening the Black Box: Low-Dimensional Dynamics in High-Dimensional Recurrent Neural
    Networks".
    """
    require_range("step", step, 0)
    require_range("iterations", iterations, 1)

    def moved(h_N: Tensor) -> Tensor:
        return coordinate(h_N, grad, step)[1] - h_N

    h_N = _stillest(moved, coordinate.start, iterations)
    residual_N, damping = moved(h_N).detach(), 1e-6
    for _ in range(iterations):
        if residual_N.norm() <= AT_REST * (1 + h_N.norm()):
            break
        jacobian = jacrev(moved)(h_N).detach()
        system = torch.cat([jacobian, damping**0.5 * torch.eye(len(h_N), dtype=torch.float64)])
        away = torch.linalg.lstsq(system, torch.cat([-residual_N, torch.zeros_like(h_N)]).unsqueeze(1)).solution[:, 0]
        there = moved(h_N + away).detach()
        if there.norm() < residual_N.norm():
            h_N, residual_N, damping = h_N + away, there, damping / 10
        else:
            damping *= 10
    return FixedPoint(h_N.detach(), grad, step, float(residual_N.norm()))


def _stillest(moved: Callable[[Tensor], Tensor], h_N: Tensor, iterations: int) -> Tensor:
    """Of ``iterations`` states, each the last one moved, that which moves least."""
    best_N, least = h_N, math.inf
    with torch.no_grad():
        for _ in range(iterations):
            by_N = moved(h_N)
            if float(by_N.norm()) <= least:
                best_N, least = h_N, float(by_N.norm())
            h_N = h_N + by_N
    return best_N


def linearise(coordinate: Coordinate, point: FixedPoint) -> Linearised:
    """The Jacobians of state and update by state and gradient.

    Raises:
        ValueError: where the rule has no derivative at the fixed point, as a root has none at 0.
    """
    size = len(point.h_N)

    def joined(inputs: Tensor) -> Tensor:
        delta, h_N = coordinate(inputs[:size], inputs[size], point.step)
        return torch.cat([h_N, delta.unsqueeze(0)])

    inputs = torch.cat([point.h_N, torch.tensor([point.grad], dtype=torch.float64)])
    whole = jacrev(joined)(inputs).detach()
    if not whole.isfinite().all():
        raise ValueError(
            f"the rule has no derivative at grad {point.grad}; accepted: the fixed point of another gradient"
        )
    return Linearised(whole[:size, :size], whole[:size, size], whole[size, :size], float(whole[size, size]))


def impulse_response(linear: Linearised, lags: int) -> pd.DataFrame:
    """What is left in the update of a gradient that was seen ``lag`` updates ago: ``direct``, then ``c A^(lag - 1) b``.

    Returns:
        Columns lag (0 ... lags), response.
    """
    require_range("lags", lags, 0)
    found, state_N = [linear.direct], linear.b_N
    for _ in range(lags):
        found.append(float(linear.c_N @ state_N))
        state_N = linear.a_NN @ state_N
    return pd.DataFrame({"lag": range(lags + 1), "response": found})


def modes(linear: Linearised) -> pd.DataFrame:
    """The eigenvectors of dF/dh, each of which is a memory: how long it lasts, and how much of it the update shows.

    With ``A v_k = lambda_k v_k`` and the dual vectors w_k, ``w_k v_j = [k = j]``: mode k adds ``(c v_k)(w_k b) lambda_k^(lag - 1)``
    to ``impulse_response``. A real lambda is the decay of a running mean, and ``-1 / log |lambda|`` its time scale in updates,
    infinite where it does not fade.

    Returns:
        Columns eigenvalue (complex), modulus, timescale, coefficient (complex: ``(c v_k)(w_k b)``, NaN where the eigenvectors
        do not span the space, as those of a shift register), strength (``|coefficient| / sqrt(1 - |lambda|^2)``, the
        Euclidean norm of what the mode adds; infinite where it does not fade, and the update shows it); strongest first.
    """
    values, vectors = (found.numpy() for found in torch.linalg.eig(linear.a_NN))
    coefficient = np.full(len(values), complex(math.nan, math.nan))
    if len(values) and np.linalg.cond(vectors) < 1e12:
        coefficient = (linear.c_N.numpy() @ vectors) * np.linalg.solve(vectors, linear.b_N.numpy().astype(complex))
    modulus = np.abs(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        fades = modulus < 1
        timescale = np.where(fades, -1 / np.log(modulus), np.inf)
        length = np.where(fades, np.abs(coefficient) / np.sqrt(np.where(fades, 1 - modulus**2, 1.0)), np.inf)
    strength = np.where(coefficient == 0, 0.0, length)
    columns = {"eigenvalue": values, "modulus": modulus, "timescale": timescale, "coefficient": coefficient}
    return pd.DataFrame(columns | {"strength": strength}).sort_values("strength", ascending=False, ignore_index=True)


def momentum(frame: pd.DataFrame) -> float:
    """The modulus of the strongest mode of ``modes``; 0 where the update shows no mode."""
    shown = frame[frame["strength"] > 0]
    return float(shown["modulus"].iloc[0]) if len(shown) else 0.0


class RunningMean(NamedTuple):
    """The running mean of gradients that explains updates best: its decay, and its share of their variance."""

    decay: float
    explained: float


class Driven(NamedTuple):
    """What a rule made of normal gradients, its clock standing still: the updates, and the state after the last."""

    grads_T: Tensor
    updates_T: Tensor
    h_N: Tensor
    step: int


def drive(coordinate: Coordinate, scale: float = 1.0, step: int = 0, length: int = 500, seed: int = 0) -> Driven:
    """Updates by normal gradients, from the rule's start.

    Args:
        coordinate: the rule.
        scale: standard deviation of the gradients, above 0.
        step: updates that the rule takes to have been made, at least 0.
        length: T, at least 1.
        seed: of the gradients.

    Raises:
        ValueError: for values out of range.
    """
    require_range("scale", scale, SMALLEST)
    require_range("step", step, 0)
    require_range("length", length, 1)
    grads_T = scale * random.normal(random.key(seed, "drive"), (length,)).double()
    updates_MT, h_MN = coordinate.run(grads_T.unsqueeze(0), repeat(step))
    return Driven(grads_T, updates_MT[0], h_MN[0], step)


def running_mean(driven: Driven) -> RunningMean:
    """Fit ``delta_t = a (g_t + decay g_{t-1} + decay^2 g_{t-2} + ...) + b`` to the second half of driven updates.

    It uses no Jacobian, so that it is a check on ``momentum``.
    """
    grads, updates, half = driven.grads_T.numpy(), driven.updates_T.numpy(), len(driven.grads_T) // 2
    target = updates[half:] - updates[half:].mean()

    def unexplained(log_forgotten: float) -> float:
        mean = lfilter([1.0], [1.0, -max(0.0, 1 - math.exp(log_forgotten))], grads)[half:]
        mean -= mean.mean()
        return float(1 - (mean @ target) ** 2 / (mean @ mean) / max(target @ target, SMALLEST))

    grid = np.linspace(-math.log(len(grads)), 0.0, 100)
    best = int(np.argmin([unexplained(place) for place in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(unexplained, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    place = min((grid[best], refined.x), key=unexplained)
    return RunningMean(1 - math.exp(place), 1 - unexplained(place))


# -- update curves, schedule, adaptation -------------------------------------------------------------------------------


def update_curve(coordinate: Coordinate, at: FixedPoint | Driven, grads: Sequence[float] | np.ndarray) -> pd.DataFrame:
    """The update as a function of the next gradient, state and clock being those of ``at``: columns grad, update."""
    grads_M = torch.as_tensor(grads, dtype=torch.float64)
    delta_M, _ = coordinate.together(at.h_N.expand(len(grads_M), -1), grads_M, at.step)
    return pd.DataFrame({"grad": grads_M.numpy(), "update": delta_M.numpy()})


def both_signs(low: float, high: float, points: int = 60) -> np.ndarray:
    """``-high ... -low, low ... high``, ``points`` of each sign, evenly spaced in their logarithm."""
    require_range("low", low, SMALLEST)
    require_range("high", high, low)
    positive = np.geomspace(low, high, points)
    return np.concatenate([-positive[::-1], positive])


class Clipping(NamedTuple):
    """Of an update curve: ``effective_step``, minus its slope near 0, and the gradient at which it is cut off."""

    effective_step: float
    threshold: float


def clipping(curve: pd.DataFrame, scale: float) -> Clipping:
    """Where the line through 0 of small gradients meets the update of the largest one.

    Both are of the odd part of the curve, ``(delta(-g) - delta(g)) / 2``. The threshold is infinite where the update still
    grows, d log |delta| / d log |g| > 0.1 over the largest gradients, from half of the largest on; it is NaN where small and
    large gradients do not both move against the gradient.

    Args:
        curve: from ``update_curve``, at gradients of ``both_signs``, ten or more of them up to ``scale``.
        scale: largest |g| that counts as small, above 0.

    Raises:
        ValueError: where no gradient is small.
    """
    half = len(curve) // 2
    grads, updates = curve["grad"].to_numpy(), curve["update"].to_numpy()
    size, odd = grads[half:], (updates[:half][::-1] - updates[half:]) / 2
    require_range("scale", scale, size[0])
    small = size <= scale
    slope = float(size[small] @ odd[small] / (size[small] @ size[small]))
    before, last = float(np.interp(math.log(size[-1] / 2), np.log(size), odd)), float(odd[-1])
    if min(slope, before, last) <= 0:
        return Clipping(slope, math.nan)
    return Clipping(slope, math.inf if math.log2(last / before) > SATURATED else last / slope)


def autonomous(coordinate: Coordinate, steps: int, scale: float = 1.0, h_N: Tensor | None = None) -> pd.DataFrame:
    """What the rule does by itself, gradients being 0, its clock running: a schedule, where the step changes with it.

    Args:
        coordinate: the rule.
        steps: updates, at least 1.
        scale: gradients +- scale are what effective steps are measured by, above 0.
        h_N: state (N,) to begin in; null for the rule's own start.

    Returns:
        Columns step (0 ... steps - 1), drift (the update at g = 0), effective_step (minus the mean slope between +- scale).

    Raises:
        ValueError: for values out of range.
    """
    require_range("steps", steps, 1)
    require_range("scale", scale, SMALLEST)
    h_N = coordinate.start if h_N is None else h_N
    probes_M = torch.tensor([0.0, scale, -scale], dtype=torch.float64)
    rows = []
    for step in range(steps):
        delta_M, h_MN = coordinate.together(h_N.expand(3, -1), probes_M, step)
        h_N = h_MN[0]
        rows.append((step, float(delta_M[0]), float(delta_M[2] - delta_M[1]) / (2 * scale)))
    return pd.DataFrame(rows, columns=["step", "drift", "effective_step"])


def half_life(frame: pd.DataFrame) -> float:
    """Updates until the effective step of ``autonomous`` has first fallen to half of the first.

    Infinite where it does not, NaN where the first is not positive.
    """
    if frame["effective_step"].iloc[0] <= 0:
        return math.nan
    share = frame["effective_step"].to_numpy() / frame["effective_step"].iloc[0]
    fallen = np.flatnonzero(share <= 0.5)
    if not len(fallen):
        return math.inf
    after = fallen[0]
    return float(after - (0.5 - share[after]) / (share[after - 1] - share[after]))


def adaptation(
    coordinate: Coordinate, magnitudes: Sequence[float] | np.ndarray, length: int = 100, step: int = 0, seed: int = 0
) -> pd.DataFrame:
    """The effective step after ``length`` gradients of one magnitude and random signs, the clock running from ``step``.

    Effective steps are minus the mean slope between gradients of +- the least magnitude, so that what clips large
    gradients does not count as adaptation.

    Args:
        coordinate: the rule.
        magnitudes: of the gradients, above 0.
        length: gradients seen before, at least 1.
        step: updates made before the first of them, at least 0.
        seed: of the signs, which are the same for all magnitudes.

    Returns:
        Columns magnitude, effective_step.

    Raises:
        ValueError: for values out of range.
    """
    probe = float(min(magnitudes))
    require_range("least of magnitudes", probe, SMALLEST)
    require_range("length", length, 1)
    size_M = torch.as_tensor(magnitudes, dtype=torch.float64)
    signs_T = random.normal(random.key(seed, "adaptation"), (length,)).double().sign()
    _, h_MN = coordinate.run(size_M.unsqueeze(1) * signs_T, range(step, step + length))
    up_M, down_M = (coordinate.together(h_MN, torch.full_like(size_M, g), step + length)[0] for g in (probe, -probe))
    return pd.DataFrame({"magnitude": size_M.numpy(), "effective_step": ((down_M - up_M) / (2 * probe)).numpy()})


def adaptation_exponent(frame: pd.DataFrame) -> float:
    """The a of ``update ~ g / |recent g|^a`` by least squares: 0 for fixed steps, 1 for RMS normalisation.

    NaN where an effective step of ``adaptation`` is not positive, so that it has no logarithm.
    """
    size, step = frame["magnitude"].to_numpy(), frame["effective_step"].to_numpy()
    return -float(np.polyfit(np.log(size), np.log(step), 1)[0]) if (step > 0).all() else math.nan


def findings(coordinate: Coordinate, scale: float = 1.0, steps: int = 100, seed: int = 0) -> dict[str, float]:
    """The numbers of all the functions above for a rule that meets gradients of about ``scale`` in runs of ``steps`` updates.

    With the clock in the middle of the run: ``momentum`` at the fixed point of g = 0, and its ``residual``; the decay of the
    ``running_mean`` and what it ``explains``; ``effective_step`` and ``clipping`` of the update curve after normal gradients.
    Then ``half_life`` of the schedule over the run, and ``adaptation_exponent`` from a hundredth of the scale to a hundred
    times it.

    Raises:
        ValueError: for values out of range.
    """
    require_range("steps", steps, 1)
    point, driven = fixed_point(coordinate, 0.0, steps // 2), drive(coordinate, scale, steps // 2, seed=seed)
    mean = running_mean(driven)
    cut = clipping(update_curve(coordinate, driven, both_signs(scale / 100, 1000 * scale)), scale / 10)
    return {
        "momentum": momentum(modes(linearise(coordinate, point))),
        "residual": point.residual,
        "running_mean": mean.decay,
        "explains": mean.explained,
        "effective_step": cut.effective_step,
        "clipping": cut.threshold,
        "half_life": half_life(autonomous(coordinate, steps, scale)),
        "adaptation_exponent": adaptation_exponent(
            adaptation(coordinate, scale * np.geomspace(0.01, 100, 9), steps, seed=seed)
        ),
    }
