# SPDX-License-Identifier: Apache-2.0
"""The bitplane family in plain PyTorch, plane by plane."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference import _elementary


class _Planes(NamedTuple):
    """What the elements of each plane share; the fields of csrc/math's Plane, an entry a plane."""

    weight: Tensor
    slope: Tensor
    by_mask: Tensor


def _hard_bit(t: Tensor) -> Tensor:
    one, nothing = torch.ones_like(t), torch.zeros_like(t)
    return torch.where(t > 0, one, torch.where(t <= 0, nothing, t))


def _bit(t: Tensor, beta: Tensor, hard: bool) -> tuple[Tensor, Tensor]:
    """A bit and its derivative by beta t."""
    if hard:
        return _hard_bit(t), torch.zeros_like(t)
    x = beta * t
    e = _elementary.exp(-x.abs())
    below, above = e / (1.0 + e), torch.ones_like(e) / (1.0 + e)
    return torch.where(x < 0, below, above), below * above


def _levels(m: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full((), (1 << m.numel()) - 1, dtype=dtype, device=m.device)


def _planes(m: Tensor, scale: Tensor, beta: Tensor, hard_m: bool) -> _Planes:
    planes = m.numel()
    step = scale / _levels(m, scale.dtype)
    power = (1 << torch.arange(planes - 1, -1, -1, device=m.device)).to(m.dtype)
    value, slope = _bit(m, beta, hard_m)
    weight = power * value
    by_mask = step * (power * (slope if hard_m else beta * slope))
    return _Planes(weight, (step * weight) * beta, by_mask)


def bitplane(
    p: Tensor,
    q: Tensor,
    m: Tensor,
    scale: Tensor,
    beta: Tensor,
    hard_w: bool,
    hard_m: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    compute = compute_dtype(p.dtype)
    shared = _planes(m, scale, beta, hard_m)
    sum_ = p.new_zeros(p.shape[1:], dtype=compute)
    for b in range(p.shape[0]):
        first, second = (_bit(t[b].to(compute), beta, hard_w)[0] for t in (p, q))
        sum_ = sum_ + shared.weight[b] * (first - second)
    return ((scale / _levels(m, compute)) * sum_).to(dtype or p.dtype)


def bitplane_bwd(
    gw: Tensor, p: Tensor, q: Tensor, m: Tensor, scale: Tensor, beta: Tensor, hard_w: bool, hard_m: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = compute_dtype(p.dtype)
    shared = _planes(m, scale, beta, hard_m)
    g = gw.to(compute)
    gp, gq = (torch.empty_like(p, memory_format=torch.contiguous_format) for _ in range(2))
    sums = m.new_zeros(m.shape, dtype=torch.float64)
    for b in range(p.shape[0]):
        first, second = (_bit(t[b].to(compute), beta, hard_w) for t in (p, q))
        sums[b] = (g * (first[0] - second[0])).double().sum()
        along = g * shared.slope[b]
        gp[b] = 0 if hard_w else along * first[1]
        gq[b] = 0 if hard_w else -(along * second[1])
    gm = torch.zeros_like(m) if hard_m else shared.by_mask * sums.to(compute)
    gs = (shared.weight.double() * sums).sum().to(compute) / _levels(m, compute)
    return gp, gq, gm, gs


def bitplane_jvp(
    tp: Tensor | None,
    tq: Tensor | None,
    tm: Tensor | None,
    ts: Tensor | None,
    p: Tensor,
    q: Tensor,
    m: Tensor,
    scale: Tensor,
    beta: Tensor,
    hard_w: bool,
    hard_m: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    compute = compute_dtype(p.dtype)
    shared = _planes(m, scale, beta, hard_m)
    tm = torch.zeros_like(m) if tm is None else tm
    ts = torch.zeros_like(scale) if ts is None else ts
    lift = shared.by_mask * tm + shared.weight * (ts / _levels(m, compute))
    nothing = p.new_zeros((), dtype=compute)
    sum_ = p.new_zeros(p.shape[1:], dtype=compute)
    for b in range(p.shape[0]):
        first, second = (_bit(t[b].to(compute), beta, hard_w) for t in (p, q))
        moved = lift[b] * (first[0] - second[0])
        if not hard_w:
            tp_b, tq_b = (nothing if t is None else t[b].to(compute) for t in (tp, tq))
            moved = shared.slope[b] * (first[1] * tp_b - second[1] * tq_b) + moved
        sum_ = sum_ + moved
    return sum_.to(dtype or p.dtype)
