"""What is known of a loss before anything is trained: whether it teaches nothing, the wrong thing, or what another one teaches.

Shape letters: P candidates, V vectors of weights, M weights, G points of a grid, N examples, K classes or outputs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn import random
from metalearn.base import require_choice, require_range
from metalearn.losses import compiled
from metalearn.losses.elementwise import OUTPUTS
from metalearn.losses.program import Program
from metalearn.optim.first_order import Adam
from metalearn.problems.learned_loss import LossTask
from metalearn.search.candidates import Candidate
from metalearn.search.gradients import CandidateGradients

WRONG_SIGN = ("reject", "final", "keep")

_ZERO = 1e-6  # gradients by raw outputs below this train nothing in float32 at any usual rate
_UNIT = 1e-5 * 3**0.5  # of rounding; irrational, so that round numbers do not lie between two multiples


# -- proofs --------------------------------------------------------------------------------------------------------------


class Proof(NamedTuple):
    """What the symbolic derivative says of a candidate."""

    dead: bool  # it teaches nothing, under any weights that it may be given
    key: str  # shared by candidates whose derivatives by the output are written alike


def prove(candidate: Candidate, output: str, weighted: bool) -> Proof:
    """Judge a candidate by its symbolic derivative, which is taken once for all candidates of one canonical program.

    Equal keys mean equal runs: of the weights as they are, or, with ``weighted``, of the same weights in canonical order,
    wherever training takes them. Under a softmax, terms of the derivative without y and p change nothing and are left out.

    Args:
        candidate: what is judged. Of a polynomial nothing is proven.
        output: "softmax", "sigmoid" or "identity".
        weighted: whether the weights will be trained, so that they are symbols of the derivative; else they are those of
            the candidate, or 1.
    """
    require_choice("output", output, OUTPUTS)
    canonical = candidate.canonical
    if canonical.program is None:
        return Proof(False, _digest(output, weighted, "polynomial", canonical.weights))
    symbols = weighted or bool(canonical.weights)
    dead, text = _derived(canonical.program, symbols, output == "softmax")
    return Proof(dead, _digest(output, weighted, text, canonical.weights))


@functools.lru_cache(maxsize=4096)
def _derived(program: Program, weighted: bool, softmax: bool) -> tuple[bool, str]:
    from metalearn.losses import symbolic

    derivative = symbolic.derivative(program, weighted)
    taught = derivative.as_independent(symbolic.TARGET, symbolic.OUTPUT, as_Add=True)[1] if softmax else derivative
    return symbolic.is_dead(derivative, softmax), symbolic.key(taught)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# -- fingerprints --------------------------------------------------------------------------------------------------------


class Fingerprint(NamedTuple):
    """What the gradient on a grid says of a candidate."""

    verdict: str | None  # "not finite", "dead", "wrong sign"; None where nothing speaks against it
    key: str  # shared by equal gradients, to about five digits
    shape: str  # shared by gradients that are equal up to a positive factor
    gradient_G: Tensor  # under its own weights; in a softmax less the part that changes nothing


def fingerprint(candidate: Candidate, output: str, weights_VM: Tensor | None = None) -> Fingerprint:
    """The gradient by the raw output on a fixed grid of targets and outputs, and what follows from it.

    Classification: y in {0, 1}, p = sigmoid of 32 numbers in [-9, 9], gradient (dl/dp - c) p (1 - p). Under a softmax c is
    dl/dp at y = 0 and p near 1/2, since a constant added to dl/dp is no gradient there; else 0. Regression: y and p among
    eight numbers each in [-2, 2], gradient dl/dp.

    "not finite": under the first weights a derivative exceeds float32. "dead": below 1e-6 everywhere, under all the weights.
    "wrong sign": under the first weights it is, on average, no greater where y = 0 than where y = 1; in regression, its
    average product with p - y is not positive.

    Args:
        candidate: what is judged.
        output: "softmax", "sigmoid" or "identity".
        weights_VM: in the program's order, the first being those that count; null for the candidate's own, or ones. Keys
            are of the first weights: they say nothing of runs in which weights are trained.
    """
    require_choice("output", output, OUTPUTS)
    if weights_VM is not None and candidate.program is not None:
        weights_VM = weights_VM[:, [place - 1 for place in candidate.program.canonical_order[1:]]]
    return _judged(_slopes(candidate.canonical, output, weights_VM).unsqueeze(0), output)[0]


def _grid(output: str) -> tuple[Tensor, Tensor]:
    """Targets and outputs (G,), the same for ever: keys on disk depend on it."""
    if output == "identity":
        # Different spacings: no output equals a target, where losses of p - y have their kink.
        y, p = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64), torch.linspace(-1.9, 2.1, 8, dtype=torch.float64)
    else:
        y = torch.tensor([0.0, 1.0], dtype=torch.float64)
        p = torch.sigmoid(torch.linspace(-9.0, 9.0, 32, dtype=torch.float64))
    y, p = torch.meshgrid(y, p, indexing="ij")
    return y.flatten(), p.flatten()


_GRIDS = {output: _grid(output) for output in OUTPUTS}


def _slopes(canonical: Candidate, output: str, weights_VM: Tensor | None) -> Tensor:
    """dl/dp on the grid, (V, G); ``weights_VM`` in canonical order, null for the candidate's own."""
    if canonical.program is None:
        return _slope_of_polynomial(canonical, output).unsqueeze(0)
    if weights_VM is None and canonical.weights:
        weights_VM = torch.tensor([canonical.weights], dtype=torch.float64)
    function = compiled.compile_gradient(canonical.program, weights_VM is not None)
    num_vectors = 1 if weights_VM is None else len(weights_VM)
    y_VG, p_VG = (values.expand(num_vectors, -1) for values in _GRIDS[output])
    if function is None:
        return torch.zeros_like(p_VG)
    return function(y_VG, p_VG, p_VG if weights_VM is None else weights_VM.T.unsqueeze(-1))


