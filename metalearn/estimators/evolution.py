"""Evolution strategies over unrolled runs: no gradient of the inner run is taken, and no history of it is kept.

A pair i is two inner runs under theta + epsilon_i and theta - epsilon_i, epsilon_i ~ N(0, sigma^2 I), which share batches
and keys. With L+, L- the losses of a step in the two halves and N pairs, a window's estimate is

    1/(2 sigma^2 N)  sum_i  sum_{steps of the window}  xi_i (L+_i - L-_i).

Estimators differ in when epsilon_i is drawn anew, and in xi_i, the perturbations that the step's loss is credited to:

| | epsilon is drawn | xi is | |
|---|---|---|---|
| ``TruncatedES`` | every window | epsilon | biased: each window begins at the unperturbed state |
| ``PersistentES`` | every window | the sum of the episode's | unbiased across windows |
| ``GeneralizedPersistentES`` | every K steps of an episode | the sum of the episode's | between the two neighbours |
| ``NoiseReuseES`` | every episode | epsilon | unbiased across windows |
| ``FullES`` | every episode, which is one window | epsilon | unbiased |

Unbiased means: for the gradient of the objective smoothed by the perturbations, which are held fixed along an episode or
drawn anew on the way.
"""

from typing import ClassVar

import torch
from torch import Tensor

from metalearn import tree
from metalearn.base import InnerProblem, Tree, require_range
from metalearn.estimators.antithetic import Evolution, Given, Pairs

ENDLESS = "its episodes never end, so that the perturbation of an episode would never be drawn anew"


class FullES(Evolution):
    """Evolution strategies over whole episodes: every estimate begins anew, and its window is the horizon.

    Args:
        pairs: antithetic pairs of all ranks, at least 1 and a multiple of the ranks.
        std: sigma > 0, the standard deviation of the perturbations.
        loss_cap: what a step's loss is cut off at in both halves, null for never.
        chunk: pairs that are stepped at a time, at least 1; null for all.
        vectorised: whether particles are stepped together by ``vmap``.

    Source: Salimans et al. 2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", section 2,
    with mirrored sampling.
    """

    def __init__(
        self,
        pairs: int = 16,
        std: float = 0.01,
        loss_cap: float | None = None,
        chunk: int | None = None,
        vectorised: bool = True,
    ):
        super().__init__(pairs, std, loss_cap=loss_cap, chunk=chunk, vectorised=vectorised)

    def redraws(self, pairs: Pairs, k: int) -> Tensor | None:
        return torch.ones_like(pairs.ended_N) if k == 0 else None

    def carried(self, pairs: Pairs) -> Tree:
        return {}

    def resumed(self, window: Given, carried: Tree) -> Pairs:
        if window.problem.horizon not in (None, window.batches.steps):
            raise ValueError(
                f"steps is {window.batches.steps}; accepted by FullES: the horizon, {window.problem.horizon}"
            )
        return self._blank(window.problem, window.place(window.center_P), window.key)


class TruncatedES(Evolution):
    """Evolution strategies within each window: biased, blind to how perturbations act beyond the window's end.

    Each pair carries one run under the unperturbed theta; both halves begin each window at its state.

    Source: the baseline of Vicol et al. 2021 (see ``PersistentES``), algorithm 1.
    """

    signs: ClassVar[tuple[int, ...]] = (1, -1, 0)
    accumulates: ClassVar[bool] = False

    def redraws(self, pairs: Pairs, k: int) -> Tensor | None:
        return torch.ones_like(pairs.ended_N) if k == 0 else None

    def carried(self, pairs: Pairs) -> Tree:
        return pairs._replace(inner=tree.index(pairs.inner, (slice(None), slice(2, 3))))

    def resumed(self, window: Given, carried: Tree) -> Pairs:
        return carried._replace(inner=tree.index(carried.inner, (slice(None), [0, 0, 0])))


class PersistentES(Evolution):
    """PES: a new perturbation every window, and each loss credited to all of its episode's perturbations so far.

    Its variance grows with the number of windows of an episode where their gradients disagree. An episode that begins
    within a window keeps the window's perturbation.

    Source: Vicol, Metz and Sohl-Dickstein 2021, "Unbiased Gradient Estimation in Unrolled Computation Graphs with
    Persistent Evolution Strategies", eq. 10 and algorithm 2.
    """

    def redraws(self, pairs: Pairs, k: int) -> Tensor | None:
        return torch.ones_like(pairs.ended_N) if k == 0 else None


class GeneralizedPersistentES(Evolution):
    """GPES: a new perturbation every K steps of an episode, credited as in ``PersistentES``.

    K at the horizon or above is ``NoiseReuseES``. Windows need not divide K, nor K windows.

    Args:
        pairs: antithetic pairs of all ranks, at least 1 and a multiple of the ranks.
        std: sigma > 0, the standard deviation of the perturbations.
        resample_every: K, at least 1.
        stagger: whether the first episodes are cut short at different steps, which spreads the pairs' ages.
        loss_cap: what a step's loss is cut off at in both halves, null for never.
        chunk: pairs that are stepped at a time, at least 1; null for all.
        vectorised: whether particles are stepped together by ``vmap``.

    Source: Li et al. 2023, "Noise-Reuse in Online Evolution Strategies", section 3.
    """

    def __init__(
        self,
        pairs: int = 16,
        std: float = 0.01,
        resample_every: int = 10,
        stagger: bool = False,
        loss_cap: float | None = None,
        chunk: int | None = None,
        vectorised: bool = True,
    ):
        super().__init__(pairs, std, stagger, loss_cap, chunk, vectorised)
        require_range("resample_every", resample_every, 1)
        self.resample_every = resample_every

    def redraws(self, pairs: Pairs, k: int) -> Tensor | None:
        return pairs.age_N % self.resample_every == 0


class NoiseReuseES(Evolution):
    """NRES, also called ES-Single: one perturbation for a whole episode, over any number of windows.

    Its variance does not grow with the number of windows. It needs no more state than the perturbation.

    Source: Li et al. 2023, "Noise-Reuse in Online Evolution Strategies", eq. 6; Vicol et al. 2023, "Low-Variance
    Gradient Estimation in Unrolled Computation Graphs with ES-Single".
    """

    def refusal(self, problem: InnerProblem) -> str | None:
        return super().refusal(problem) or (ENDLESS if problem.horizon is None else None)

    def redraws(self, pairs: Pairs, k: int) -> Tensor | None:
        return pairs.age_N == 0
