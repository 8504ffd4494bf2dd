# SPDX-License-Identifier: Apache-2.0
"""Spectral densities by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastflat.curvature import _estimate, _vectors
from fastflat.curvature._estimate import Bar, Estimate, Moments, Operator, product

#: Bytes of the bases that are held at once where the user does not say how many probes run together.
_MEMORY = 2**30


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Density:
    """The density of the eigenvalues of an operator [n, n], as one quadrature rule for each probe.

    The rule of a probe v is exact for polynomials of degree ``2 steps - 1`` of ``v^T f(H) v / n``, and the mean over
    probes is an unbiased estimate of ``tr f(H) / n`` for those f.

    Attributes:
        nodes: [probes, steps], float64 on the host.
        weights: of the same shape; those of a probe add up to 1.
        n: size of the operator.
        products: matrix-vector products that it took.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    products: int

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        span = f"[{self.nodes.min():.4g}, {self.nodes.max():.4g}]" if self.nodes.numel() else "nothing"
        return f"Density of {self.n} eigenvalues in {span} ({probes} probes of {steps} steps, {self.products} products)"

    def width(self) -> float:
        """A width of kernels that suits a plot: a hundredth of the range of the nodes and 0."""
        values = [0.0, *self.nodes.flatten().tolist()]
        return (max(values) - min(values)) / 100 or 1.0

    def grid(self, points: int = 1024, sigma: float | None = None) -> Tensor:
        """Evenly spaced abscissae [points] over the nodes and six widths beyond them, where the density is nil."""
        _estimate.count("Density.grid", "points", points, 2)
        sigma = self._sigma("Density.grid", sigma)
        low, high = (float(self.nodes.min()), float(self.nodes.max())) if self.nodes.numel() else (0.0, 0.0)
        return torch.linspace(low - 6 * sigma, high + 6 * sigma, points, dtype=torch.float64)

    def evaluate(self, grid: Tensor | None = None, sigma: float | None = None) -> Estimate:
        """``sum_i w_i N(x; node_i, sigma^2)`` at each x of ``grid`` [G], mean and standard error over the probes.

        It integrates to 1. The error is of the density seen through this kernel; a kernel much narrower than the gaps
        between nodes shows the nodes and not the spectrum.

        Args:
            grid: abscissae, :meth:`grid` if None.
            sigma: width of the kernels, :meth:`width` if None.
        """
        sigma = self._sigma("Density.evaluate", sigma)
        x = self.grid(sigma=sigma) if grid is None else torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        if x.dim() != 1:
            _estimate.fail("Density.evaluate", "grid", "have one axis", f"shape {list(x.shape)}")
        scale = 1 / (sigma * math.sqrt(2 * math.pi))
        return self._mean(
            (w[:, None] * torch.exp(-0.5 * ((x - nodes[:, None]) / sigma) ** 2)).sum(0) * scale
            for nodes, w in zip(self.nodes, self.weights, strict=True)
        )

    def moments(self, most: int = 4) -> Estimate:
        """``tr H^j / n`` for j from 1 to ``most``, [most], mean and standard error over the probes."""
        _estimate.count("Density.moments", "most", most)
        powers = torch.arange(1, most + 1)[:, None]
        return self._mean((nodes**powers * w).sum(1) for nodes, w in zip(self.nodes, self.weights, strict=True))

    def _mean(self, samples) -> Estimate:
        moments = Moments()
        for sample in samples:
            moments.add(sample[None])
        return Estimate(moments.mean(), moments.stderr(), self.products, True)

    def _sigma(self, function: str, sigma: float | None) -> float:
        return self.width() if sigma is None else _estimate.number(function, "sigma", sigma)


