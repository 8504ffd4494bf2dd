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


def rademacher(
    K: int,
    n: int,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Signs -1 and +1 of equal probability, [K, n]: two numbers are drawn from the generator."""
    state = draw_state(device, generator)
    return kernels(state.device.type).vectors_rademacher(state, K, n, dtype)


def dots(Q: Tensor, W: Tensor) -> Tensor:
    """``Q W^T``: the inner products of the rows of Q [J, n] with those of W [K, n], float64 [J, K]. Q may be in
    bfloat16 beside float32 W."""
    return kernels(W.device.type).vectors_dot(Q.contiguous(), W.contiguous())


def subtract_(W: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """``W -= C^T Q`` in place, for contiguous W [K, n], Q [J, n] and C [J, K]. Returns ``|W_k|^2`` after it, float64
    [K]."""
    factors = C.to(W.device, torch.float64).contiguous()
    return kernels(W.device.type).vectors_subtract_(W, Q.contiguous(), factors)


def quadratic_forms(V: Tensor, HV: Tensor, slices: Sequence[slice]) -> Tensor:
    """``sum_i V[k, i] HV[k, i]`` over each slice, for V and HV [K, n]: float64 [K, T]. Slices ascend and do not
    overlap."""
    starts, columns = [0], []
    for s in slices:
        if s.start != starts[-1]:
            starts.append(s.start)
        columns.append(len(starts) - 1)
        starts.append(s.stop)
    forms = kernels(HV.device.type).vectors_quadratic(V.contiguous(), HV.contiguous(), starts)
    return forms if len(columns) == forms.shape[1] else forms[:, columns]
