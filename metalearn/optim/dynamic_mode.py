"""What the last parameters of a run say about the next: dynamic modes, and an LSTM optimizer that reads them.

Letters: P parameters of all tensors together; K pairs of successive snapshots; S = K + 1 snapshots; R modes; F inputs of a
coordinate; ``…`` leading axes, of tasks and of particles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.base import Params, Tree, require_whole
from metalearn.optim.layout import Layout
from metalearn.optim.learned import count
from metalearn.optim.lstm import CoordinateLSTM, log_and_sign

SMALLEST = 1e-13  # a squared singular value beside the greatest, below which rounding has made it
LARGEST_FACTOR = 2.0  # at which the size of an eigenvalue is cut off, as an input


class Modes(NamedTuple):
    """The linear dynamics theta_{t+1} = A theta_t that K pairs of snapshots obey, by its R strongest modes.

    Mode j's share of theta_t is sum_k theta_{t-K+k} mix_kj, k = 1 … K, and its share of theta_{t+h} that times
    eigenvalue_j^h.
    """

    eigenvalue_R: Tensor  # complex128; 0 where there are fewer than R modes
    mix_KR: Tensor  # complex128

    def ahead(self, steps: int) -> Tensor:
        """Mix, by modes, of the last K snapshots that is their part of theta_{t + steps}: complex128 (…, K, R)."""
        return self.mix_KR * (self.eigenvalue_R**steps).unsqueeze(-2)


def dynamic_modes(snapshots_SP: Tensor, rank: int) -> Modes:
    """Exact dynamic mode decomposition of the snapshots theta_{t-K} … theta_t, by strength of their part in theta_t.

    With X_1 the first K snapshots, X_2 the last K and X_1 = U Σ V^T of rank R: (λ, w) are the eigenpairs of
    ``U^T X_2 V Σ^-1``, modes are ``X_2 V Σ^-1 w``, amplitudes their least-squares fit to theta_t. All of it is done on the
    S x S products of snapshots, in float64, so that it takes time O(P S^2) and no matrix of parameters. Of conjugate
    pairs, which are of one strength, either may come first. Snapshots that are not finite have no modes.

    Args:
        snapshots_SP: successive parameters of one run, the oldest first, (…, S, P).
        rank: R, 1 … K. Singular values below 3e-7 of the greatest count as none.

    Source: Tu et al. 2014, "On Dynamic Mode Decomposition: Theory and Applications", algorithm 2; by products of
    snapshots as in Sirovich 1987. Squared singular values halve the digits: eigenvalues of modes that are much weaker than
    the first, or hardly differ, are no more exact than that.
    """
    own = snapshots_SP.double()
    gram = own @ own.mT
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    gram = torch.where(finite, gram, 0)
    square, v = torch.linalg.eigh(gram[..., :-1, :-1])
    square_R, v_KR = square[..., -rank:], v[..., -rank:]
    kept_R = square_R > SMALLEST * square[..., -1:]
    basis_KR = v_KR * torch.where(kept_R, square_R, 1).rsqrt().mul(kept_R).unsqueeze(-2)  # V / Σ
    eigenvalue_R, w = torch.linalg.eig(basis_KR.mT @ gram[..., :-1, 1:] @ basis_KR)
    mode_KR = basis_KR.to(w.dtype) @ w
    newer = gram[..., 1:, 1:].to(w.dtype)
    mix_KR = mode_KR * _least_squares(mode_KR, newer).unsqueeze(-2)
    strength_R = (mix_KR.conj() * (newer @ mix_KR)).sum(-2).real
    order_R = strength_R.argsort(-1, descending=True)
    return Modes(eigenvalue_R.take_along_dim(order_R, -1), mix_KR.take_along_dim(order_R.unsqueeze(-2), -1))


def _least_squares(mode_KR: Tensor, newer: Tensor) -> Tensor:
    """Amplitudes (…, R) that fit the newest snapshot, of modes given as mixes of snapshots with these products."""
    towards = mode_KR.mH @ newer
    product = towards @ mode_KR
    size_R = product.diagonal(dim1=-2, dim2=-1).real
    scale_R = torch.where(size_R > 0, size_R, 1).rsqrt()
    scaled = product * scale_R.unsqueeze(-1) * scale_R.unsqueeze(-2)
    inverse = torch.linalg.pinv(scaled, rtol=SMALLEST, hermitian=True)
    return (inverse @ (towards[..., -1] * scale_R).unsqueeze(-1)).squeeze(-1) * scale_R


class DynamicModeLSTM(CoordinateLSTM):
    """A ``CoordinateLSTM`` that is also given the dynamic modes of its own run, those of all parameters together.

    The last ``window`` parameters are kept in the state and, with the present ones, decomposed before each update. With
    s_j a coordinate's share in mode j (complex) and λ_j its eigenvalue, a coordinate has 5 rank + 2 inputs more: the size
    |s_j| by its logarithm; the change to come, Re s_j (λ_j - 1), and that of all modes over ``ahead`` steps,
    Re sum_j s_j λ_j^ahead - p, by ``log_and_sign``, all with p = 10; and, the same for all coordinates, |λ_j|, at most 2,
    and |arg λ_j|. They are 0 until the window has been filled by updates, and in a run that has left the finite numbers. No
    gradient, and no tangent, goes through them: estimators differentiate as if they were given.

    Args:
        layers: as in ``CoordinateLSTM``.
        preprocessing: as in ``CoordinateLSTM``.
        scale: as in ``CoordinateLSTM``.
        window: K, past parameters that are kept, at least 2.
        rank: R, modes, 1 … window.
        ahead: steps of the further forecast, at least 1.

    Raises:
        ValueError: for values out of range.

    Source: Šimánek, Vašata and Kordík 2022, "Learning to Optimize with Dynamic Mode Decomposition", for the idea.
    Differs from the paper: we know its abstract only; window, rank, features and their scale are our own.
    """

    def __init__(
        self,
        layers: Sequence[int] = (20, 20),
        preprocessing: str = "released",
        scale: float = 0.01,
        window: int = 8,
        rank: int = 3,
        ahead: int = 10,
    ) -> None:
        super().__init__(layers, preprocessing, scale)
        require_whole("window", window, 2)
        require_whole("rank", rank, 1, window)
        require_whole("ahead", ahead, 1)
        self.window, self.rank, self.ahead = window, rank, ahead

    @property
    def num_inputs(self) -> int:
        return super().num_inputs + 5 * self.rank + 2

    def start(self, meta: Params, layout: Layout, params_P: Tensor) -> Tree:
        past = params_P.detach().unsqueeze(-2)
        past_KP = past.expand(*past.shape[:-2], self.window, past.shape[-1]).clone()
        return {**super().start(meta, layout, params_P), "past": past_KP, "taken": count(params_P)}

    def read(self, grads_P: Tensor, state: Tree, params_P: Tensor) -> tuple[Tensor, Tree]:
        x_PF, state = super().read(grads_P, state, params_P)
        snapshots_SP = torch.cat([state["past"], params_P.unsqueeze(-2)], -2).detach()
        features_PF = self.features(snapshots_SP)
        usable = (state["taken"] >= self.window) & features_PF.isfinite().flatten(-2).all(-1)
        features_PF = torch.where(usable[..., None, None], features_PF, 0)
        state = {**state, "past": snapshots_SP[..., 1:, :], "taken": state["taken"] + 1}
        return torch.cat([x_PF, features_PF], -1), state

    def features(self, snapshots_SP: Tensor) -> Tensor:
        """The inputs (…, P, 5 R + 2) that a full window gives."""
        modes, newer_PK = dynamic_modes(snapshots_SP, self.rank), snapshots_SP[..., 1:, :].mT
        soon_KR = (modes.ahead(1) - modes.mix_KR).real
        later_K1 = modes.ahead(self.ahead).real.sum(-1, keepdim=True)
        mixes = torch.cat([modes.mix_KR.real, modes.mix_KR.imag, soon_KR, later_K1], -1)
        sizes = [self.rank, self.rank, self.rank, 1]
        real_PR, imaginary_PR, soon_PR, later_P1 = (newer_PK @ mixes.to(newer_PK.dtype)).split(sizes, -1)
        signed = torch.cat([soon_PR, later_P1 - newer_PK[..., -1:]], -1)
        factors = torch.cat([modes.eigenvalue_R.abs().clamp(max=LARGEST_FACTOR), modes.eigenvalue_R.angle().abs()], -1)
        parts = [
            log_and_sign(torch.hypot(real_PR, imaginary_PR), 10.0)[..., 0],
            log_and_sign(signed, 10.0).flatten(-2),
            factors.to(newer_PK.dtype).unsqueeze(-2).expand(*real_PR.shape[:-1], 2 * self.rank),
        ]
        return torch.cat(parts, -1)