def density(
    op: Operator,
    steps: int = 64,
    probes: int = 8,
    *,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Density:
    """The density of all eigenvalues: Lanczos from random signs, each step with one product for all probes of a chunk.

    Every vector is orthogonalised against all earlier ones of its probe, so that no eigenvalue appears twice. The rule
    of a probe is exact where the operator has no more than ``steps`` distinct eigenvalues.

    Args:
        op: a symmetric operator [n, n].
        steps: nodes of a probe, at most n of them. Details narrower than the range over ``steps`` are not resolved,
            but outliers are.
        probes: random vectors; the error bars are over them, and one gives none.
        chunk: probes that run together. Each keeps ``steps + 1`` vectors of n floats. As many as fit into 1 GiB, at
            least one, if None.
        generator: of the probes, on the device of the operator; the global one if None.
        progress: show a bar (tqdm).

    Raises:
        ValueError, TypeError: arguments out of range.
        FloatingPointError: a product holds NaN or infinity.
        RuntimeWarning: products show that the operator is not symmetric, or changes.

    Source: Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017), algorithm 1; Ghorbani, Krishnan and Xiao,
    ICML 2019.
    """
    n = _estimate.dimension("density", op, generator)
    steps = min(_estimate.count("density", "steps", steps), n)
    _estimate.count("density", "probes", probes)
    if n == 0:
        return Density(torch.zeros(probes, 0).double(), torch.zeros(probes, 0).double(), 0, 0)
    dtype = _estimate.working_dtype(op)
    if chunk is None:
        chunk = max(1, _MEMORY // ((steps + 1) * n * dtype.itemsize))
    chunk = min(_estimate.count("density", "chunk", chunk), probes)
    nodes, weights = [], []
    with Bar("density", steps * probes, progress) as bar:
        for start in range(0, probes, chunk):
            K = min(chunk, probes - start)
            V = _vectors.rademacher(K, n, generator, dtype=dtype, device=op.device).div_(math.sqrt(n))
            _, alpha, beta = _lanczos(op, V, steps, bar)
            T = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
            theta, S = torch.linalg.eigh(T)
            nodes.append(theta)
            weights.append(S[:, 0] ** 2)
    return Density(torch.cat(nodes), torch.cat(weights), n, steps * probes)


def _lanczos(op: Operator, V: Tensor, steps: int, bar: Bar) -> tuple[Tensor, Tensor, Tensor]:
    """K Lanczos runs in lock-step from the unit rows of V [K, n]: their vectors [K, steps + 1, n], and the diagonals
    [K, steps] and off-diagonals [K, steps - 1] of T in float64 on the host.

    Nothing is read back from the device between the first step and the last. Where the space of a probe is invariant,
    its vectors are zero from there on, and the zeros of T carry no weight.
    """
    K, n = V.shape
    Q = torch.empty(K, steps + 1, n, dtype=V.dtype, device=V.device)
    Q[:, 0] = V
    alpha = torch.zeros(K, steps, dtype=torch.float64, device=V.device)
    beta = torch.zeros(K, steps, dtype=torch.float64, device=V.device)
    scale = torch.zeros(K, dtype=torch.float64, device=V.device)
    gap = torch.zeros((), dtype=torch.float64, device=V.device)
    eps = torch.finfo(V.dtype).eps
    for j in range(steps):
        Q[:, j + 1] = product("density", op, Q[:, j].contiguous())
        for k in range(K):
            w, old = Q[k, j + 1 : j + 2], Q[k, : j + 1]
            recent = old[max(j - 1, 0) :]
            c = _vectors.dots(recent, w)
            _vectors.subtract_(w, recent, c)
            again = _vectors.dots(old, w)
            square = _vectors.subtract_(w, old, again)
            alpha[k, j] = c[-1, 0] + again[-1, 0]
            if j:
                # Zero for a symmetric operator: the last vector has its beta, and earlier ones have nothing.
                again[j - 1] += c[0] - beta[k, j - 1]
                gap = torch.maximum(gap, again[:j].abs().max())
            beta[k, j] = square[0].sqrt()
        scale = torch.maximum(scale, torch.maximum(alpha[:, j].abs(), beta[:, j]))
        beta[:, j] = torch.where(beta[:, j] <= eps * scale, 0.0, beta[:, j])
        inverse = torch.where(beta[:, j] == 0, 0.0, 1 / beta[:, j])
        for k in range(K):
            Q[k, j + 1] *= inverse[k].to(Q.dtype)
        if j == 0:
            _estimate.check_finite("density", alpha[:, 0])
        bar.update(K)
    alpha, beta = alpha.cpu(), beta.cpu()
    _estimate.check_finite("density", alpha)
    _estimate.check_symmetric("density", float(gap) / max(float(scale.max()), 1e-300), op)
    return Q, alpha, beta[:, :-1]
