# SPDX-License-Identifier: Apache-2.0
"""Eigenvalues against eigh, on the spectra that break Lanczos without care."""

import pytest
import torch

from fastflat import curvature
from fastflat.curvature._basis import Basis

from .estimators_fakes import Dense, generator, low_rank, outliers, symmetric, with_spectrum

HARD = {"outliers": outliers, "low_rank": low_rank}


def ranked(matrix, which):
    values = torch.linalg.eigvalsh(matrix.double())
    key = {"largest": -values, "smallest": values, "largest_magnitude": -values.abs()}[which]
    return values[key.argsort()]


@pytest.mark.parametrize("block", [1, 3, 4, 7])
@pytest.mark.parametrize("which", ["largest", "smallest", "largest_magnitude"])
def test_the_whole_spectrum(which, block):
    matrix = symmetric(60)
    found, X = curvature.eigenvalues(
        Dense(matrix), 60, which, 1e-13, block=block, vectors=True, generator=generator(block)
    )
    assert (found.value - ranked(matrix, which)).abs().max() < 1e-10
    assert found.converged
    assert found.products == 60
    assert (X @ X.T - torch.eye(60)).abs().max() < 1e-12
    assert (X @ matrix - found.value[:, None] * X).norm(dim=1).max() < 1e-12


@pytest.mark.parametrize("which", ["largest", "smallest", "largest_magnitude"])
@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize("basis", [24, 300])
def test_residuals_are_the_true_ones_with_and_without_restarts(which, block, basis):
    matrix = symmetric(300)
    found, X = curvature.eigenvalues(
        Dense(matrix), 5, which, 1e-4, block=block, basis=basis, vectors=True, generator=generator()
    )
    assert found.converged
    true = (X @ matrix - found.value[:, None] * X).norm(dim=1)
    assert torch.allclose(true, found.stderr, rtol=1e-4, atol=1e-10)
    assert (true <= 1e-4 * found.value.abs()).all()
    assert (found.value - ranked(matrix, which)[:5]).abs().max() < 1e-5


def test_restarts_bound_the_memory(monkeypatch):
    rows = []
    made = Basis.__init__

    def watch(self, function, capacity, *rest):
        rows.append(capacity)
        made(self, function, capacity, *rest)

    monkeypatch.setattr(Basis, "__init__", watch)
    op = Dense(symmetric(300))
    found = curvature.eigenvalues(op, 3, tol=1e-6, block=2, basis=12, max_products=3000, generator=generator())
    assert found.converged
    assert found.products > 60
    assert rows == [14]


@pytest.mark.parametrize("spectrum", HARD)
@pytest.mark.parametrize("block", [1, 4])
def test_hard_spectra_in_float32(spectrum, block):
    values = HARD[spectrum]()
    matrix = with_spectrum(values, dtype=torch.float32)
    found, X = curvature.eigenvalues(Dense(matrix), 10, tol=1e-4, block=block, vectors=True, generator=generator())
    exact = ranked(matrix, "largest")[:10]
    assert found.converged
    assert ((found.value - exact) / exact).abs().max() < 1e-6
    assert (X @ X.T - torch.eye(10)).abs().max() < 1e-5


@pytest.mark.parametrize("spectrum", HARD)
@pytest.mark.parametrize("block", [1, 4, 8])
def test_the_basis_stays_orthonormal_in_float32(spectrum, block):
    matrix = with_spectrum(HARD[spectrum](), dtype=torch.float32)
    basis = Basis("test", 200 + block, 400, torch.float32, "cpu")
    basis.extend(torch.randn(block, 400, generator=generator()))
    window, done = 0, 0
    while basis.count <= 200:
        before = basis.count
        basis.extend(basis.rows[done:] @ matrix, window=window)
        window, done = done, before
    Q = basis.rows.double()
    gram = Q @ Q.T
    assert (gram.diagonal() - 1).abs().max() <= 3e-5
    assert (gram - torch.diag(gram.diagonal())).abs().max() <= 1e-5


