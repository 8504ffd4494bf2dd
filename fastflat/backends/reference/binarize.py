# SPDX-License-Identifier: Apache-2.0
"""The binarize family in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference.layout import blocked, broadcast, finish, sum_to_scale


def _sign(x: Tensor) -> Tensor:
    one = torch.ones_like(x)
    return torch.where(x < 0, -one, torch.where(x >= 0, one, x))


def _weighed(v: Tensor, h: Tensor | None, x: Tensor, group: int) -> Tensor:
    """h v, in the blocked shape of v."""
    return v if h is None else blocked(h.expand_as(x), group) * v


def _total(h: Tensor | None, x: Tensor, axis: int, group: int) -> Tensor:
    """sum h of each scale."""
    ones = torch.ones_like(blocked(x, group), dtype=torch.float64)
    return sum_to_scale(_weighed(ones, h, x, group), x, axis, group, torch.float64)


def _quotient(sum_: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(total == 0, torch.zeros_like(total), sum_ / total).to(dtype)


def _passed(v: Tensor, alpha: Tensor, data: Tensor, clip: float) -> Tensor:
    """The straight-through part."""
    return torch.where(data.abs() <= clip, v * alpha, torch.zeros_like(data))


def binarize(
    x: Tensor, h: Tensor | None, axis: int, group: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    data = blocked(x, group).to(compute)
    sum_ = sum_to_scale(_weighed(data.abs(), h, x, group), x, axis, group, torch.float64)
    alpha = _quotient(sum_, _total(h, x, axis, group), compute)
    return finish(_sign(data) * broadcast(alpha, x, axis, group), x, group, dtype), alpha


def binarize_bwd(
    gy: Tensor,
    ga: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    alpha: Tensor,
    clip: float,
    through_alpha: bool,
    axis: int,
    group: int,
) -> Tensor:
    compute = compute_dtype(x.dtype)
    data, g = (blocked(t, group).to(compute) for t in (x, gy))
    sign = _sign(data)
    gx = _passed(g, broadcast(alpha, x, axis, group), data, clip)
    if not through_alpha and ga is None:
        return finish(gx, x, group, None)
    total = _total(h, x, axis, group)
    sum_ = sum_to_scale(g * sign, x, axis, group, torch.float64) if through_alpha else torch.zeros_like(total)
    k = _quotient(sum_ if ga is None else sum_ + ga.double(), total, compute)
    return finish(gx + _weighed(sign, h, x, group) * broadcast(k, x, axis, group), x, group, None)


def binarize_jvp(
    tx: Tensor,
    x: Tensor,
    h: Tensor | None,
    alpha: Tensor,
    clip: float,
    through_alpha: bool,
    axis: int,
    group: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    data, t = (blocked(v, group).to(compute) for v in (x, tx))
    sign = _sign(data)
    sum_ = sum_to_scale(_weighed(sign, h, x, group) * t, x, axis, group, torch.float64)
    ta = _quotient(sum_, _total(h, x, axis, group), compute)
    ty = _passed(t, broadcast(alpha, x, axis, group), data, clip)
    if through_alpha:
        ty = ty + sign * broadcast(ta, x, axis, group)
    return finish(ty, x, group, dtype), ta