def _slope_of_polynomial(candidate: Candidate, output: str) -> Tensor:
    y, p = _GRIDS[output]
    with torch.enable_grad():
        p = p.clone().requires_grad_()
        # As a function of a raw output that is the output itself, an entrywise loss is one of p.
        terms = candidate.loss("identity").terms(p.unsqueeze(-1), y.unsqueeze(-1))
        return torch.autograd.grad(terms.sum(), p)[0]


@functools.lru_cache(maxsize=1024)
def _vectors(num_weights: int) -> Tensor:
    """All ones, and two vectors of N(1, 1/4): (3, M)."""
    drawn = random.normal(random.key(0, "screening"), (2, num_weights)).double()
    return torch.cat([torch.ones(1, num_weights, dtype=torch.float64), 1 + 0.5 * drawn])


def _weight_vectors(canonical: Candidate) -> Tensor:
    """Vectors (3, M) in canonical order, the first the candidate's own."""
    assert canonical.program is not None
    vectors = _vectors(canonical.program.num_weights)
    if not canonical.weights:
        return vectors
    return torch.cat([torch.tensor([canonical.weights], dtype=torch.float64), vectors[1:]])


def _judged(slopes_PVG: Tensor, output: str) -> list[Fingerprint]:
    """Fingerprints of P candidates at once."""
    y_G, p_G = _GRIDS[output]
    gradient_PVG, finite_P = slopes_PVG, (slopes_PVG[:, 0].abs() <= torch.finfo(torch.float32).max).all(-1)
    if output != "identity":
        middle = len(p_G) // 4 - 1
        centre = slopes_PVG[..., middle : middle + 1] if output == "softmax" else 0.0
        gradient_PVG = (slopes_PVG - centre) * p_G * (1 - p_G)
    dead_P = (gradient_PVG.abs() <= _ZERO).all(-1).all(-1)
    gradient_PG = gradient_PVG[:, 0]
    scale_P = gradient_PG.abs().amax(-1)
    towards_G = p_G - y_G if output == "identity" else 1 - 2 * y_G
    right_P = (gradient_PG * towards_G).mean(-1) > 1e-9 * scale_P
    shapes = (gradient_PG / scale_P.unsqueeze(-1) / _UNIT).nan_to_num(0.0).round().int().numpy()
    sizes = (scale_P.log() / _UNIT).round().tolist()
    found = []
    for row, (finite, dead, right) in enumerate(zip(finite_P.tolist(), dead_P.tolist(), right_P.tolist(), strict=True)):
        verdict = "not finite" if not finite else "dead" if dead else None if right else "wrong sign"
        shape = hashlib.sha256(shapes[row].tobytes()).hexdigest()[:16]
        found.append(Fingerprint(verdict, f"{shape} {sizes[row]:.0f}", shape, gradient_PG[row]))
    return found


