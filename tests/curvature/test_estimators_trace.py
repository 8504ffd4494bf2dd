# SPDX-License-Identifier: Apache-2.0
"""Traces and diagonals against dense matrices."""

import math

import pytest
import torch

from fastflat import curvature
from fastflat.curvature import _sketch

from .estimators_fakes import Dense, OwnBlocks, generator, low_rank, symmetric, with_spectrum

METHODS = ["hutchinson", "hutch++", "xtrace"]


def positive(n=120, seed=0):
    matrix = symmetric(n, seed)
    return matrix @ matrix / n


@pytest.mark.parametrize("method", METHODS)
def test_the_error_bar_is_right_over_seeds(method):
    matrix = positive()
    op, exact = Dense(matrix), float(matrix.trace())
    z, seeds = [], 60
    for seed in range(seeds):
        found = curvature.trace(op, 1e-9, 96, 8, method, generator=generator(seed))
        assert not found.converged
        z.append((found.value - exact) / found.stderr)
    z = torch.tensor(z, dtype=torch.float64)
    assert z.abs().max() < 4
    assert z.mean().abs() < 4 / math.sqrt(seeds), "no bias"
    # The jackknife of XTrace errs on the large side, up to two times here.
    assert (0.1 if method == "xtrace" else 0.6) < z.square().mean() < 1.6


def test_the_jackknife_is_that_of_xtrace_with_one_probe_less():
    """The closed form against the definition: all estimates from scratch, with projections by QR."""
    n, m = 30, 7
    A = positive(n)
    V = torch.randn(n, m, dtype=torch.float64, generator=generator(4))

    def xtrace(probes):
        found = []
        for i in range(probes.shape[1]):
            rest = torch.cat([probes[:, :i], probes[:, i + 1 :]], 1)
            Q, _ = torch.linalg.qr(A @ rest)
            w = probes[:, i] - Q @ (Q.T @ probes[:, i])
            found.append((Q.T @ A @ Q).trace() + w @ A @ w)
        return torch.stack(found).mean()

    without = torch.stack([xtrace(torch.cat([V[:, :j], V[:, j + 1 :]], 1)) for j in range(m)])
    error = ((m - 1) / m * (without - without.mean()).square().sum()).sqrt()
    Q, R = torch.linalg.qr(A @ V)
    value, stderr = _sketch._leave_one_out(Q.T @ A @ Q, R, Q.T @ V, (V * (A @ V)).sum(0))
    assert value == pytest.approx(float(xtrace(V)), rel=1e-10)
    assert stderr == pytest.approx(float(error), rel=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("method", METHODS)
def test_stops_at_the_error_that_was_asked_for_whatever_the_sign(method, sign):
    op = Dense(sign * positive())
    loose = curvature.trace(op, 0.2, 2000, method=method, generator=generator())
    tight = curvature.trace(op, 0.01, 2000, method=method, generator=generator())
    exact = float(op.matrix.trace())
    for found, rtol in ((loose, 0.2), (tight, 0.01)):
        assert found.converged
        assert found.stderr <= rtol * abs(found.value)
        assert abs(found.value - exact) < 5 * found.stderr + 1e-9
    assert 16 <= loose.products <= tight.products
    assert loose.products + tight.products == op.products, "every product is counted"


@pytest.mark.parametrize("method", METHODS)
def test_says_when_the_limit_came_first(method):
    found = curvature.trace(Dense(symmetric(100)), 1e-6, 40, method=method, generator=generator())
    assert not found.converged
    assert found.products <= 40
    assert "not converged" in repr(found)


def test_atol_stops_where_the_trace_is_zero():
    matrix = symmetric(100)
    matrix -= torch.eye(100, dtype=matrix.dtype) * matrix.trace() / 100
    found = curvature.trace(Dense(matrix), 1e-3, 400, atol=20.0, generator=generator())
    assert found.converged
    assert found.stderr <= 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_signs_are_exact_on_diagonal_matrices(dtype):
    values = torch.linspace(-1, 3, 200, dtype=dtype)
    found = curvature.trace(Dense(torch.diag(values)), generator=generator())
    assert found.stderr == 0
    assert found.products == 16
    assert found.value == pytest.approx(float(values.double().sum()), rel=1e-6 if dtype == torch.float32 else 1e-12)
    entries = curvature.diagonal(Dense(torch.diag(values)), generator=generator())
    assert torch.equal(entries.value, values.double())
    assert not entries.stderr.any()


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_a_sketch_is_exact_up_to_its_rank(method, dtype, tolerance):
    values = torch.zeros(150, dtype=torch.float64)
    values[:10] = torch.linspace(-2, 5, 10, dtype=torch.float64)
    op = Dense(with_spectrum(values, dtype=dtype))
    found = curvature.trace(op, 1e-4, 36, 4, method, generator=generator())
    assert found.converged
    assert found.value == pytest.approx(float(values.sum()), rel=tolerance)
    assert found.products <= 36


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_sketch_beats_plain_probes_on_falling_spectra(method):
    op = Dense(with_spectrum(low_rank()))
    plain = curvature.trace(op, 1e-12, 96, generator=generator())
    found = curvature.trace(op, 1e-12, 96, method=method, generator=generator())
    assert found.stderr < 0.01 * plain.stderr
    assert abs(found.value - float(op.matrix.trace())) < 5 * found.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 16, 17])
