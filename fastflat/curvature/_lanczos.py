# SPDX-License-Identifier: Apache-2.0
"""Extreme eigenvalues by block Lanczos with full reorthogonalisation and thick restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastflat.curvature import _estimate
from fastflat.curvature._basis import Basis
from fastflat.curvature._estimate import Bar, Estimate, Operator, product

#: How eigenvalues are ranked, first the wanted ones.
_RANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda theta: -theta,
    "largest_magnitude": lambda theta: -theta.abs(),
    "smallest": lambda theta: theta,
}


def eigenvalues(
    op: Operator,
    k: int = 5,
    which: str = "largest",
    tol: float = 1e-3,
    *,
    block: int | None = None,
    basis: int | None = None,
    max_products: int = 1000,
    warm_start: Tensor | None = None,
    vectors: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate | tuple[Estimate, Tensor]:
    """The k extreme eigenvalues of a symmetric operator, and their eigenvectors if asked.

    Block Lanczos: ``H Q^T = Q^T T + W^T R`` with orthonormal rows Q; the eigenvalues theta of the small T = Q H Q^T and
    x = s^T Q approximate those of H, and ``|H x - theta x| = |R s_last|`` is known without a product. Every block is
    orthogonalised against the whole basis. When the basis is full it is cut down to its best vectors.

    Args:
        op: a symmetric operator [n, n].
        k: how many, from 1 to n.
        which: ``"largest"`` and ``"smallest"`` are meant with their signs, largest or smallest first;
            ``"largest_magnitude"`` takes the absolute value.
        tol: stop when ``|H x - theta x| <= tol |theta|`` for all k, or is no more than rounding errors. The eigenvalue
            itself is then right to about ``tol^2 |theta|^2 / gap``.
        block: vectors in one product; 2 if None. Equal eigenvalues are found up to this multiplicity; more of them
            where the operator has few distinct ones.
        basis: most vectors that are kept, at least ``k + 2 block``; n if that is less. ``max(40, 3 k + 2 block)`` if
            None. Together with one block they are the memory: n floats each.
        max_products: stop there, with ``converged=False``. Less than one block more where k needs it.
        warm_start: vectors [w, n] to begin with, such as the eigenvectors of an earlier call; w <= n.
        vectors: also return the eigenvectors.
        generator: of the first vectors, on the device of the operator; the global one if None.
        progress: show a bar (tqdm).

    Returns:
        The eigenvalues [k] in float64 on the host, with ``stderr`` the residual norms: an eigenvalue of H lies within
        each. With ``vectors``, the estimate and the eigenvectors [k, n], orthonormal rows.

    Raises:
        ValueError, TypeError: arguments out of range.
        FloatingPointError: a product holds NaN or infinity.
        RuntimeWarning: products show that the operator is not symmetric, or changes.

    Source: Golub and Underwood, The block Lanczos method, 1977; Wu and Simon, Thick-restart Lanczos, SIAM J. Matrix
    Anal. Appl. 22 (2000).
    """
    n = _estimate.dimension("eigenvalues", op, generator)
    _estimate.count("eigenvalues", "k", k, 1, n)
    _estimate.one_of("eigenvalues", "which", which, tuple(_RANKS))
    tol = _estimate.number("eigenvalues", "tol", tol)
    _estimate.count("eigenvalues", "max_products", max_products, 1)
    width = min(n, 2 if block is None else _estimate.count("eigenvalues", "block", block))
    start = _start(op, n, width, warm_start, generator)
    width = len(start)
    least = min(n, k + 2 * width)
    size = max(40, 3 * k + 2 * width) if basis is None else _estimate.count("eigenvalues", "basis", basis, least)
    run = _Lanczos(op, k, _RANKS[which], tol, min(n, max(size, least)), generator)
    with Bar("eigenvalues", max_products, progress) as bar:
        ritz = run.solve(start, max_products, bar)
        _estimate.check_symmetric("eigenvalues", run.gap / max(run.norm, 1e-300), op)
        found = Estimate(ritz.theta[:k], ritz.residual[:k], run.spent, ritz.converged)
        if not vectors:
            return found
        run.basis.rotate(ritz.S[:, :k])
        return found, run.basis.rows.clone()


def _start(op: Operator, n: int, width: int, warm: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The first block: the warm vectors, and random ones up to the width of a block."""
    if warm is None:
        return _random(op, width, n, generator)
    if not isinstance(warm, Tensor):
        _estimate.fail("eigenvalues", "warm_start", "be a tensor", type(warm))
    if warm.dim() != 2 or warm.shape[1] != n or len(warm) > n:
        _estimate.fail("eigenvalues", "warm_start", f"have shape [w, {n}] with w <= {n}", list(warm.shape))
    if not bool(torch.isfinite(warm).all()):
        _estimate.fail("eigenvalues", "warm_start", "be finite", "NaN or infinity")
    warm = warm.detach().to(op.device, _estimate.working_dtype(op))
    return torch.cat([warm, _random(op, max(width - len(warm), 0), n, generator)])