def same_gradient(candidates: Sequence[Candidate], output: str, tolerance: float = 0.01) -> list[int]:
    """For each candidate the place of the first one whose gradient is the same under the weights that both now have.

    After local search this says whose fitness may be used again. Gradients are the same where they differ by at most
    ``tolerance`` times the earlier one's largest entry, anywhere on the grid. Every place that is named names itself, so
    that nothing is the same as another by way of a third.

    Args:
        candidates: with their weights after local search; those whose fitness is known first.
        output: "softmax", "sigmoid" or "identity".
        tolerance: >= 0.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", section 3.3 (after
    Li et al. 2022, "AutoLoss-Zero"). Differs from the paper: it compares gradient norms on 100 predictions that were
    optimised for it, to two decimals, so that direction does not count and scale does.
    """
    require_range("tolerance", tolerance, 0.0)
    if not candidates:
        return []
    slopes_PVG = torch.stack([_slopes(candidate.canonical, output, None) for candidate in candidates])
    gradients_PG = torch.stack([found.gradient_G for found in _judged(slopes_PVG, output)])
    within_P, first = tolerance * gradients_PG.abs().amax(-1), list[int]()
    is_first_P = torch.zeros(len(candidates), dtype=torch.bool)
    for place, gradient_G in enumerate(gradients_PG):
        near_P = is_first_P[:place] & ((gradients_PG[:place] - gradient_G).abs().amax(-1) <= within_P[:place])
        is_first_P[place] = not near_P.any()
        first.append(place if is_first_P[place] else int(near_P.int().argmax()))
    return first


# -- screening -----------------------------------------------------------------------------------------------------------


class Screened(NamedTuple):
    """What screening says of each candidate."""

    verdicts: list[str | None]  # "dead", "not finite", "wrong sign", or None for what should be trained
    names: list[str]  # of canonical candidates: its own, or that of the first one found equal to it
    known: dict[str, str]  # name by key, of what was known before and of those of this batch that should be trained


