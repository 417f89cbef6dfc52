import pytest
import torch

from metalearn.estimators.hessian import conjugate_gradient, scaled_start
from metalearn.random import key, normal

SADDLE = (-2.0, -0.5, 0.1, 1.0, 3.0)


def symmetric(*eigenvalues):
    q, _ = torch.linalg.qr(normal(key(3), (len(eigenvalues), len(eigenvalues))).double())
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def vectors(rows, size=5):
    return normal(key(4), (rows, size)).double()


def solve(matrix, v_RP, iterations=5, start_RP=None):
    def product(x_RP):
        return x_RP @ matrix

    first = scaled_start(product, v_RP, start_RP) if start_RP is not None else (torch.zeros_like(v_RP), v_RP)
    return conjugate_gradient(product, v_RP, *first, iterations, tolerance=0.0)


def cosines(left_RP, right_RP):
    return torch.cosine_similarity(left_RP, right_RP)


def test_matches_a_direct_solve_of_every_row():
    matrix, v_RP = symmetric(0.5, 1.0, 2.0, 3.0, 7.0), vectors(4)
    v_RP[2] = 0
    x_RP, report = solve(matrix, v_RP)
    torch.testing.assert_close(x_RP, torch.linalg.solve(matrix, v_RP.T).T)
    assert report["residual"] <= 1e-12 and report["negative_curvature"] == 0
    assert 0.5 <= report["smallest_curvature"] <= 7


@pytest.mark.parametrize("started", [False, True])
def test_never_points_away_on_a_saddle(started):
    matrix, v_RP = symmetric(*SADDLE), vectors(40)
    x_RP, report = solve(matrix, v_RP, start_RP=vectors(41)[1:] if started else None)
    assert (cosines(x_RP, v_RP) > 0).all()
    assert report["negative_curvature"] == 1 and report["smallest_curvature"] < 0
    residuals_R = (v_RP - x_RP @ matrix).norm(dim=1) / v_RP.norm(dim=1)
    torch.testing.assert_close(report["residual"], residuals_R.max())


def test_a_row_on_a_saddle_leaves_the_others_alone():
    matrix = torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    v_RP = vectors(3)
    v_RP[[0, 2], 0] = 0  # those two never see the negative direction
    x_RP, _ = solve(matrix, v_RP)
    torch.testing.assert_close(x_RP[[0, 2]], torch.linalg.solve(matrix, v_RP[[0, 2]].T).T)


def test_falls_back_on_the_steepest_direction():
    matrix = symmetric(-2.0, -1.0, 0.5)
    v_RP = torch.linalg.eigh(matrix).eigenvectors[:, :2].sum(-1)[None]
    x_RP, report = solve(matrix, v_RP)
    torch.testing.assert_close(x_RP, v_RP * v_RP.norm() / (v_RP @ matrix).norm())
    assert report["negative_curvature"] == 1 and report["iterations"] == 0 and report["residual"] > 1
    x_RP, report = solve(0 * matrix, v_RP)
    assert x_RP.eq(0).all() and report["negative_curvature"] == 1 and report["residual"] == 1


def test_the_start_is_scaled_to_the_least_residual_along_it():
    matrix, v_RP = symmetric(0.5, 1.0, 2.0, 3.0, 7.0), vectors(1)
    exact = torch.linalg.solve(matrix, v_RP.T).T
    for start_RP in (3 * exact, -exact):
        x_RP, _ = solve(matrix, v_RP, iterations=1, start_RP=start_RP)
        torch.testing.assert_close(x_RP, exact)
    for useless_RP in (torch.zeros_like(v_RP), 1e-3 * vectors(2)[1:]):
        x_RP, _ = solve(matrix, v_RP, start_RP=useless_RP)
        torch.testing.assert_close(x_RP, exact)
