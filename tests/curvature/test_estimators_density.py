# SPDX-License-Identifier: Apache-2.0
"""Stochastic Lanczos quadrature on known spectra."""

import pytest
import torch

from fastflat import curvature
from fastflat.curvature import _density, _vectors
from fastflat.curvature._estimate import Bar

from .estimators_fakes import Dense, generator, low_rank, outliers, symmetric, with_spectrum


def spectrum_weights(matrix, probes, seed):
    """The exact rule of each probe that the generator will draw: ``(u_i . v)^2 / n`` on the eigenvalues."""
    values, U = torch.linalg.eigh(matrix)
    V = _vectors.rademacher(probes, len(matrix), generator(seed), dtype=matrix.dtype)
    return values, (V @ U) ** 2 / len(matrix)


@pytest.mark.parametrize("steps", [4, 5, 30])
def test_exact_for_no_more_distinct_eigenvalues_than_steps(steps):
    distinct = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    matrix = with_spectrum(distinct.repeat_interleave(25))
    found = curvature.density(Dense(matrix), steps, 3, generator=generator(4))
    values, weights = spectrum_weights(matrix, 3, 4)
    for value in distinct:
        mass = (found.weights * ((found.nodes - value).abs() < 1e-9)).sum(1)
        exact = weights[:, (values - value).abs() < 1e-9].sum(1)
        assert (mass - exact).abs().max() < 1e-10
    assert (found.weights.sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [2, 3, 7, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_two_moments_are_those_of_the_probes(steps, dtype, tolerance):
    matrix = symmetric(200, dtype=dtype) / 10
    found = curvature.density(Dense(matrix), steps, 4, generator=generator(2))
    V = _vectors.rademacher(4, 200, generator(2)).double()
    HV = V @ matrix.double()
    exact = torch.stack([(V * HV).sum(1), (HV * HV).sum(1)]) / 200
    own = torch.stack([(found.weights * found.nodes**power).sum(1) for power in (1, 2)])
    assert (own - exact).abs().max() < tolerance * exact.abs().max()
    moments = found.moments(2)
    assert torch.allclose(moments.value, exact.mean(1), rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.allclose(moments.stderr, exact.std(1) / 2, rtol=100 * tolerance, atol=100 * tolerance)


def test_moments_of_the_matrix_within_their_errors():
    matrix = symmetric(200) / 10
    moments = curvature.density(Dense(matrix), 10, 20, generator=generator()).moments(4)
    values = torch.linalg.eigvalsh(matrix)
    exact = torch.stack([(values**power).mean() for power in range(1, 5)])
    assert ((moments.value - exact) / moments.stderr).abs().max() < 4


@pytest.mark.parametrize("spectrum", [outliers, low_rank, torch.ones(50).clone, torch.zeros(50).clone])
def test_integrates_to_one(spectrum):
    found = curvature.density(Dense(with_spectrum(spectrum())), 20, 3, generator=generator())
    for sigma in (None, 0.1):
        grid = found.grid(4000, sigma)
        curve = found.evaluate(grid, sigma)
        assert torch.trapezoid(curve.value, grid) == pytest.approx(1, abs=1e-6)
        assert curve.stderr.shape == grid.shape
        assert bool((curve.value >= 0).all())


def test_the_curve_is_that_of_the_eigenvalues():
    matrix = symmetric(300) / 17
    found = curvature.density(Dense(matrix), 60, 32, generator=generator())
    curve = found.evaluate(sigma=0.1)
    values = torch.linalg.eigvalsh(matrix)
    grid = found.grid(sigma=0.1)
    exact = torch.distributions.Normal(values, 0.1).log_prob(grid[:, None]).exp().mean(1)
    error = (curve.value - exact).abs()
    assert torch.trapezoid(error, grid) < 0.05
    assert (error <= 5 * curve.stderr + 1e-3).all()


@pytest.mark.parametrize("spectrum", [outliers, low_rank])
@pytest.mark.parametrize(("dtype", "off", "on"), [(torch.float32, 1e-5, 3e-5), (torch.float64, 1e-13, 1e-13)])
def test_vectors_stay_orthonormal_and_there_are_no_ghosts(spectrum, dtype, off, on):
    values = spectrum()
    op = Dense(with_spectrum(values, dtype=dtype))
    V = _vectors.rademacher(3, 400, generator(), dtype=dtype) / 20
    with Bar("test", 0, False) as bar:
        Q, _, _ = _density._lanczos(op, V, 150, bar)
    gram = Q.double() @ Q.double().transpose(1, 2)
    size = gram.diagonal(dim1=1, dim2=2)
    assert (size - 1).abs().max() <= on
    assert (gram - torch.diag_embed(size)).abs().max() <= off
    found = curvature.density(op, 150, 3, generator=generator())
    threshold = 0.009
    assert ((found.nodes > threshold).sum(1) == int((values > threshold).sum())).all()


def test_long_vectors_that_live_in_a_few_entries_stay_orthonormal():
    """One large entry among many small ones is where the rounding errors of a float32 sum grow."""
    n = 150_001
    values = 1e-3 * torch.randn(n, generator=generator())
    values[:10] = torch.linspace(1, 0.1, 10)

    class Diagonal:
        shape, dtype, device = (n, n), torch.float32, torch.device("cpu")

        def matmat(self, V):
            return V * values

    V = _vectors.rademacher(1, n, generator()) / n**0.5
    with Bar("test", 0, False) as bar:
        Q, _, _ = _density._lanczos(Diagonal(), V, 30, bar)
    gram = Q[0].double() @ Q[0].double().T
    assert (gram.diagonal() - 1).abs().max() <= 3e-5
    assert (gram - torch.diag(gram.diagonal())).abs().max() <= 1e-5


def test_full_length_gives_the_spectrum():
    matrix = symmetric(60)
    found = curvature.density(Dense(matrix), 60, 2, generator=generator())
    assert (found.nodes - torch.linalg.eigvalsh(matrix)).abs().max() < 1e-10


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_small_operators(n):
    matrix = symmetric(n) if n else torch.zeros(0, 0)
    op = Dense(matrix)
    found = curvature.density(op, 64, 5, generator=generator())
    assert found.nodes.shape == found.weights.shape == (5, n)
    assert found.products == op.products == 5 * n
    assert found.evaluate().value.shape == (1024,)
    assert str(n) in repr(found)
    if n:
        assert (found.weights.sum(1) - 1).abs().max() < 1e-12


def test_chunks_do_not_change_the_result():
    op = Dense(symmetric(100))
    whole = curvature.density(op, 12, 5, generator=generator())
    parts = curvature.density(op, 12, 5, chunk=2, generator=generator())
    assert torch.allclose(whole.nodes, parts.nodes, atol=1e-10)
    assert torch.allclose(whole.weights, parts.weights, atol=1e-10)


def test_one_probe_has_no_error_bar():
    found = curvature.density(Dense(symmetric(50)), 10, 1, generator=generator())
    assert torch.isinf(found.evaluate().stderr).all()
