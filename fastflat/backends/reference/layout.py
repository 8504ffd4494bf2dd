# SPDX-License-Identifier: Apache-2.0
"""How scales meet data, for every family of the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def blocked(x: Tensor, group: int) -> Tensor:
    """x with its groups on an axis of their own."""
    return x.unflatten(-1, (x.shape[-1] // group, group)) if group else x


def broadcast(p: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """A per-scale tensor in the shape that multiplies the blocked x."""
    if group:
        return p.unsqueeze(-1)
    return p if axis < 0 else p.view([-1 if d == axis else 1 for d in range(x.dim())])


def finish(y: Tensor, x: Tensor, group: int, dtype: torch.dtype | None) -> Tensor:
    """y in the shape, strides and storage type that the op promises."""
    layout = torch.contiguous_format if group else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout).copy_(y.reshape(x.shape))


def sum_to_scale(t: Tensor, x: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    """Sum of t over the elements of each scale, in fp64, rounded once to dtype."""
    t = t.double()
    if group:
        return t.sum(-1).to(dtype)
    if axis < 0:
        return t.sum().to(dtype)
    return t.sum([d for d in range(x.dim()) if d != axis]).to(dtype) if x.dim() > 1 else t.to(dtype)
