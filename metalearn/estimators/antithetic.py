"""Antithetic pairs of inner runs, stepped window by window: what all evolution strategies share.

Shape letters: N pairs, S runs of each (``signs``), M = N S runs, those of a pair side by side; n pairs of the N and their m
runs; P entries of the meta-parameters; K steps of the window.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metalearn import tree
from metalearn.base import Batches, Estimator, InnerProblem, InnerState, MetaGradient, Params, Tree, require_range
from metalearn.random import fold, normal
from metalearn.unroll import differentiable_kernels

GLOBAL_GENERATOR = (
    "its steps draw from torch's global generator (dropout does), so the halves of an antithetic pair would not share "
    "their random numbers"
)
NOTHING_TO_STAGGER = "stagger spreads pairs over the horizon, which it lacks"


class Pairs(NamedTuple):
    """What a rank carries of its antithetic pairs from window to window: every leaf has the pair first."""

    inner: InnerState  # (N, S, …); within a window (M, …)
    direction_NP: Tensor  # epsilon
    credit_NP: Tensor  # xi
    age_N: Tensor  # int64, steps since the start of the episode
    until_cut_N: Tensor  # int64, steps before the first episode is cut short; not positive where that is over
    ended_N: Tensor  # bool, whether the next step begins a new episode


class Given(NamedTuple):
    """What an estimate is given, and what follows from it for the whole window."""

    problem: InnerProblem
    center_P: Tensor  # theta, in at least float32
    place: Callable[[Tensor], Params]  # (…, P) as meta-parameters
    batches: Batches
    key: Tensor
    number_N: Tensor  # of each pair among those of all ranks
    step_key_KN: Tensor  # of each pair's steps


class Evolution(Estimator):
    """Antithetic evolution strategies, window by window.

    An episode's last loss is credited like those before it; a new episode begins with the slot after. ``outer`` belongs
    to an episode's last step, or to the window's last where the run is endless. A pair with a loss that is not finite
    gives nothing to the window's estimate, begins a new episode with the next window and is counted in the diagnostics.

    Args:
        pairs: antithetic pairs of all ranks, at least 1 and a multiple of the ranks.
        std: sigma > 0, the standard deviation of the perturbations.
        stagger: whether the first episodes are cut short at different steps, so that the pairs' ages are spread evenly
            over the horizon and every window sees all ages. A cut episode has no ``outer``.
        loss_cap: what a step's loss is cut off at in both halves, null for never.
        chunk: pairs that are stepped at a time, at least 1, which bounds memory; null for all.
        vectorised: whether particles are stepped together by ``vmap``; false where the problem's step cannot be.
    """

    shards: ClassVar[str] = "pairs"
    signs: ClassVar[tuple[int, ...]] = (1, -1)  # multiples of the perturbation under which a pair's runs go
    accumulates: ClassVar[bool] = True  # whether xi sums the episode's perturbations

    def __init__(
        self,
        pairs: int = 16,
        std: float = 0.01,
        stagger: bool = False,
        loss_cap: float | None = None,
        chunk: int | None = None,
        vectorised: bool = True,
    ):
        require_range("pairs", pairs, 1)
        if not 0 < std < float("inf"):
            raise ValueError(f"std is {std!r}; accepted: 0 < std < inf")
        if chunk is not None:
            require_range("chunk", chunk, 1)
            if not vectorised:
                raise ValueError(f"chunk is {chunk!r} without vectorised; accepted: null")
        self.pairs, self.std, self.stagger, self.loss_cap = pairs, std, stagger, loss_cap
        self.chunk, self.vectorised = chunk, vectorised

    @abstractmethod
    def redraws(self, pairs: Pairs, k: int) -> Tensor | None:
        """Which pairs draw a perturbation before the window's k-th step: bool (N,), or None where none does."""

    def directions(self, key: Tensor, number_N: Tensor, size: int) -> Tensor:
        """Perturbations of unit variance (N, size), each a function of the key and of the pair's number alone."""
        return normal(fold(key, number_N), (size,))

    def refusal(self, problem: InnerProblem) -> str | None:
        if problem.global_generator:
            return GLOBAL_GENERATOR
        return NOTHING_TO_STAGGER if self.stagger and problem.horizon is None else None

    def init(self, problem: InnerProblem, meta: Params, key: Tensor) -> Tree:
        if reason := self.refusal(problem):
            raise ValueError(f"{type(self).__name__} cannot be used on {type(problem).__name__}: {reason}")
        return {"pairs": self.carried(self._blank(problem, meta, key)), "shared": {}}

    def estimate(self, problem: InnerProblem, meta: Params, state: Tree, batches: Batches, key: Tensor) -> MetaGradient:
        require_range("steps", batches.steps, 1)
        center_P, place = _center(meta)
        number_N = self._numbers(key)
        step_key_KN = fold(key, "step", torch.arange(batches.steps, device=key.device)[:, None], number_N)
        window = Given(problem, center_P, place, batches, key, number_N, step_key_KN)
        # Differences of losses, as those of nearby weights are, need float32.
        with torch.no_grad(), differentiable_kernels(), torch.autocast(key.device.type, enabled=False):
            return self._estimate(window, self.resumed(window, state["pairs"]))

    def carried(self, pairs: Pairs) -> Tree:
        """What of the pairs is needed after the window."""
        return pairs

    def resumed(self, window: Given, carried: Tree) -> Pairs:
        """The pairs at the window's start."""
        return carried

    # -- one window --

    def _estimate(self, window: Given, pairs: Pairs) -> MetaGradient:
        grad_NP, finished_N = torch.zeros_like(pairs.credit_NP), torch.zeros_like(pairs.ended_N)
        delta_N = loss_N = torch.zeros_like(grad_NP[:, 0])
        metas_M, taken_NP = {}, None
        pairs = pairs._replace(inner=tree.map(lambda leaf: leaf.flatten(0, 1), pairs.inner))
        for k in range(window.batches.steps):
            pairs = self._renewed(window, pairs, k)
            if pairs.direction_NP is not taken_NP:
                metas_M, taken_NP = self._perturbed(window, pairs.direction_NP), pairs.direction_NP
            pairs, losses_NS = self._stepped(window, pairs, metas_M, k)
            difference_N = losses_NS[:, 0] - losses_NS[:, 1]
            grad_NP = grad_NP + difference_N[:, None] * pairs.credit_NP
            delta_N, loss_N = delta_N + difference_N, loss_N + losses_NS[:, :2].mean(1)
            finished_N = finished_N | pairs.ended_N
        finite_N = grad_NP.isfinite().all(1)
        grad_P = _mean_in_halves(torch.where(finite_N[:, None], grad_NP, 0) / (2 * self.std**2))
        diagnostics = {
            "delta": _mean_of(delta_N.abs(), finite_N),
            "finished": finished_N.to(grad_P.dtype).mean(),
            "nonfinite_pairs": (~finite_N).sum(),
            "age": pairs.age_N.to(grad_P.dtype).mean(),
        }
        inner = tree.map(self._by_pair, pairs.inner)
        pairs = pairs._replace(inner=inner, ended_N=pairs.ended_N | ~finite_N)
        state = {"pairs": self.carried(pairs), "shared": {}}
        return MetaGradient(window.place(grad_P), _mean_of(loss_N, finite_N), state, diagnostics)

    def _renewed(self, window: Given, pairs: Pairs, k: int) -> Pairs:
        """Before step k: new episodes where the last one ended, and new perturbations where they are due."""
        # Endless runs begin anew at a window's start only, so that nothing need wait for the device within it.
        ended = _rows(pairs.ended_N if k == 0 or window.problem.horizon is not None else None)
        pairs = pairs._replace(age_N=torch.where(pairs.ended_N, 0, pairs.age_N))
        redrawn_N = self.redraws(pairs, k)
        redrawn = _rows(redrawn_N)
        if len(redrawn):
            key = fold(window.key, "direction", k)
            drawn_nP = self.directions(key, window.number_N[redrawn], len(window.center_P)).to(window.center_P)
            pairs = pairs._replace(direction_NP=pairs.direction_NP.index_copy(0, redrawn, drawn_nP * self.std))
            pairs = pairs._replace(credit_NP=pairs.credit_NP.index_add(0, redrawn, pairs.direction_NP[redrawn]))
        if not self.accumulates:
            pairs = pairs._replace(credit_NP=pairs.direction_NP)
        if not len(ended):
            return pairs
        credit_NP = pairs.credit_NP.index_copy(0, ended, pairs.direction_NP[ended])
        return pairs._replace(credit_NP=credit_NP, inner=self._begun(window, pairs, ended, k))

    def _begun(self, window: Given, pairs: Pairs, ended: Tensor, k: int) -> InnerState:
        """The inner states, fresh in the rows ``ended``: run by run, since ``init`` need not be vmappable."""
        metas_m = self._perturbed(window, pairs.direction_NP[ended])
        keys_m = fold(window.key, "episode", k, window.number_N[ended]).repeat_interleave(len(self.signs))
        fresh_m = tree.stack([window.problem.init(tree.index(metas_m, row), key) for row, key in enumerate(keys_m)])
        runs = self._runs_of(ended)
        return tree.map(lambda old, new: old.index_copy(0, runs, new), pairs.inner, fresh_m)

    def _stepped(self, window: Given, pairs: Pairs, metas_M: Params, k: int) -> tuple[Pairs, Tensor]:
        """The pairs after step k, and its losses (N, S), NaN where they are not finite."""
        problem, batches = window.problem, window.batches
        keys_M = window.step_key_KN[k].repeat_interleave(len(self.signs))
        inner, output = self._each(problem.step, problem.step_runs, metas_M, pairs.inner, batches.inner(k), keys_M)
        done_N, until_cut_N = self._by_pair(output.done).any(1), pairs.until_cut_N - 1
        loss_NS = self._by_pair(output.loss.to(torch.promote_types(output.loss.dtype, window.center_P.dtype)))
        due_N = done_N
        if problem.horizon is None:
            due_N = torch.ones_like(done_N) if k == batches.steps - 1 else None
        if len(due := _rows(due_N)):
            several = vmap(problem.outer, (0, 0, None), randomness="error")
            outer_m = self._each(
                problem.outer, several, *tree.index((metas_M, inner), self._runs_of(due)), batches.outer
            )
            loss_NS = loss_NS.index_add(0, due, self._by_pair(outer_m.to(loss_NS.dtype)))
        ended_N = done_N | (until_cut_N == 0)
        pairs = pairs._replace(inner=inner, age_N=pairs.age_N + 1, until_cut_N=until_cut_N, ended_N=ended_N)
        return pairs, self._capped(loss_NS)

    def _each(
        self, one: Callable, several: Callable, metas_M: Params, states_M: InnerState, batch: Any, *keys_M: Tensor
    ) -> Any:
        """``one`` of every run, by ``several``; the batch is that of all."""
        count = len(states_M.step)
        size = count if self.chunk is None else self.chunk * len(self.signs)
        if self.vectorised and size >= count:
            return several(metas_M, states_M, batch, *keys_M)
        given_M = (metas_M, states_M, keys_M)
        if not self.vectorised:
            rows = [tree.index(given_M, row) for row in range(count)]
            return tree.stack([one(meta, state, batch, *key) for meta, state, key in rows])
        chunks = [tree.index(given_M, slice(first, first + size)) for first in range(0, count, size)]
        parts = [several(metas, states, batch, *keys) for metas, states, keys in chunks]
        return tree.map(lambda *same: torch.cat(same), *parts)

    def _by_pair(self, leaf: Tensor) -> Tensor:
        """(M, …) as (N, S, …)."""
        return leaf.unflatten(0, (-1, len(self.signs)))

    def _runs_of(self, rows: Tensor) -> Tensor:
        """Where the runs of these pairs are among all."""
        runs = torch.arange(len(self.signs), device=rows.device)
        return (rows[:, None] * len(self.signs) + runs).flatten()

    def _capped(self, loss_NS: Tensor) -> Tensor:
        """Losses cut off at the cap; an infinite one becomes NaN first, which no cap hides."""
        loss_NS = torch.where(loss_NS.isfinite(), loss_NS, torch.nan)
        return loss_NS if self.loss_cap is None else loss_NS.clamp(max=self.loss_cap)

    def _perturbed(self, window: Given, direction_NP: Tensor) -> Params:
        """theta + sign epsilon of every run."""
        each = [window.center_P + sign * direction_NP for sign in self.signs]
        return window.place(torch.stack(each, 1).flatten(0, 1))

    # -- the state --

    def _numbers(self, key: Tensor) -> Tensor:
        share, rest = divmod(self.pairs, self.world)
        if rest:
            raise ValueError(f"pairs is {self.pairs}; accepted: a multiple of the {self.world} ranks")
        return torch.arange(share, device=key.device) + share * self.rank

    def _blank(self, problem: InnerProblem, meta: Params, key: Tensor) -> Pairs:
        """Pairs that all begin an episode with the next step; their inner states are there for the shapes."""
        number_N = self._numbers(key)
        with torch.no_grad():
            start = problem.init(meta, fold(key, "episode"))
        inner = tree.map(lambda leaf: leaf.expand(len(number_N), len(self.signs), *leaf.shape).clone(), start)
        age_N = torch.zeros_like(number_N)
        cut_N = -(-(number_N + 1) * problem.horizon // self.pairs) if self.stagger and problem.horizon else age_N
        zeros_NP = _center(meta)[0].expand(len(number_N), -1).mul(0)
        return Pairs(inner, zeros_NP, zeros_NP.clone(), age_N, cut_N.clone(), torch.ones_like(age_N).bool())


def _center(meta: Params) -> tuple[Tensor, Callable[[Tensor], Params]]:
    """theta (P,) in at least float32, and the way back to the meta-parameters' own precision."""
    center_P, unravel = tree.ravel(tree.detach(meta))

    def place(vector: Tensor) -> Params:
        return {name: value.to(meta[name].dtype) for name, value in unravel(vector).items()}

    return center_P.to(torch.promote_types(center_P.dtype, torch.float32)), place


def _rows(mask_N: Tensor | None) -> Tensor:
    """Where the mask is true; None is nowhere, and costs no waiting for the device."""
    return torch.zeros(0, dtype=torch.int64) if mask_N is None else mask_N.nonzero().squeeze(1)


def _mean_in_halves(values_NP: Tensor) -> Tensor:
    """The mean over the first axis, neighbours added first, then those sums, and so on.

    Where pairs and ranks are powers of two, a rank's sum is one of the sums of a single rank: both come to the same bits.
    """
    count = len(values_NP)
    while len(values_NP) > 1:
        last_P = values_NP[len(values_NP) // 2 * 2 :]
        firsts = values_NP[: len(values_NP) - len(last_P)]
        values_NP = torch.cat([firsts[::2] + firsts[1::2], last_P])
    return values_NP[0] / count


def _mean_of(values_N: Tensor, mask_N: Tensor) -> Tensor:
    """The mean where the mask is true; NaN where it is nowhere."""
    return torch.where(mask_N, values_N, 0).sum() / mask_N.sum()
