# SPDX-License-Identifier: Apache-2.0
"""The loop over chunks of random probes, until their mean is known well enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflat.curvature import _estimate, _vectors
from fastflat.curvature._estimate import Bar, Estimate, Moments, Operator

#: Probes below which a standard error says little: at 16 it is itself known to 18 %. Also the n up to which unit
#: vectors give the exact diagonal for the same price.
LEAST = 16


class Probes:
    """What one call was asked for, checked, and the loop over chunks of probes."""

    def __init__(
        self,
        function: str,
        op: Operator,
        rtol: float,
        atol: float,
        limit: int,
        chunk: int,
        generator: torch.Generator | None,
    ) -> None:
        self.function, self.op, self.limit, self.generator = function, op, limit, generator
        self.rtol = _estimate.number(function, "rtol", rtol)
        self.atol = _estimate.number(function, "atol", atol, zero=True)
        self.chunk = _estimate.count(function, "chunk", chunk)
        self.dtype = _estimate.working_dtype(op)
        self.bar: Bar | None = None

    def probes(self, K: int, n: int) -> Tensor:
        return _vectors.rademacher(K, n, self.generator, dtype=self.dtype, device=self.op.device)

    def enough(self, value: Tensor, stderr: Tensor) -> Tensor:
        return stderr <= torch.clamp(self.rtol * value.abs(), min=self.atol)

    def average(
        self,
        n: int,
        sample: Callable[[Tensor], Tensor],
        size: Callable[[Tensor], Tensor] = lambda x: x,
        base: float = 0.0,
        spent: int = 0,
        per: int = 1,
    ) -> Estimate:
        """``base`` and the mean of ``sample(V) [K / per, ...]`` over probes V [K, n], until all ``size`` of it are
        exact enough or the products, ``spent`` ones included, reach the limit. ``converged`` is a tensor."""
        moments, used = Moments(), spent
        chunk, limit = max(self.chunk // per, 1) * per, self.limit - (self.limit - spent) % per
        while True:
            K = min(chunk, limit - used)
            samples = sample(self.probes(K, n))
            _estimate.check_finite(self.function, samples)
            moments.add(samples)
            used += K
            value, stderr = base + moments.mean(), moments.stderr()
            done = self.enough(size(value), size(stderr))
            done &= moments.count >= min(max(LEAST, 2 * self.chunk) // per**0.5, max((limit - spent) // per, 2))
            self.bar.update(K, size(value), size(stderr))
            if bool(done.all()) or used >= limit:
                return Estimate(value, stderr, used, done)

    def product(self, V: Tensor, block: str | None = None) -> Tensor:
        return _estimate.product(self.function, self.op, V, block)

    def forms(self, V: Tensor, block: str | None = None) -> Tensor:
        """``v^T H v`` for each row of V, float64 [K]."""
        return _vectors.quadratic_forms(V, self.product(V, block), [slice(None)])[:, 0]

    def exact_diagonal(self, n: int, block: str | None = None) -> Tensor:
        """The diagonal, float64 [n], by n products with unit vectors."""
        units = torch.eye(n, dtype=self.dtype, device=self.op.device).split(self.chunk)
        entries = [self.product(V, block).double().diagonal(i * self.chunk) for i, V in enumerate(units)]
        exact = torch.cat([torch.zeros(0, dtype=torch.float64, device=self.op.device), *entries])
        _estimate.check_finite(self.function, exact)
        self.bar.update(n)
        return exact
