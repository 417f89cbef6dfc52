"""Guards: a learned optimizer, and another that takes over where it does worse.

A guard holds two optimizers over the same parameters and is one optimizer to everything else. Each step calls its closure
twice, at two points, with the same draws. The state of either optimizer has seen nothing but points that were kept.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from metalearn.base import require_range, require_whole
from metalearn.optim.guarded import (
    GUARD,
    LEARNED,
    Closure,
    Grads,
    Guarded,
    copied_settings,
    copied_state,
    params_of,
    set_settings,
    set_state,
)
from metalearn.optim.torch_face import mean_over_processes


class LossGuard(Guarded):
    """LGL2O: both optimizers run side by side, and the branch with the lower losses is kept.

    A period begins with both at one point. Each takes ``period`` steps of its own on the same batches, and the loss at the end
    of each of these steps is that of the next batch. At the end of the period the branch of ``learned`` is kept where
    ``mean loss of learned <= mean loss of guard - margin``, else that of ``guard``, and both go on from the point that is kept:
    what is kept of a period is never above the guard's branch on the same batches. A loss or a gradient that is not finite
    loses.

    A step calls its closure once on each branch's parameters: two gradients a step. Between steps the parameters are those
    of the branch that leads in this period; at its start, of the branch that was kept. The optimizer whose branch is left
    goes on with the state that it would have after the gradients of the branch that is kept: momenta of its own branch would
    pull it back there, and a clock that stood still would have it believe that the run is younger than it is. For this, each
    optimizer takes a second step on the other's branch, which moves nothing: four steps of optimizers in all. In memory there
    are one more copy of the parameters and one of both states, and during a step two copies of the gradients.

    The last period of a run is not decided until ``finish`` is called.

    Under ``torch.distributed`` losses are means over all processes, so that all keep the same branch.

    Args:
        learned: Optimizer that is not trusted.
        guard: Optimizer that is, over the same parameters; the proofs are of SGD.
        period: Steps of a period, at least 1.
        margin: How much less the loss of ``learned`` must be, at least 0.

    Raises:
        ValueError: The optimizers have other parameters, or a value is out of range.

    Source: Prémont-Schwarz et al. 2022, "A Simple Guard for Learned Optimizers". Differs from the paper: losses are those of
    the batches along the way, which cost nothing more, and not of further batches at the end of the period; states follow
    the branch that is kept.
    """

    counters = ("inside", "kept", "steps", "evaluated", "losses", "periods", "periods_learned")

    def __init__(self, learned: Optimizer, guard: Optimizer, period: int = 10, margin: float = 0.0):
        require_whole("period", period, 1)
        require_range("margin", margin, 0.0)
        self.period, self.margin = period, margin
        self.inside = self.kept = GUARD  # the branch whose point the parameters are, and the one that was kept at last
        self.steps = self.evaluated = 0  # of this period: steps taken, and ends of steps whose loss is known
        self.losses = {LEARNED: 0.0, GUARD: 0.0}  # their sums
        self.periods = self.periods_learned = 0  # periods that are over, and those of them that kept the learned branch
        self.spare: list[Tensor] = []  # the other branch's point
        self.observed: dict[str, dict[Any, Any]] = {LEARNED: {}, GUARD: {}}  # states after the other branch's gradients
        super().__init__(learned, guard)

    @property
    def fraction_learned(self) -> float:
        """Share of the periods that are over in which the learned branch was kept; NaN before the first is over."""
        return self.periods_learned / self.periods if self.periods else math.nan

    def _step(self, closure: Closure) -> Any:
        self.spare = self.spare or self._point()
        first, found = self.inside, self._evaluated(closure)
        loss, grads = found[first]
        if 0 < self.steps < self.period:
            self._advance(*found[self.inside])
            self._turn()
            self._set_grads(grads)
            self._advance(loss, grads)
        else:  # both optimizers step from one of the two points
            self._keep()
            self._begin(*found[self.kept])
        self.steps += 1
        if self.inside != self._leader():
            self._turn()
        if self.inside == LEARNED and not self._finite():  # its loss will say so, but this step may have been the last
            self._turn()
        return loss

    def finish(self, closure: Closure) -> None:
        """End the period at hand, as after the last step of a run: the parameters become those of the branch that is kept.

        The next step begins a period. Nothing happens where none is at hand.

        Args:
            closure: As in ``step``; called once on each branch's parameters, for the losses of their last steps.

        Raises:
            ValueError: There is no closure, or it returns no number.
        """
        evaluate = self._evaluation(closure)
        if not self.steps:
            return
        with self._cleared(), torch.no_grad():
            self._evaluated(evaluate)
            self._keep()
        self.losses, self.steps, self.evaluated = {LEARNED: 0.0, GUARD: 0.0}, 0, 0
        self.zero_grad()

    def _evaluated(self, closure: Closure) -> dict[str, tuple[Any, Grads]]:
        """The loss and the gradients of both branches, on the same draws. Where a closure raises, nothing has happened.

        Afterwards the parameters are those of the other branch, which was the second, and their gradients its own.
        """
        found, numbers, first = {}, {}, self.inside
        try:
            for again in (False, True):
                if again:
                    self._turn()
                with contextlib.nullcontext() if again else self._draws_to_repeat():
                    loss, grads = closure(), self._grads()
                # Now: the tensor may be one that the closure writes into every time.
                numbers[self.inside] = self._number(loss, grads)
                found[self.inside] = loss.detach().clone() if isinstance(loss, Tensor) else loss, grads
        except BaseException:
            if self.inside != first:
                self._turn()
            raise
        self.losses = {name: self.losses[name] + number for name, number in numbers.items()}
        self.evaluated += 1
        return found

    def _number(self, loss: Any, grads: Grads) -> float:
        """The loss, averaged over all processes; NaN where a gradient is not finite."""
        device = params_of(self.learned)[0].device
        sound = _all_finite([grad for grad in grads if grad is not None], device)
        return float(mean_over_processes(torch.where(sound, torch.as_tensor(loss, device=device).detach(), math.nan)))

    def _finite(self) -> bool:
        params = params_of(self.learned)
        return bool(_all_finite(params, params[0].device))

    def _leader(self) -> str:
        """The branch with the lower losses in this period; while none is known, the one that was kept."""
        if not self.evaluated:
            return self.kept
        learned, allowed = self.losses[LEARNED], self.losses[GUARD] - self.evaluated * self.margin
        better = math.isfinite(learned) and (learned <= allowed or not math.isfinite(allowed))
        return LEARNED if better else GUARD

    def _keep(self) -> None:
        """End the period, if this is the end of one: the leader's point, and the states that go with it."""
        if self.steps:
            self.kept = self._leader()
            self.periods += 1
            self.periods_learned += self.kept == LEARNED
            left = _other(self.kept)
            set_state(self.optimizers[left], self.observed[left])
        if self.inside != self.kept:
            self._turn()
        self.spare = self._point()

    def _begin(self, loss: Any, grads: Grads) -> None:
        """The first step of a period, of both branches, by one gradient."""
        self.losses, self.steps, self.evaluated = {LEARNED: 0.0, GUARD: 0.0}, 0, 0
        for _ in self.optimizers:
            self._set_grads(grads)
            self.optimizers[self.inside].step(lambda: loss)
            self._turn()
        self.observed = {name: copied_state(optimizer.state) for name, optimizer in self.optimizers.items()}

    def _advance(self, loss: Any, grads: Grads) -> None:
        """A step of this branch's optimizer, and before it one of the other's that moves nothing, by the gradients at hand."""
        self._observe(loss)
        self._set_grads(grads)
        self.optimizers[self.inside].step(lambda: loss)

    def _observe(self, loss: Any) -> None:
        """Show the other optimizer the gradient at this branch's point."""
        name, here = _other(self.inside), self._point()
        optimizer, own = self.optimizers[name], dict(self.optimizers[name].state)
        settings = copied_settings(optimizer)
        set_state(optimizer, self.observed[name])
        optimizer.step(lambda: loss)
        self.observed[name] = dict(optimizer.state)
        set_state(optimizer, own)
        set_settings(optimizer, settings)
        self._move(here)

    def _turn(self) -> None:
        """Make the parameters those of the other branch."""
        point = self._point()
        self._move(self.spare)
        self.spare = point
        self.inside = _other(self.inside)

    def _saved(self) -> dict[str, Any]:
        observed = {name: _indexed(self.observed[name], optimizer) for name, optimizer in self.optimizers.items()}
        return super()._saved() | {"spare": list(self.spare), "observed": observed}

    def _load(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict({**state[name], "state": state["observed"][name]})
            self.observed[name] = copied_state(optimizer.state)
        super()._load(state)
        # Before the first step there is none.
        pairs = zip(state["spare"], params_of(self.learned), strict=False)
        self.spare = [value.to(p.device, copy=True) for value, p in pairs]


class GL2O(Guarded):
    """Safe-L2O: a learned step is accepted where the guard would hardly move from its end.

    With T a step of ``guard`` on the same batch, y the end of the step of ``learned`` from x, and ``r = |T(y) - y|``: x becomes y
    where ``r <= alpha mu``, and ``mu <- theta r + (1 - theta) mu``; else x becomes T(x). At first ``mu = |T(x) - x|``. A step that
    is not accepted leaves the state of ``learned`` as it was, and one that is accepted that of ``guard``. Two gradients a step.
    At a point without a gradient mu is 0 and nothing is accepted; it is found anew at the next that has one.

    Args:
        learned: Optimizer that is not trusted.
        guard: Optimizer that is, over the same parameters; the proofs are of gradient descent on convex functions.
        alpha: Share of mu that the residual may have, 0 ... 1.
        theta: Share of the newest residual in mu, 0 ... 1.

    Raises:
        ValueError: The optimizers have other parameters, or a value is out of range.

    Source: Heaton et al. 2020, "Safeguarded Learned Convex Optimization", with the exponential moving average of its released
    code. Differs from the paper: residuals are those of a batch, and alpha and theta are our choice.
    """

    counters = ("mu", "steps", "accepted")

    def __init__(self, learned: Optimizer, guard: Optimizer, alpha: float = 0.99, theta: float = 0.9):
        require_range("alpha", alpha, 0.0, 1.0)
        require_range("theta", theta, 0.0, 1.0)
        self.alpha, self.theta = alpha, theta
        self.mu = math.nan  # before the first gradient that is finite and not 0
        self.steps = self.accepted = 0  # steps taken, and those of them that were the learned optimizer's
        super().__init__(learned, guard)

    @property
    def fraction_learned(self) -> float:
        """Share of the steps that were the learned optimizer's; NaN before the first."""
        return self.accepted / self.steps if self.steps else math.nan

    def _step(self, closure: Closure) -> Any:
        with self._draws_to_repeat():
            loss = closure()
        grads = self._grads()
        mu = self.mu
        if not 0 < mu < math.inf:
            mu = self._residual(loss)
            self._set_grads(grads)
        start, before, settings = self._point(), copied_state(self.learned.state), copied_settings(self.learned)
        accepted = False
        try:
            self.learned.step(lambda: loss)
            residual = self._residual(closure())
            accepted = math.isfinite(residual) and residual <= self.alpha * mu
        finally:  # where the closure raises, too
            if not accepted:
                self._move(start)
                set_state(self.learned, before)
                set_settings(self.learned, settings)
        if accepted:
            mu = self.theta * residual + (1 - self.theta) * mu
        else:
            self._set_grads(grads)
            self.guard.step(lambda: loss)
        self.mu, self.steps, self.accepted = mu, self.steps + 1, self.accepted + accepted
        return loss

    def _residual(self, loss: Any) -> float:
        """How far the guard would move from here."""
        here, before, settings = self._point(), copied_state(self.guard.state), copied_settings(self.guard)
        self.guard.step(lambda: loss)
        pairs = zip(params_of(self.learned), here, strict=True)
        moved = torch.stack([(p - value).double().norm().to(here[0].device) for p, value in pairs])
        self._move(here)
        set_state(self.guard, before)
        set_settings(self.guard, settings)
        return float(moved.norm())


def _other(name: str) -> str:
    return GUARD if name == LEARNED else LEARNED


def _all_finite(values: list[Tensor], device: torch.device) -> Tensor:
    """Whether all entries are finite, as a tensor on this device."""
    return torch.stack([torch.tensor(True, device=device), *(x.isfinite().all().to(device) for x in values)]).all()


def _indexed(state: dict[Any, Any], optimizer: Optimizer) -> dict[Any, Any]:
    """A state with positions for parameters, as state dictionaries have it."""
    places = {id(p): place for place, p in enumerate(params_of(optimizer))}
    return {places.get(id(key), key): value for key, value in state.items()}