def test_no_ghosts():
    values = outliers()
    found = curvature.eigenvalues(Dense(with_spectrum(values, dtype=torch.float32)), 12, tol=1e-4, basis=200)
    assert int((found.value > 0.05).sum()) == 10


DEGENERATE = {
    "six_equal": torch.cat([torch.full((6,), 2.0), torch.ones(100), torch.zeros(94)]),
    "identity": torch.ones(200),
    "zero": torch.zeros(200),
    "rank_two": torch.cat([torch.tensor([3.0, -1.0]), torch.zeros(198)]),
    "projector": torch.cat([torch.ones(3), torch.zeros(197)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("spectrum", DEGENERATE)
def test_breakdown_goes_on_with_fresh_vectors(spectrum, which, block, dtype):
    matrix = with_spectrum(DEGENERATE[spectrum], dtype=dtype)
    op = Dense(matrix)
    found = curvature.eigenvalues(op, 5, which, 1e-4, block=block, generator=generator(1))
    assert found.converged
    assert (found.value - ranked(matrix, which)[:5]).abs().max() < 1e-5
    assert found.products == op.products <= 60


@pytest.mark.parametrize("block", [2, 3, 4])
def test_equal_eigenvalues_over_a_bulk_within_one_block(block):
    values = torch.cat([torch.full((block,), 5.0), torch.linspace(-1, 1, 200)])
    found = curvature.eigenvalues(Dense(with_spectrum(values)), block + 1, tol=1e-5, block=block, generator=generator())
    assert (found.value - torch.cat([values[:block], values[-1:]])).abs().max() < 1e-5


def test_negative_dominant():
    matrix = with_spectrum(torch.cat([torch.tensor([-9.0, -4.0]), torch.linspace(-1, 2, 198)]))
    op = Dense(matrix)
    by_size = curvature.eigenvalues(op, 3, "largest_magnitude", generator=generator())
    assert torch.allclose(by_size.value, torch.tensor([-9.0, -4.0, 2.0]).double(), atol=1e-4)
    assert curvature.eigenvalues(op, 1, "largest", generator=generator()).value == pytest.approx(2.0, abs=1e-4)
    assert curvature.eigenvalues(op, 1, "smallest", generator=generator()).value == pytest.approx(-9.0, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_small_operators(n, dtype):
    matrix = symmetric(n, dtype=dtype)
    for k in range(1, n + 1):
        for block in (1, 2, 9):
            found = curvature.eigenvalues(Dense(matrix), k, block=block, generator=generator())
            assert (found.value - ranked(matrix, "largest")[:k]).abs().max() < 1e-3
            assert found.products <= n
            assert found.converged


def test_warm_start():
    matrix = symmetric(300)
    cold, X = curvature.eigenvalues(Dense(matrix), 4, tol=1e-4, vectors=True, generator=generator())
    moved = matrix + 1e-4 * symmetric(300, 1)
    warm = curvature.eigenvalues(Dense(moved), 4, tol=1e-4, warm_start=X, generator=generator())
    assert warm.converged
    assert warm.products < cold.products / 4
    assert (warm.value - ranked(moved, "largest")[:4]).abs().max() < 1e-5
    for poor in (torch.cat([X[:2], X[:2]]), torch.zeros(2, 300)):
        found = curvature.eigenvalues(Dense(moved), 4, tol=1e-4, warm_start=poor, generator=generator())
        assert (found.value - ranked(moved, "largest")[:4]).abs().max() < 1e-5


def test_says_when_the_limit_came_first():
    op = Dense(symmetric(300))
    found = curvature.eigenvalues(op, 5, tol=1e-6, max_products=20, generator=generator())
    assert not found.converged
    assert found.products == op.products <= 20
    assert (found.stderr > 1e-6 * found.value.abs()).any()


def test_a_half_precision_operator():
    matrix = with_spectrum(outliers(), dtype=torch.bfloat16)
    found = curvature.eigenvalues(Dense(matrix), 3, tol=1e-2, generator=generator())
    assert found.converged
    assert (found.value - ranked(matrix, "largest")[:3]).abs().max() < 0.02
