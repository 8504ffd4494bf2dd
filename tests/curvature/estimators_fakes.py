# SPDX-License-Identifier: Apache-2.0
"""Operators that the estimators are tested on: dense matrices of known spectra."""

import torch
from torch import Tensor


class Dense:
    """A symmetric matrix as an operator, which counts its products."""

    def __init__(self, matrix: Tensor, blocks: dict[str, slice] | None = None):
        self.matrix = matrix
        self.shape, self.dtype, self.device = tuple(matrix.shape), matrix.dtype, matrix.device
        self.blocks = blocks or {"all": slice(0, len(matrix))}
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        assert V.dtype == self.dtype
        assert V.is_contiguous()
        self.products += len(V)
        return V @ self.matrix


class OwnBlocks(Dense):
    """One that also multiplies with its diagonal blocks."""

    def block_matmat(self, name: str, V: Tensor) -> Tensor:
        block = self.blocks[name]
        self.products += len(V)
        return V @ self.matrix[block, block]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(values: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """``U diag(values) U^T`` with a random orthogonal U."""
    n = len(values)
    U, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator(seed)))
    matrix = (U * values.double()) @ U.T
    return ((matrix + matrix.T) / 2).to(dtype)


def symmetric(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(n, n, dtype=torch.float64, generator=generator(seed))
    return ((matrix + matrix.T) / 2).to(dtype)


def outliers(n: int = 400) -> Tensor:
    """Ten outliers over a bulk of 1e-3, as networks have them."""
    bulk = 1e-3 * torch.randn(n - 10, dtype=torch.float64, generator=generator(1))
    return torch.cat([torch.linspace(1, 0.1, 10, dtype=torch.float64), bulk])


def low_rank(n: int = 400) -> Tensor:
    """Rank 30 over a bulk of 1e-6."""
    bulk = 1e-6 * torch.randn(n - 30, dtype=torch.float64, generator=generator(2))
    return torch.cat([torch.logspace(0, -2, 30, dtype=torch.float64), bulk])
