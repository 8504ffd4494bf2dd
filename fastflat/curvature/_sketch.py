# SPDX-License-Identifier: Apache-2.0
"""Traces with a sketch of the operator's range: Hutch++ and XTrace."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.curvature import _estimate, _vectors
from fastflat.curvature._basis import Basis
from fastflat.curvature._estimate import Estimate
from fastflat.curvature._probes import Probes


def _appended(run: Probes, basis: Basis, Y: Tensor, largest: float) -> tuple[Tensor, Tensor, float]:
    """Basis.extend without what is rounding errors of the longest row met so far."""
    squares = _vectors.quadratic_forms(Y, Y, [slice(None)])
    _estimate.check_finite(run.function, squares)
    largest = max(largest, float(squares.max()) ** 0.5)
    C, R = basis.extend(Y, floor=10 * torch.finfo(run.dtype).eps * largest)
    return C, R[: basis.count - len(C)], largest


def hutch_plus_plus(run: Probes) -> Estimate:
    """``tr(Q H Q^T)``, Q an orthonormal basis of H S, and the mean of ``w^T H w`` over ``w = v - Q^T Q v``."""
    n = run.op.shape[0]
    rank = min(n, run.limit // 3)
    basis = Basis(run.function, rank, n, run.dtype, run.op.device)
    largest, spent, inside = 0.0, 0, 0.0
    for K in _parts(rank, run.chunk):
        _, _, largest = _appended(run, basis, run.product(run.probes(K, n)), largest)
        spent += K
        run.bar.update(K)
    for Q in basis.rows.split(run.chunk):
        forms = run.forms(Q)
        _estimate.check_finite(run.function, forms)
        inside += float(forms.sum())
        spent += len(Q)
        run.bar.update(len(Q))
    if basis.count == n or spent >= run.limit:
        exact = basis.count == n
        return Estimate(inside, 0.0 if exact else torch.inf, spent, exact)

    def sample(V: Tensor) -> Tensor:
        for _ in range(2):
            _vectors.subtract_(V, basis.rows, _vectors.dots(basis.rows, V))
        return run.forms(V)

    return run.average(n, sample, base=inside, spent=spent)


def xtrace(run: Probes) -> Estimate:
    """For each probe w_i the exact trace on the range of the products with all others, and w_i's own estimate of the
    rest; the mean over i. Probes are added by chunks, and what was computed for earlier ones is kept."""
    n = run.op.shape[0]
    most = min(n, run.limit // 2)
    basis = Basis(run.function, most, n, run.dtype, run.op.device)
    probes = torch.empty(most, n, dtype=run.dtype, device=run.op.device)
    R = torch.zeros(most, most, dtype=torch.float64)  # probes' products in the basis: H w_i = R[:, i]^T Q
    H = torch.zeros(most, most, dtype=torch.float64)  # Q H Q^T
    W = torch.zeros(most, most, dtype=torch.float64)  # Q w
    forms = torch.zeros(0, dtype=torch.float64)
    largest, spent, count = 0.0, 0, 0
    for K in _parts(most, run.chunk):
        before, new = basis.count, run.probes(K, n)
        probes[count : count + K] = new
        Y = run.product(new)
        forms = torch.cat([forms, _vectors.quadratic_forms(new, Y, [slice(None)])[:, 0].cpu()])
        C, B, largest = _appended(run, basis, Y, largest)
        R[:before, count : count + K], R[before : basis.count, count : count + K] = C, B
        added = basis.rows[before:]
        W[:before, count : count + K] = _vectors.dots(basis.rows[:before], new).cpu()
        spent, count = spent + K + len(added), count + K
        W[before : basis.count, :count] = _vectors.dots(added, probes[:count]).cpu()
        if len(added):
            columns = _vectors.dots(basis.rows, run.product(added)).cpu()
            _estimate.check_finite(run.function, columns)
            H[: basis.count, before : basis.count], H[before : basis.count, : basis.count] = columns, columns.T
        run.bar.update(K + len(added))
        r = basis.count
        value, stderr = _leave_one_out(H[:r, :r], R[:r, :count], W[:r, :count], forms)
        if r == n:
            return Estimate(H.diagonal().sum(), 0.0, spent, True)
        done = run.enough(value, stderr) & (count >= min(8, most))
        if bool(done) or count == most:
            return Estimate(value, stderr, spent, done)
    raise AssertionError("no probes")


def _leave_one_out(H: Tensor, R: Tensor, W: Tensor, forms: Tensor) -> tuple[Tensor, Tensor]:
    """XTrace and its standard error from ``H = Q H Q^T`` [r, r], R [r, m], ``W = Q w`` [r, m] and ``forms = w^T H w``.

    The range without probe i is ``Q^T (I - s s^T) Q``, where s is the unit vector in Q that is normal to all other
    columns of R: a row of its pseudo-inverse. Where column i depends on the others there is none, and s is 0.

    The m estimates share the basis and are not independent: their spread alone was measured up to 3.5 times too small.
    The error is the jackknife's instead, of the same mean without probe j, whose range also lacks ``e``, the part of
    s_j normal to s_i. It is too large rather than too small (Efron and Stein, Ann. Stat. 9, 1981).
    """
    m = R.shape[1]
    inverse = torch.linalg.pinv(R, rtol=1e-12)
    length = torch.linalg.vector_norm(inverse, dim=1).clamp(min=1e-300)
    needed = (inverse * R.T).sum(1) > 0.999
    S = torch.where(needed, inverse.T / length, 0.0)
    X = W - S * (S * W).sum(0)
    HS, HX = H @ S, H @ X
    one = H.diagonal().sum() - (S * HS).sum(0) + forms - 2 * (X * R).sum(0) + (X * HX).sum(0)
    # Row i, column j: probe i's estimate without probe j.
    G, HSS, SW, SHX = S.T @ S, S.T @ HS, (S.T @ W).T, (S.T @ HX).T
    g2 = 1 - G * G
    norm = torch.where((g2 > 1e-12) & needed, g2, torch.inf).sqrt()
    own = HSS.diagonal()[:, None]
    eHe = (HSS.diagonal() - 2 * G * HSS + G * G * own) / norm**2
    ew = (SW - G * SW.diagonal()[:, None]) / norm
    eR = -G * torch.where(needed, 1 / length, 0.0)[:, None] / norm
    eHx = (SHX - G * SHX.diagonal()[:, None]) / norm
    two = one[:, None] - eHe + 2 * ew * (eR - eHx) + ew * ew * eHe
    without = (two.sum(0) - two.diagonal()) / max(m - 1, 1)
    spread = (without - without.mean()).square().sum() * (m - 1) / m
    return one.mean(), spread.sqrt() if m > 1 else one.new_tensor(torch.inf)


def _parts(total: int, chunk: int) -> list[int]:
    return [min(chunk, total - start) for start in range(0, total, chunk)]
