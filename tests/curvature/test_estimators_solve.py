# SPDX-License-Identifier: Apache-2.0
"""Linear systems: definite, indefinite, singular, per row."""

import pytest
import torch

from fastflat import curvature

from .estimators_fakes import Dense, generator, symmetric, with_spectrum


def right_hand_sides(K, n, dtype=torch.float64):
    return torch.randn(K, n, dtype=torch.float64, generator=generator(9)).to(dtype)


@pytest.mark.parametrize("method", ["minres", "cg"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_definite(method, dtype, tol):
    matrix = with_spectrum(torch.linspace(0.1, 3, 100), dtype=dtype)
    op, B = Dense(matrix), right_hand_sides(4, 100, dtype)
    found = curvature.solve(op, B, 0.2, tol, method=method)
    exact = torch.linalg.solve(matrix.double() + 0.2 * torch.eye(100).double(), B.double().T).T
    assert found.converged
    assert found.value.dtype == dtype
    assert found.products == op.products
    true = (B.double() - found.value.double() @ (matrix.double() + 0.2 * torch.eye(100).double())).norm(dim=1)
    assert (true <= 1.05 * tol * B.norm(dim=1)).all()
    assert torch.allclose(found.stderr, true, rtol=1e-2, atol=1e-12)
    assert ((found.value - exact).norm(dim=1) <= 20 * tol * exact.norm(dim=1)).all()


def test_indefinite():
    matrix = with_spectrum(torch.cat([torch.linspace(-3, -0.5, 50), torch.linspace(0.5, 2, 50)]))
    B = right_hand_sides(3, 100)
    found = curvature.solve(Dense(matrix), B, tol=1e-9)
    assert found.converged
    assert (found.value - torch.linalg.solve(matrix, B.T).T).norm() < 1e-7


def test_cg_stops_at_negative_curvature():
    matrix = with_spectrum(torch.cat([torch.full((20,), -1.0), torch.linspace(0.5, 2, 80)]))
    found = curvature.solve(Dense(matrix), right_hand_sides(3, 100), method="cg")
    assert not found.converged
    assert torch.isfinite(found.value).all()


def test_every_row_has_its_own_stop():
    matrix = with_spectrum(torch.linspace(0.1, 3, 100))
    _, U = torch.linalg.eigh(matrix)
    hard = right_hand_sides(1, 100)
    B = torch.cat([U[:, :1].T, torch.zeros(1, 100), hard])
    alone, together = Dense(matrix), Dense(matrix)
    curvature.solve(alone, hard, tol=1e-8)
    found = curvature.solve(together, B, tol=1e-8)
    assert found.converged
    assert together.products == alone.products + 2, "an eigenvector takes a step and a check, zero takes nothing"
    assert not found.value[1].any()


def test_singular_systems_end_at_least_squares():
    values = torch.cat([torch.zeros(60), torch.linspace(1, 2, 40)])
    matrix = with_spectrum(values)
    B = right_hand_sides(2, 100)
    found = curvature.solve(Dense(matrix), B, tol=1e-8)
    least = (B - B @ torch.linalg.pinv(matrix, rtol=1e-8) @ matrix).norm(dim=1)
    assert not found.converged
    assert torch.allclose(found.stderr, least, rtol=1e-4)
    assert found.products < 60
    consistent = curvature.solve(Dense(matrix), B @ matrix, tol=1e-8)
    assert consistent.converged


def test_each_step_minimises_the_residual_over_the_krylov_space():
    matrix, b = symmetric(50), right_hand_sides(1, 50)[0]
    krylov = [b]
    for m in range(1, 6):
        found = curvature.solve(Dense(matrix), b, tol=1e-12, max_products=m + 1)
        space = torch.stack([matrix @ v for v in krylov], 1)
        best = torch.linalg.lstsq(space, b[:, None]).solution
        assert found.stderr.item() == pytest.approx((b - (space @ best)[:, 0]).norm().item(), rel=1e-8)
        assert found.products == m + 1
        krylov.append(matrix @ krylov[-1])


class PerRow(Dense):
    rowwise = True

    def __init__(self, matrices):
        super().__init__(matrices[0])
        self.matrices = matrices

    def matmat(self, V):
        assert len(V) == len(self.matrices)
        return torch.einsum("kij,kj->ki", self.matrices, V)


@pytest.mark.parametrize("method", ["minres", "cg"])
def test_a_matrix_for_each_row(method):
    matrices = torch.stack([with_spectrum(torch.linspace(0.5, 1 + 3 * k, 30), k) for k in range(4)])
    B = right_hand_sides(4, 30)
    found = curvature.solve(PerRow(matrices), B, tol=1e-10, method=method)
    assert found.converged
    assert (found.value - torch.linalg.solve(matrices, B)).abs().max() < 1e-8


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["minres", "cg"])
def test_small_systems(n, method):
    matrix = with_spectrum(torch.linspace(1, 2, n)) if n else torch.zeros(0, 0, dtype=torch.float64)
    for shape in ((n,), (0, n), (1, n), (7, n)):
        B = torch.randn(shape, dtype=torch.float64, generator=generator())
        found = curvature.solve(Dense(matrix), B, tol=1e-10, method=method)
        assert found.value.shape == B.shape
        assert found.stderr.shape == shape[:-1]
        assert found.converged
        assert torch.allclose(found.value @ matrix, B, atol=1e-9)


def test_a_zero_operator_and_the_limit():
    zero = curvature.solve(Dense(torch.zeros(20, 20)), torch.ones(2, 20))
    assert not zero.converged
    assert not zero.value.any()
    limited = curvature.solve(Dense(symmetric(100)), right_hand_sides(2, 100), tol=1e-10, max_products=11)
    assert not limited.converged
    assert limited.products <= 11
    assert (limited.stderr < right_hand_sides(2, 100).norm(dim=1)).all()
