"""Dynamic modes against runs whose modes are known, and against a decomposition by singular values in numpy."""

import numpy as np
import pytest
import torch
from torch.func import jvp, vmap

from metalearn import tree
from metalearn.estimators.unrolled import Unrolled
from metalearn.optim.dynamic_mode import DynamicModeLSTM, dynamic_modes
from metalearn.optim.layout import Layout
from metalearn.problems.quadratics import Quadratics
from metalearn.random import key


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def descent(curvatures, lr, steps, momentum=0.0):
    """Gradient descent on (x - c)^T H (x - c) / 2 in 12 dimensions, H with these eigenvalues, each of them repeated."""
    turn = torch.linalg.qr(drawn(12, 12))[0]
    hessian = turn @ torch.diag(torch.tensor(curvatures, dtype=torch.float64).repeat(12 // len(curvatures))) @ turn.T
    centre, x, buffer = drawn(12, seed=1), drawn(12, seed=2), torch.zeros(12, dtype=torch.float64)
    snapshots = [x]
    for _ in range(steps):
        buffer = momentum * buffer + hessian @ (x - centre)
        x = x - lr * buffer
        snapshots.append(x)
    return torch.stack(snapshots)


def forecast(snapshots_SP, modes, steps):
    return modes.ahead(steps).real.sum(-1) @ snapshots_SP[..., 1:, :]


def ordered(values):
    return np.sort_complex(np.asarray(values))


@pytest.mark.parametrize("window", [4, 8])  # as many as there are modes, that of the optimum among them, and more
def test_matches_the_modes_of_gradient_descent_on_a_quadratic(window):
    curvatures, lr = [0.4, 1.8, 3.4], 0.5
    run = descent(curvatures, lr, window + 25)
    modes = dynamic_modes(run[: window + 1], 4)
    wanted = ordered([1.0] + [1 - lr * curvature for curvature in curvatures])
    np.testing.assert_allclose(ordered(modes.eigenvalue_R), wanted, rtol=0, atol=1e-8)
    for steps in (0, 1, 25):
        found = forecast(run[: window + 1], modes, steps)
        torch.testing.assert_close(found, run[window + steps], rtol=0, atol=1e-8)


def test_matches_the_complex_modes_of_momentum():
    """Successive parameters one above the other: theta alone obeys no linear map, (theta_t, theta_{t-1}) does."""
    curvatures, lr, momentum = [0.5, 3.0], 0.4, 0.6
    run = descent(curvatures, lr, 30, momentum)
    delayed = torch.cat([run[1:], run[:-1]], 1)
    blocks = [np.array([[1 + momentum - lr * c, -momentum], [1.0, 0.0]]) for c in curvatures]
    wanted = ordered([1.0, *np.concatenate([np.linalg.eigvals(block) for block in blocks])])
    assert abs(wanted.imag).max() > 0.1
    modes = dynamic_modes(delayed[:9], 5)
    np.testing.assert_allclose(ordered(modes.eigenvalue_R), wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(forecast(delayed[:9], modes, 10), delayed[18], rtol=0, atol=1e-8)


def test_matches_a_decomposition_by_singular_values():
    snapshots = (drawn(6, 3) @ drawn(3, 20, seed=1) + 0.1 * drawn(6, 20, seed=2)).cumsum(0)
    before, after = snapshots[:-1].T.numpy(), snapshots[1:].T.numpy()
    u, s, vh = np.linalg.svd(before, full_matrices=False)
    u, s, v = u[:, :3], s[:3], vh[:3].T
    factors, w = np.linalg.eig(u.T @ after @ v / s)
    shapes = after @ v / s @ w
    shares_PR = shapes * (np.linalg.pinv(shapes) @ after[:, -1])
    order = np.argsort(-np.linalg.norm(shares_PR, axis=0), kind="stable")
    modes = dynamic_modes(snapshots, 3)
    np.testing.assert_allclose(modes.eigenvalue_R.abs(), np.abs(factors[order]), rtol=1e-9)
    found_PR = after @ modes.mix_KR.numpy()
    np.testing.assert_allclose(np.abs(found_PR), np.abs(shares_PR[:, order]), rtol=1e-8, atol=1e-10)
    rule = DynamicModeLSTM(window=5, rank=3, ahead=4)
    x = rule.features(snapshots)[:, 3:11].numpy()
    soon, later = (shares_PR * (factors - 1))[:, order].real, (shares_PR * factors**4).sum(1).real
    signed = np.concatenate([soon, (later - after[:, -1])[:, None]], 1)
    np.testing.assert_allclose(x[:, ::2], np.log(np.abs(signed)) / 10, rtol=0, atol=1e-8)
    np.testing.assert_allclose(x[:, 1::2], np.sign(signed))


def test_runs_side_by_side_are_runs_by_themselves_and_a_lost_one_harms_no_other():
    rule, layout = DynamicModeLSTM((4,), window=3, rank=2), Layout.of({"w": torch.zeros(5)})
    meta = {name: value.double() for name, value in rule.init_meta(key(0)).items()}

    def run(x_P):
        state = rule.start(meta, layout, x_P)
        for _ in range(6):
            direction_P, state = rule.direction(meta, layout, 2 * x_P, state, x_P, None)
            x_P = x_P - 0.1 * x_P - direction_P
        return x_P, state

    starts_4P = drawn(4, 5)
    own = tree.stack([run(x_P) for x_P in starts_4P])
    torch.testing.assert_close(vmap(run)(starts_4P), own, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(run(starts_4P), own, rtol=1e-6, atol=1e-8)
    lost_4P = starts_4P.clone()
    lost_4P[2, 0] = torch.nan
    kept = [0, 1, 3]
    torch.testing.assert_close(run(lost_4P)[0][kept], own[0][kept], rtol=1e-6, atol=1e-8)
    assert run(lost_4P)[0][2, 1:].isfinite().all()


def test_modes_are_read_when_the_window_is_full_and_never_differentiated():
    rule, run = DynamicModeLSTM(window=4, rank=2), descent([0.4, 1.8], 0.5, 8)
    state, shown = rule.start(rule.weights, Layout.of({"w": run[0]}), run[0]), []
    for x_P in run:
        before = state
        x_PF, state = rule.read(torch.zeros_like(x_P), state, x_P)
        shown.append(bool((x_PF[:, 2:] != 0).any()))
    assert shown == [False] * 4 + [True] * 5
    assert x_PF.shape[1] == rule.num_inputs == 14

    def newest(x_P):
        return rule.read(torch.zeros_like(x_P), before, x_P)[0]

    assert not newest(run[-1].clone().requires_grad_()).requires_grad
    assert not jvp(newest, (run[-1],), (torch.ones_like(run[-1]),))[1].any()


def test_meta_gradients_by_graph_and_by_stored_states_agree():
    class Double(Quadratics):
        def init(self, meta, key):
            state = super().init(meta, key)
            return tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, state)

    problem = Double(DynamicModeLSTM((4,), window=3, rank=2), horizon=8, num_dims=4)
    meta = {name: value.double() for name, value in problem.init_meta(key(0)).items()}
    found = [
        Unrolled(mode).estimate(problem, meta, {}, problem.batches(key(0), 8), key(1)).grad
        for mode in ("graph", "store")
    ]
    assert found[0]["0/weight"][2:14].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"window is 1; accepted: 2 <= window"):
        DynamicModeLSTM(window=1)
    with pytest.raises(ValueError, match=r"rank is 9; accepted: 1 <= rank <= 8"):
        DynamicModeLSTM(rank=9)
    with pytest.raises(ValueError, match=r"ahead is 0; accepted: 1 <= ahead"):
        DynamicModeLSTM(ahead=0)
