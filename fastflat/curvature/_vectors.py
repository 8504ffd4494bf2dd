# SPDX-License-Identifier: Apache-2.0
"""The vector primitives of the estimators, by the backend in force: K vectors of n numbers are the rows of a [K, n].

Sums are formed in float64, in an order that depends on shapes and types alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflat.backends import kernels
from fastflat.functional import draw_state

#: Columns that a rotation works on at once: what it allocates is no wider.
_SLAB = 65536


def rademacher(
    K: int,
    n: int,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Signs -1 and +1 of equal probability, [K, n]: two numbers are drawn from the generator for each row, so that
    rows do not depend on how many are drawn at once."""
    states = [draw_state(device, generator) for _ in range(K)]
    rows = [kernels(state.device.type).vectors_rademacher(state, 1, n, dtype) for state in states]
    return torch.cat(rows) if rows else torch.empty(0, n, dtype=dtype, device=device)


def dots(Q: Tensor, W: Tensor) -> Tensor:
    """``Q W^T``: the inner products of the rows of Q [J, n] with those of W [K, n], float64 [J, K]. Q may be in
    bfloat16 beside float32 W."""
    return kernels(W.device.type).vectors_dot(Q.contiguous(), W.contiguous())


def subtract_(W: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """``W -= C^T Q`` in place, for contiguous W [K, n], Q [J, n] and C [J, K]. Returns ``|W_k|^2`` after it, float64
    [K]."""
    factors = C.to(W.device, torch.float64).contiguous()
    return kernels(W.device.type).vectors_subtract_(W, Q.contiguous(), factors)


def rotate_(Q: Tensor, S: Tensor) -> None:
    """The first p rows of Q [J, n] become ``S^T Q`` in place, for S [J, p] on the device of Q or on the host."""
    S = S.to(Q.device)
    # In float64 where the user let float32 products round to TF32 or bfloat16.
    exact = Q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    with torch.autocast(Q.device.type, enabled=False):
        for start in range(0, Q.shape[1], _SLAB):
            q = Q[:, start : start + _SLAB]
            wide = q.double() if exact else q
            q[: S.shape[1]] = (S.T.to(wide.dtype) @ wide).to(q.dtype)


def quadratic_forms(V: Tensor, HV: Tensor, slices: Sequence[slice]) -> Tensor:
    """``sum_i V[k, i] HV[k, i]`` over each slice, for V and HV [K, n]: float64 [K, T]. One pass where the slices ascend
    without overlap."""
    form = kernels(HV.device.type).vectors_quadratic
    v, hv = V.contiguous(), HV.contiguous()
    found, starts, columns = [], [0], []
    for start, stop, _ in (s.indices(V.shape[1]) for s in slices):
        if start < starts[-1]:
            found.append(form(v, hv, starts)[:, columns])
            starts, columns = [0], []
        if start != starts[-1]:
            starts.append(start)
        columns.append(len(starts) - 1)
        starts.append(stop)
    found.append(form(v, hv, starts)[:, columns])
    return torch.cat(found, 1)
