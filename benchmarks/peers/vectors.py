# SPDX-License-Identifier: Apache-2.0
"""Vector work: ours, by matrix products of torch over flat vectors, and slice by slice as most code has it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import fastflat


def ours(data):
    fastflat.choose(data.case.op, data.x.device.type)  # loads the compiled library, which the raw op does not
    op = getattr(torch.ops.fastflat, data.case.op)
    arguments = data.arguments
    return lambda x, scale: op(*arguments)


def matrices(data):
    """The products that torch has, in the type of the vectors."""
    basis, w, factors = data.basis, data.x, data.factors.to(data.x.dtype)

    def subtract() -> Tensor:
        w.addmm_(factors.T, basis, alpha=-1)
        return w.square().sum(1)

    def forms() -> Tensor:
        products = basis * w
        return torch.stack([p.sum(1) for p in products.split(_lengths(data), 1)], 1)

    calls = {
        "vectors_dot": lambda: basis @ w.T,
        "vectors_subtract_": subtract,
        "vectors_rademacher": lambda: torch.randint(0, 2, w.shape, device=w.device, dtype=w.dtype) * 2 - 1,
        "vectors_quadratic": forms,
    }
    return lambda x, scale: calls[data.case.op]()


def loop(data):
    """Vector by vector and slice by slice: multiply, sum, subtract."""
    lengths = _lengths(data)
    vectors = [w.split(lengths) for w in data.x]
    basis = [q.split(lengths) for q in data.basis]
    factors = data.factors.tolist()

    def dot(a, b) -> Tensor:
        return sum((x * y).sum() for x, y in zip(a, b, strict=True))

    def subtract() -> list[Tensor]:
        for k, w in enumerate(vectors):
            for j, q in enumerate(basis):
                for x, y in zip(w, q, strict=True):
                    x.sub_(y, alpha=factors[j][k])
        return [dot(w, w) for w in vectors]

    def signs() -> list[Tensor]:
        return [torch.randint_like(x, high=2).mul_(2).sub_(1) for x in vectors[0]]

    def forms() -> list[list[Tensor]]:
        rows = zip(basis, vectors, strict=True)
        return [[(x * y).sum() for x, y in zip(*row, strict=True)] for row in rows]

    calls = {
        "vectors_dot": lambda: [[dot(q, w) for w in vectors] for q in basis],
        "vectors_subtract_": subtract,
        "vectors_rademacher": signs,
        "vectors_quadratic": forms,
    }
    return lambda x, scale: calls[data.case.op]()


def _lengths(data) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(data.starts)]