def _random(op: Operator, width: int, n: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(width, n, dtype=_estimate.working_dtype(op), device=op.device, generator=generator)


@dataclasses.dataclass
class _Ritz:
    """Eigenvalues of T, the wanted ones first, their vectors in columns, and ``|H x - theta x|``."""

    theta: Tensor
    S: Tensor
    residual: Tensor
    converged: bool = False


class _Lanczos:
    """State of one run. The first ``done`` rows of the basis have met the operator, those behind are the next block."""

    def __init__(self, op: Operator, k: int, rank, tol: float, size: int, generator: torch.Generator | None) -> None:
        self.op, self.k, self.rank, self.tol, self.size, self.generator = op, k, rank, tol, size, generator
        self.n = op.shape[0]
        working = torch.finfo(_estimate.working_dtype(op)).eps
        self.eps = torch.finfo(op.dtype).eps
        #: What a product adds by rounding, relative to |H|: measured 1 to 15 working epsilons on dense matrices.
        self.noise = max(self.eps, 30 * working)
        self.spent = self.done = 0
        self.norm = 0.0
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.R = torch.zeros(0, 0, dtype=torch.float64)
        #: What a symmetric operator will make of the next block: its products with the rows before it.
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)
        self.gap = 0.0
        #: Rows that came after the Krylov space last broke down, and the eigenvalues that it held then.
        self.fresh = torch.zeros(0, dtype=torch.bool)
        self.before: Tensor | None = None

    def solve(self, start: Tensor, max_products: int, bar: Bar) -> _Ritz:
        width = len(start)
        op = self.op
        self.basis = Basis("eigenvalues", self.size + width, self.n, start.dtype, start.device)
        self.basis.extend(start, self.noise * float(torch.linalg.vector_norm(start, dim=1).max()))
        if not self.basis.count:
            self.basis.extend(_random(op, width, self.n, self.generator))
        self.coupling = torch.zeros(0, self.basis.count, dtype=torch.float64)
        window = 0
        while True:
            window = self._step(window)
            ritz = self._ritz()
            ritz.converged = self._converged(ritz)
            bar.update(self.R.shape[1], ritz.theta[: self.k], ritz.residual[: self.k])
            if self.basis.count == self.done:
                ritz.converged = self._breakdown(ritz, width)
            if ritz.converged and self.done >= self.k:
                return ritz
            if self.done >= self.k and self.spent + self.basis.count - self.done > max_products:
                return ritz
            if self.basis.count > self.size:
                self._restart(ritz, width)
                window = 0

    def _step(self, window: int) -> int:
        """One product with the block behind the first ``done`` rows. Returns where the next window begins."""
        done, count = self.done, self.basis.count
        HV = product("eigenvalues", self.op, self.basis.rows[done:])
        # A coupling that is no more than rounding errors of the product says nothing: the space is invariant.
        self.norm = max(self.norm, float(torch.linalg.vector_norm(HV, dim=1).max()))
        C, self.R = self.basis.extend(HV, self.noise * self.norm, window)
        gaps = torch.cat([(C[:done] - self.coupling).flatten(), (C[done:] - C[done:].T).flatten()])
        self.gap = max(self.gap, float(gaps.abs().max()))
        T = torch.zeros(count, count, dtype=torch.float64)
        T[:done, :done] = self.T
        T[:, done:], T[done:, :done] = C, C[:done].T
        T[done:, done:] = (C[done:] + C[done:].T) / 2
        self.T, self.done = T, count
        self.fresh = torch.cat([self.fresh, torch.full((count - done,), self.before is not None)])
        self.spent += count - done
        self.coupling = torch.zeros(count, self.basis.count - count, dtype=torch.float64)
        self.coupling[done:] = self.R[: self.basis.count - count].T
        return done

    def _ritz(self) -> _Ritz:
        theta, S = torch.linalg.eigh(self.T)
        order = self.rank(theta).argsort(stable=True)
        theta, S = theta[order], S[:, order]
        self.norm = max(self.norm, float(theta.abs().max()))
        residual = torch.linalg.vector_norm(self.R @ S[self.done - self.R.shape[1] :], dim=0)
        return _Ritz(theta, S, residual.clamp_(min=self.eps * self.norm))

    def _small(self, ritz: _Ritz) -> Tensor:
        return ritz.residual <= torch.clamp(self.tol * ritz.theta.abs(), min=self.noise * self.norm)

    def _converged(self, ritz: _Ritz) -> bool:
        """Whether the first k have small residuals and, after a breakdown, the best of what came since is known well
        enough to say that it is not among them."""
        small = self._small(ritz)
        if self.done < self.k or not bool(small[: self.k].all()):
            return False
        if self.before is None or self.done == self.n:
            return True
        recent = torch.nonzero((ritz.S[self.fresh] ** 2).sum(0) > 0.5).flatten()
        return len(recent) > 0 and int(recent[0]) >= self.k and bool(small[recent[0]])

    def _breakdown(self, ritz: _Ritz, width: int) -> bool:
        """The space is invariant. True if it is known to hold the wanted values, else random vectors go on."""
        found = ritz.theta[: self.k]
        if self.done == self.n:
            return True
        if self.before is not None and self.before.shape == found.shape:
            unchanged = (found - self.before).abs() <= torch.clamp(self.tol * found.abs(), min=self.noise * self.norm)
            if bool(unchanged.all()):
                return True
        self.before = found
        self.fresh = torch.zeros(self.done, dtype=torch.bool)
        self.basis.extend(_random(self.op, width, self.n, self.generator))
        self.coupling = torch.zeros(self.done, self.basis.count - self.done, dtype=torch.float64)
        return False

    def _restart(self, ritz: _Ritz, width: int) -> None:
        """Keep the best vectors, and the best of those since a breakdown; T becomes diagonal, and the next product
        finds its coupling to the block that follows."""
        following = self.basis.count - self.done
        kept = torch.arange(min(max(self.k + width, 2 * self.size // 5), self.size - width, self.done))
        weight = (ritz.S[self.fresh] ** 2).sum(0)
        recent = torch.nonzero(weight > 0.5).flatten()[:1]
        if len(recent) and int(recent) >= len(kept):
            kept[-1] = recent[0]
        self.basis.rotate(ritz.S[:, kept], following)
        self.coupling = ritz.S[:, kept].T @ self.coupling
        self.done = len(kept)
        self.T = torch.diag(ritz.theta[kept])
        self.fresh = weight[kept] > 0.5
