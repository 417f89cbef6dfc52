"""Small problems with known meta-gradients, on which truncated estimators go wrong and unbiased ones must not."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from metalearn.base import InnerProblem, InnerState, Params, StepOutput, require_range
from metalearn.unroll import ended


class InfluenceBalancing(InnerProblem):
    """A linear system whose parameter helps at once and harms later: short horizons see the wrong sign.

    s_{t+1} = A s_t + theta c with A = (I + superdiagonal) / 2 on 23 states, c = +1 on the first 10 and -1 on the other
    13, s_0 = 1; the loss of step t is (s_t[0] - 1)^2 / 2 with s_t the state after it. The influence d s_k[0]/d theta of
    theta held for k steps rises to +16.5 and settles at -6, so s[0] tends to -6 theta, and theta* = -1/6.

    Args:
        horizon: steps of an episode, null for an endless one.

    Source: Tallec and Ollivier 2018, "Unbiased Online Recurrent Optimization", section 4; the setting of Vicol et al.
    2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies", section 5.
    """

    terminal = False
    num_states = 23
    num_positive = 10
    optimum = -1 / 6

    def __init__(self, horizon: int | None = None):
        _require_horizon(horizon)
        self.horizon = horizon

    def init_meta(self, key: Tensor) -> Params:
        return {"theta": torch.full((), 0.5, device=key.device)}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return _start(meta["theta"].new_ones(self.num_states))

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        s = self._transition(state.params["s"]) + meta["theta"] * self._signs(meta["theta"])
        state = _after(state, s)
        return state, StepOutput((s[0] - 1).square() / 2, ended(self, state))

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """``theta_error`` |theta - theta*|, and ``steady_loss``, that of a step once the state has settled."""
        theta = float(meta["theta"])
        influence = 2 * (2 * self.num_positive - self.num_states)
        return {"theta_error": abs(theta - self.optimum), "steady_loss": (influence * theta - 1) ** 2 / 2}

    def influence(self, steps: int) -> Tensor:
        """d s_k[0]/d theta for theta held during the last k = 1 … steps steps: (steps,), float64."""
        signs = self._signs(torch.zeros((), dtype=torch.float64))
        sensitivity, found = torch.zeros_like(signs), []
        for _ in range(steps):
            sensitivity = self._transition(sensitivity) + signs
            found.append(sensitivity[0])
        return torch.stack(found)

    def gradient(self, theta: float, steps: int, window: int | None = None) -> float:
        """d/d theta of the first ``steps`` losses summed; with ``window``, of a graph that is cut every so many steps."""
        meta = {"theta": torch.tensor(theta, dtype=torch.float64)}
        influence, state, total = self.influence(steps), self.init(meta, torch.zeros(())), 0.0
        for t in range(steps):
            state, _ = self.step(meta, state, None, torch.zeros(()))
            total += float((state.params["s"][0] - 1) * influence[t if window is None else t % window])
        return total

    def _signs(self, like: Tensor) -> Tensor:
        return torch.where(torch.arange(self.num_states, device=like.device) < self.num_positive, 1.0, -1.0).to(like)

    def _transition(self, s: Tensor) -> Tensor:
        return (s + torch.nn.functional.pad(s[1:], (0, 1))) / 2


class LearningRateToy(InnerProblem):
    """A learning rate that moves linearly from e^theta_0 to e^theta_1, for gradient descent on a two-dimensional landscape.

    f(x) = sqrt(x_0^2 + 5) - sqrt 5 + sin(x_1)^2 e^{-5 x_0^2} + |x_1 - 100| / 4 from x = (1, 1);
    x_{t+1} = x_t - ((1 - t/T) e^theta_0 + (t/T) e^theta_1) grad f(x_t), and the meta-objective is the sum of
    f(x_1) … f(x_T). Ripples that x meets only after x_0 has shrunk make it chaotic where the rate is large.

    Args:
        horizon: T, at least 1.

    Source: Vicol et al. 2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
    Strategies", section 5 and appendix.
    """

    terminal = False

    def __init__(self, horizon: int = 100):
        require_range("horizon", horizon, 1)
        self.steps = self.horizon = horizon

    def init_meta(self, key: Tensor) -> Params:
        return {"log_lr": torch.full((2,), -4.0, device=key.device)}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return _start(meta["log_lr"].new_ones(2))

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        begin, end = meta["log_lr"].exp()
        lr = begin + (end - begin) * (state.step.to(begin) / self.steps)
        x = state.params["s"]
        state = _after(state, x - lr * grad(self.landscape)(x))
        return state, StepOutput(self.landscape(state.params["s"]), ended(self, state))

    @staticmethod
    def landscape(x: Tensor) -> Tensor:
        """f at x (2,)."""
        bowl = (x[0].square() + 5).sqrt() - math.sqrt(5)
        return bowl + x[1].sin().square() * (-5 * x[0].square()).exp() + (x[1] - 100).abs() / 4

    def evaluate(self, meta: Params, key: Tensor, *, test: bool) -> dict[str, float]:
        """``meta_objective`` of an episode."""
        state, total = self.init(meta, key), 0.0
        for _ in range(self.steps):
            state, output = self.step(meta, state, None, key)
            total += float(output.loss)
        return {"meta_objective": total}


class Drift(InnerProblem):
    """s_{t+1} = s_t + theta from s_0 = 0: the last step's loss depends on theta through every step of the episode.

    Terminal objective s_T, of gradient T; else the mean of s_1 … s_T, of gradient (T + 1) / 2. An estimator that credits
    an episode's last loss to the latest perturbation only sees a W/T share of the former.

    Args:
        horizon: T, at least 1.
        terminal: whether the objective is the end of the episode, rather than the mean over its steps.
    """

    def __init__(self, horizon: int, terminal: bool = True):
        require_range("horizon", horizon, 1)
        self.steps = self.horizon = horizon
        self.terminal = terminal

    def init_meta(self, key: Tensor) -> Params:
        return {"theta": torch.zeros((), device=key.device)}

    def init(self, meta: Params, key: Tensor) -> InnerState:
        return _start(torch.zeros_like(meta["theta"]))

    def step(self, meta: Params, state: InnerState, batch: Any, key: Tensor) -> tuple[InnerState, StepOutput]:
        state = _after(state, state.params["s"] + meta["theta"])
        loss = torch.zeros_like(state.params["s"]) if self.terminal else state.params["s"] / self.steps
        return state, StepOutput(loss, ended(self, state))

    def outer(self, meta: Params, state: InnerState, batch: Any) -> Tensor:
        return state.params["s"] if self.terminal else torch.zeros_like(state.params["s"])


def _start(s: Tensor) -> InnerState:
    return InnerState({"s": s}, {}, {}, torch.zeros((), dtype=torch.int64, device=s.device), {})


def _after(state: InnerState, s: Tensor) -> InnerState:
    return state._replace(params={"s": s}, step=state.step + 1)


def _require_horizon(horizon: int | None) -> None:
    if horizon is not None:
        require_range("horizon", horizon, 1)
