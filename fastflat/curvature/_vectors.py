# SPDX-License-Identifier: Apache-2.0
"""The vector primitives of the estimators, in plain torch: K vectors of n floats are the rows of one [K, n] buffer.

Data stays in its type, float32 or float64. Tiles of a fixed number of columns are summed in that type and added up in
float64, in an order that the shape decides; within a tile it is the order of the matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: Columns that are summed in the type of the data. Where one entry is as large as the rest together, as in a vector
#: that lives in a few parameters, the rounding errors of a sum grow with its length: Lanczos vectors of n = 288,746
#: lost orthogonality to 3e-5 with 32768 columns, to 4e-6 with 4096, to 2e-6 with 2048 and to 8e-7 with 1024.
TILE = 2048

#: Columns that are worked on at once: what a call allocates beside its result is no wider.
SLAB = 32 * TILE


def _slabs(n: int, width: int = SLAB) -> Iterator[slice]:
    return (slice(start, min(start + width, n)) for start in range(0, n, width))


def _exact(x: Tensor) -> Tensor:
    """x as matrix products may take it: in float64 where the user let float32 ones round to TF32 or bfloat16."""
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return x.double()
    return x


def _tiled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [K, c] as its whole tiles [K, c // TILE, TILE] and the rest."""
    tiles = x.shape[1] // TILE
    return x[:, : tiles * TILE].unflatten(1, (tiles, TILE)), x[:, tiles * TILE :]


def _row_dots(V: Tensor, W: Tensor) -> Tensor:
    """``sum_i V[k, i] W[k, i]`` of a slab, float64 [K]."""
    (v, v_rest), (w, w_rest) = _tiled(V), _tiled(W)
    return torch.linalg.vecdot(v, w).sum(1, dtype=torch.float64) + torch.linalg.vecdot(v_rest, w_rest).double()


def _in_full(primitive: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The primitive outside of any autocast region, which would let its products round to 16 bits."""

    @functools.wraps(primitive)
    def call(first: Tensor, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return primitive(first, *rest)

    return call


def rademacher(
    K: int,
    n: int,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Signs -1 and +1 of equal probability, [K, n]: 64 for each number drawn from the generator."""
    words = torch.empty(K, -(-n // 64), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    words = words.view(torch.int32)
    V = torch.empty(K, n, dtype=dtype, device=device)
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    for s in _slabs(n, SLAB // 8):
        # Each bit in turn becomes the sign of a float32 one.
        bits = words[:, s.start // 32 : -(-s.stop // 32), None] << shifts
        ones = bits.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000).view(torch.float32)
        V[:, s] = ones.flatten(1)[:, : s.stop - s.start]
    return V


@_in_full
def dots(Q: Tensor, W: Tensor) -> Tensor:
    """``Q W^T``: the inner products of the rows of Q [J, n] with those of W [K, n], float64 [J, K]."""
    sums = torch.zeros(len(W), len(Q), dtype=torch.float64, device=W.device)
    for s in _slabs(W.shape[1]):
        (q, q_rest), (w, w_rest) = _tiled(_exact(Q[:, s])), _tiled(_exact(W[:, s]))
        sums += torch.bmm(w.transpose(0, 1), q.permute(1, 2, 0)).sum(0, dtype=torch.float64)
        sums += w_rest @ q_rest.T
    return sums.T


@_in_full
def subtract_(W: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """``W -= C^T Q`` in place, for W [K, n], Q [J, n] and C [J, K]. Returns ``|W_k|^2`` after it, float64 [K]."""
    squares = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    for s in _slabs(W.shape[1]):
        q = _exact(Q[:, s])
        w = W[:, s]
        w -= C.T.to(q.dtype) @ q
        squares += _row_dots(w, w)
    return squares


@_in_full
def rotate_(Q: Tensor, S: Tensor) -> None:
    """The first p rows of Q [J, n] become ``S^T Q`` in place, for S [J, p] on the device of Q or on the host."""
    S = S.to(Q.device)
    for s in _slabs(Q.shape[1]):
        q = _exact(Q[:, s])
        Q[: S.shape[1], s] = (S.T.to(q.dtype) @ q).to(Q.dtype)


@_in_full
def quadratic_forms(V: Tensor, HV: Tensor, slices: Sequence[slice]) -> Tensor:
    """``sum_i V[k, i] HV[k, i]`` over each slice, for V and HV [K, n]: float64 [K, T]."""
    sums = torch.zeros(len(V), len(slices), dtype=torch.float64, device=V.device)
    for t, whole in enumerate(slices):
        v, hv = V[:, whole], HV[:, whole]
        for s in _slabs(v.shape[1]):
            sums[:, t] += _row_dots(v[:, s], hv[:, s])
    return sums
