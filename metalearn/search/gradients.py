"""Loss gradients of many candidates at once: all that tells their otherwise equal training runs apart.

Shape letters: P candidates, N examples, K classes or outputs, G points of a table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from metalearn.base import Loss, require_choice, require_range
from metalearn.losses.compiled import compile_gradient
from metalearn.losses.elementwise import OUTPUTS, activate
from metalearn.losses.program import Program

SPAN = -math.log(1e-8)  # float32 probabilities beyond 1 - 1e-8 are 1, and protected logarithms end at 1e-7


class CandidateGradients(ABC):
    """The gradient of each candidate's mean loss by the raw outputs of its own model, on shared targets."""

    count: int  # P

    @abstractmethod
    def gradient(self, prediction_PNK: Tensor, target_NK: Tensor) -> Tensor:
        """d mean_n loss_p / d prediction: (P, N, K). Row p depends on row p of the predictions alone."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> CandidateGradients:
        """Those of some candidates, in this order."""


class SymbolicGradients(CandidateGradients):
    """Programs, by the code of their symbolic derivatives: no autograd graph.

    With ``g = dl/dp`` of every entry, softmax outputs give ``p (g - sum_k g p) / N``, sigmoid outputs ``g p (1 - p) / N``
    and raw outputs ``g / N``. Computed in float32 at least, whatever autocast says.

    Args:
        programs: the losses, P of them.
        weights: of each program's edges, (num_weights,), or (0,) for all ones.
        output: "softmax", "sigmoid" or "identity": what losses see of raw outputs.

    Raises:
        ValueError: for weights that are not as many as edges, or another output.
    """

    def __init__(self, programs: Sequence[Program], weights: Sequence[Tensor], output: str):
        require_choice("output", output, OUTPUTS)
        if len(weights) != len(programs):
            raise ValueError(f"weights has {len(weights)} entries; accepted: {len(programs)}, one for each program")
        for program, own in zip(programs, weights, strict=True):
            if own.shape not in ((0,), (program.num_weights,)):
                shape = tuple(own.shape)
                raise ValueError(f"weights of {program} have shape {shape}; accepted: (0,) or ({program.num_weights},)")
        self.count, self.output = len(programs), output
        self.programs, self.weights = list(programs), [own.detach() for own in weights]
        # The weights as they were last used.
        self._cast: tuple[torch.device, torch.dtype, list[Tensor]] | None = None
        self._slopes = [compile_gradient(program, len(own) > 0) for program, own in zip(programs, weights, strict=True)]

    def gradient(self, prediction_PNK: Tensor, target_NK: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(prediction_PNK.device.type, enabled=False):
            z_PKN = _by_outputs(prediction_PNK)
            p_PKN = functional.softmax(z_PKN, 1) if self.output == "softmax" else activate(z_PKN, self.output)
            g_PKN = self.slopes(target_NK.T.to(p_PKN.dtype).contiguous(), p_PKN)
            if self.output == "softmax":
                g_PKN = _of_softmax(g_PKN.mul_(p_PKN), p_PKN)
            elif self.output == "sigmoid":
                g_PKN = g_PKN.mul_(p_PKN).mul_(1 - p_PKN)
            return g_PKN.div_(len(target_NK)).transpose(1, 2)

    def slopes(self, y: Tensor, p_P: Tensor) -> Tensor:
        """``dl/dp`` of every entry: targets (...) and outputs (P, ...) give (P, ...)."""
        if self._cast is None or self._cast[:2] != (p_P.device, p_P.dtype):
            self._cast = p_P.device, p_P.dtype, [own.to(p_P) for own in self.weights]
        rows = zip(self._slopes, self._cast[2], p_P.unbind(), strict=True)
        return torch.stack([torch.zeros_like(p) if f is None else f(y, p, w) for f, w, p in rows])

    def select(self, rows: Sequence[int]) -> SymbolicGradients:
        return SymbolicGradients([self.programs[row] for row in rows], [self.weights[row] for row in rows], self.output)


class TabulatedGradients(CandidateGradients):
    """Programs, by tables over the probability: the cost of a gradient does not depend on the size of a loss.

    As y is 0 or 1, a loss is two functions of p. ``dl/dp dp/dz`` of each (with softmax ``p dl/dp``, which stays smooth where
    ``dl/dp`` has poles) is tabulated on ``points`` values of ``logit p`` between those of 1e-8 and 1 - 1e-8, and looked up at
    the nearest; softmax's other term, ``-p sum_k p_k dl/dp_k``, is made of these.

    Args:
        exact: the gradients to tabulate, P of them; targets must be one-hot, or 0 and 1.
        points: G, at least 2. The distance between points is 36.8 / (G - 1) in ``logit p``.
        device: of the tables, that of the predictions.

    Raises:
        ValueError: for raw outputs, which have no range that could be tabulated.
    """

    def __init__(self, exact: SymbolicGradients, points: int = 4096, device: torch.device | str = "cpu"):
        require_choice("output of a table", exact.output, OUTPUTS[:2])
        require_range("points", points, 2)
        self.exact, self.count, self.points = exact, exact.count, points
        p_G = torch.linspace(-SPAN, SPAN, points, dtype=torch.float64, device=device).sigmoid()
        y_2G = torch.arange(2, device=device).unsqueeze(1).expand(2, points).to(p_G)
        p_P2G = p_G.expand(self.count, 2, points)
        slopes_P2G = exact.slopes(y_2G, p_P2G) * p_P2G
        self._table = (slopes_P2G if exact.output == "softmax" else slopes_P2G * (1 - p_P2G)).float().flatten(1)

    def gradient(self, prediction_PNK: Tensor, target_NK: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(prediction_PNK.device.type, enabled=False):
            z_PKN, y_KN = _by_outputs(prediction_PNK), target_NK.T.long().contiguous()
            if self.exact.output == "sigmoid":
                g_PKN = self._look_up(z_PKN, y_KN)
            else:
                p_PKN = functional.softmax(z_PKN, 1)
                g_PKN = _of_softmax(self._look_up(torch.logit(p_PKN), y_KN), p_PKN)
            return g_PKN.div_(len(target_NK)).transpose(1, 2)

    def _look_up(self, logit_PKN: Tensor, y_KN: Tensor) -> Tensor:
        scale = (self.points - 1) / (2 * SPAN)
        # The cast would make any integer of a NaN, whose row is lost but must not read beyond the table.
        place = logit_PKN.mul(scale).add_(SPAN * scale + 0.5).clamp_(0.5, self.points - 0.5).nan_to_num_(0.5)
        index = place.long().add_(y_KN, alpha=self.points)
        return self._table.gather(1, index.flatten(1)).view_as(logit_PKN).to(logit_PKN.dtype)

    def select(self, rows: Sequence[int]) -> TabulatedGradients:
        return self._with(self.exact.select(rows), self._table[list(rows)])

    def to(self, device: torch.device | str) -> TabulatedGradients:
        """The same tables on another device."""
        return self._with(self.exact, self._table.to(device))

    def _with(self, exact: SymbolicGradients, table: Tensor) -> TabulatedGradients:
        other = object.__new__(TabulatedGradients)
        other.exact, other.count, other.points, other._table = exact, exact.count, self.points, table
        return other


class ModuleGradients(CandidateGradients):
    """Any losses, by autograd through the loss alone: standard ones, polynomials, networks.

    What is differentiated is the mean of ``per_example``; a loss's own reduction is not made use of.

    Args:
        losses: P of them.
    """

    def __init__(self, losses: Sequence[Loss]):
        self.losses, self.count = list(losses), len(losses)

    def gradient(self, prediction_PNK: Tensor, target_NK: Tensor) -> Tensor:
        with torch.enable_grad(), torch.autocast(prediction_PNK.device.type, enabled=False):
            precise = prediction_PNK.detach().to(torch.promote_types(prediction_PNK.dtype, torch.float32))
            z_PNK, target_NK = precise.requires_grad_(), target_NK.to(precise.dtype)
            rows = zip(self.losses, z_PNK.unbind(), strict=True)
            totals = [loss.per_example(z_NK, target_NK).sum() for loss, z_NK in rows]
            live = [total for total in totals if total.requires_grad]
            if not live:
                return torch.zeros_like(precise)
            # The derivative of a sum of losses by the row of one is its own, even where others are NaN.
            (gradient,) = torch.autograd.grad(torch.stack(live).sum(), z_PNK, materialize_grads=True)
        return gradient / precise.shape[1]

    def select(self, rows: Sequence[int]) -> ModuleGradients:
        return ModuleGradients([self.losses[row] for row in rows])


class MixedGradients(CandidateGradients):
    """Candidates of several kinds as one population: those of the first part, then those of the second.

    Args:
        parts: gradients of each kind, at least one.
    """

    def __init__(self, parts: Sequence[CandidateGradients]):
        self.parts = list(parts)
        self.count = sum(part.count for part in parts)
        # Candidate i is the parts' candidate order[i]; None where all are in order.
        self._order: list[int] | None = None

    def gradient(self, prediction_PNK: Tensor, target_NK: Tensor) -> Tensor:
        if self._order is not None:
            order = torch.tensor(self._order, device=prediction_PNK.device)
            prediction_PNK = prediction_PNK[order.argsort()]
        rows = prediction_PNK.split([part.count for part in self.parts])
        found = torch.cat([part.gradient(own, target_NK) for part, own in zip(self.parts, rows, strict=True)])
        return found if self._order is None else found[order]

    def select(self, rows: Sequence[int]) -> MixedGradients:
        own = list(rows) if self._order is None else [self._order[row] for row in rows]
        by_part = sorted(range(len(own)), key=own.__getitem__)  # stable, so that repeated rows keep their places
        starts = [sum(part.count for part in self.parts[:place]) for place in range(len(self.parts))]
        parts = [
            part.select([own[i] - start for i in by_part if 0 <= own[i] - start < part.count])
            for part, start in zip(self.parts, starts, strict=True)
        ]
        chosen = MixedGradients([part for part in parts if part.count])
        if by_part != list(range(len(own))):
            chosen._order = [by_part.index(i) for i in range(len(own))]
        return chosen


def tabulated(gradients: CandidateGradients, device: torch.device | str = "cpu") -> CandidateGradients:
    """The same losses, programs by tables on ``device`` and all others as they are."""
    if isinstance(gradients, SymbolicGradients):
        return TabulatedGradients(gradients, device=device)
    if isinstance(gradients, TabulatedGradients):
        return gradients.to(device)
    if isinstance(gradients, MixedGradients):
        mixed = MixedGradients([tabulated(part, device) for part in gradients.parts])
        mixed._order = gradients._order
        return mixed
    return gradients


def _by_outputs(prediction_PNK: Tensor) -> Tensor:
    """(P, K, N), in float32 at least: with few outputs, a softmax along the last axis would cost ten times as much."""
    precise = prediction_PNK.to(torch.promote_types(prediction_PNK.dtype, torch.float32))
    return precise.transpose(1, 2).contiguous()


def _of_softmax(q_PKN: Tensor, p_PKN: Tensor) -> Tensor:
    """``q - p sum_k q_k``: the gradient by logits, of ``q = p dl/dp``, which it overwrites."""
    return q_PKN.addcmul_(p_PKN, q_PKN.sum(1, keepdim=True), value=-1)