class Screening:
    """Judgement of losses before training, in milliseconds a candidate.

    Args:
        wrong_sign: "reject" gives losses that drive outputs away from their targets the verdict "wrong sign"; "final" does
            so only where weights are not trained any more, since training may flip a sign; "keep" never.
        up_to_scale: whether losses are duplicates that differ by a positive factor, which is a learning rate. Where weights
            are trained, factors are too, and it is not used.
        rejection_steps: of the rejection protocol, at least 0; 0 rejects nothing.
        rejection_examples: training examples of the rejection protocol, at least 1.
        rejection_lr: learning rate of the rejection protocol, >= 0.

    Raises:
        ValueError: for values out of range.

    Source: Raymond et al. 2023, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", section 3.3. Differs
    from the paper: proofs and gradients on a grid come first, and duplicates are found by derivatives, not by text.
    """

    def __init__(
        self,
        wrong_sign: str = "reject",
        up_to_scale: bool = False,
        rejection_steps: int = 100,
        rejection_examples: int = 100,
        rejection_lr: float = 0.01,
    ):
        require_choice("wrong_sign", wrong_sign, WRONG_SIGN)
        require_range("rejection_steps", rejection_steps, 0)
        require_range("rejection_examples", rejection_examples, 1)
        self.wrong_sign, self.up_to_scale = wrong_sign, up_to_scale
        self.rejection_steps, self.rejection_examples = rejection_steps, rejection_examples
        self.rejection_rule = Adam(rejection_lr)

    def screen(
        self, candidates: Sequence[Candidate], output: str, weighted: bool, known: Mapping[str, str] | None = None
    ) -> Screened:
        """Verdicts and duplicates.

        Where weights will be trained, two losses that are equal under weights of 1 need not be so later: ``(p - p) y`` is
        dead at first and alive after. Duplicates are then those with equal derivatives in the weights, weights that start
        alike included, and dead is what is dead under weights of 1 and two random vectors.

        Args:
            candidates: losses with or without weights of their own.
            output: "softmax", "sigmoid" or "identity".
            weighted: whether the weights will be trained.
            known: name by key, of candidates met before, as returned; left as it is. It must not mix names of runs that
                differ in anything else than the candidate.
        """
        known = dict(known or {})
        verdicts: list[str | None] = [None] * len(candidates)
        names = [candidate.canonical.name for candidate in candidates]
        proofs = [prove(candidate, output, weighted) for candidate in candidates]
        prints = self._fingerprints(candidates, output, weighted, proofs)
        for place, proof in enumerate(proofs):
            found = prints.get(place)
            verdicts[place] = "dead" if found is None else self._verdict(found, weighted)
            if found is None or verdicts[place]:
                continue
            keys = [proof.key]
            if not weighted:
                keys.append(_digest(output, found.shape if self.up_to_scale else found.key))
            names[place] = next((known[key] for key in keys if key in known), names[place])
            for key in keys:
                known.setdefault(key, names[place])
        return Screened(verdicts, names, known)

    def _verdict(self, found: Fingerprint, weighted: bool) -> str | None:
        tolerated = self.wrong_sign == "keep" or (self.wrong_sign == "final" and weighted)
        return None if found.verdict == "wrong sign" and tolerated else found.verdict

    def _fingerprints(
        self, candidates: Sequence[Candidate], output: str, weighted: bool, proofs: Sequence[Proof]
    ) -> dict[int, Fingerprint]:
        """By place, of those that are not proven dead."""
        places = [place for place, proof in enumerate(proofs) if not proof.dead]
        slopes = []
        for place in places:
            canonical = candidates[place].canonical
            vectors = _weight_vectors(canonical) if weighted and canonical.program else None
            slopes.append(_slopes(canonical, output, vectors).expand(3 if weighted else 1, -1))
        return dict(zip(places, _judged(torch.stack(slopes), output), strict=True)) if slopes else {}

    def rejected(self, task: LossTask, gradients: CandidateGradients, key: Tensor) -> list[bool]:
        """Whether each loss fails to improve predictions that are optimised under it directly, all candidates at once.

        The predictions of a new model on the first training examples take ``rejection_steps`` of Adam. A candidate is
        rejected unless their error has fallen, or is 0, and all of them are finite.

        Args:
            task: an open task.
            gradients: of the candidates.
            key: of the model's initial parameters.
        """
        inputs, targets = (leaf[: self.rejection_examples] for leaf in task.examples("train", key.device))
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):  # errors are compared to the last bit
            first_NK = task.predict(task.start({}, *task.initial(key)), inputs)
            target_NK = task.target_matrix(targets)
            params = {"prediction": first_NK.expand(gradients.count, *first_NK.shape).clone()}
            state = self.rejection_rule.init({}, params)
            for _ in range(self.rejection_steps):
                grads = {"prediction": gradients.gradient(params["prediction"], target_NK)}
                params, state = self.rejection_rule.update({}, grads, state, params)
            error_P = task.error(params["prediction"], targets)
            improved_P = (error_P < task.error(first_NK, targets)) | (error_P == 0)
            finite_P = params["prediction"].isfinite().flatten(1).all(-1)
        return [] if not gradients.count else (~(improved_P & finite_P) & (self.rejection_steps > 0)).tolist()