def test_small_operators(method, n):
    matrix = positive(n, 1) if n else torch.zeros(0, 0, dtype=torch.float64)
    op = Dense(matrix)
    found = curvature.trace(op, 0.3, method=method, chunk=32, generator=generator())
    assert isinstance(found.value, float)
    assert abs(found.value - float(matrix.trace())) <= 5 * found.stderr + 1e-12
    assert found.converged
    assert found.products == op.products
    if n <= 16:
        assert (found.stderr, found.products) == (0, n)
    entries = curvature.diagonal(op, 0.5, generator=generator())
    assert entries.value.shape == entries.stderr.shape == (n,)
    if n <= 16:
        assert torch.allclose(entries.value, matrix.diagonal(), atol=1e-12)


BLOCKS = {"weight": slice(0, 70), "bias": slice(70, 80), "scale": slice(80, 81), "head": slice(81, 120)}


@pytest.mark.parametrize("kind", [Dense, OwnBlocks])
def test_layer_traces(kind):
    op = kind(positive(), BLOCKS)
    found = curvature.layer_traces(op, 0.1, generator=generator())
    assert list(found) == list(BLOCKS)
    for name, block in BLOCKS.items():
        exact = float(op.matrix[block, block].trace())
        assert found[name].converged
        assert found[name].stderr <= 0.1 * abs(found[name].value)
        assert abs(found[name].value - exact) <= 4 * found[name].stderr + 1e-12
    own = [found[name].products for name in BLOCKS]
    assert op.products == (sum(own) if kind is OwnBlocks else own[0])
    if kind is OwnBlocks:
        assert (found["bias"].stderr, found["scale"].products) == (0, 1)


def test_layer_traces_say_which_layer_did_not_get_there():
    matrix = torch.diag(torch.linspace(1, 2, 60, dtype=torch.float64))
    matrix[40:, 40:] += 50 * symmetric(20)
    found = curvature.layer_traces(
        Dense(matrix, {"a": slice(0, 40), "b": slice(40, 60)}), 0.01, 64, generator=generator()
    )
    assert found["a"].converged
    assert found["a"].stderr == 0
    assert not found["b"].converged
    assert found["b"].products == 64


def test_own_blocks_have_less_variance():
    matrix = positive()
    blocks = {"a": slice(0, 60), "b": slice(60, 120)}
    joint = curvature.layer_traces(Dense(matrix, blocks), 1e-9, 2000, generator=generator())
    own = curvature.layer_traces(OwnBlocks(matrix, blocks), 1e-9, 2000, generator=generator())
    for name, rows in blocks.items():
        within = matrix[rows, rows] - matrix[rows, rows].diagonal().diag()
        beside = matrix[rows].square().sum() - matrix[rows, rows].square().sum()
        variance = 2 * within.square().sum()
        # Of 2000 signs a standard error is known to a sixtieth.
        ratio = float(variance / (variance + beside)) ** 0.5
        assert own[name].stderr / joint[name].stderr == pytest.approx(ratio, rel=0.1)
        assert own[name].stderr < joint[name].stderr


def test_the_error_of_a_diagonal_is_right_entry_by_entry():
    matrix = positive()
    found = curvature.diagonal(Dense(matrix), 1e-9, 400, generator=generator())
    z = (found.value - matrix.diagonal()) / found.stderr
    assert not found.converged
    assert z.abs().max() < 4.5
    assert 0.7 < z.square().mean() < 1.4
    stopped = curvature.diagonal(Dense(matrix), 0.1, generator=generator())
    assert stopped.converged
    assert torch.linalg.vector_norm(stopped.value - matrix.diagonal()) < 0.15 * matrix.diagonal().norm()


def test_float32_agrees_with_float64():
    matrix = positive()
    single = curvature.trace(Dense(matrix.float()), generator=generator(5))
    double = curvature.trace(Dense(matrix), generator=generator(5))
    assert single.value == pytest.approx(double.value, rel=1e-5)
    assert single.products == double.products
