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


def _odds(rate: Tensor, t: Tensor) -> Tensor:
    """exp(-x) of a bit sigmoid(x), as 2^u with u = rate t held within bounds."""
    f = _elementary._FORMATS[t.dtype]
    most, ln2 = (510.0, 0.6931471805599453) if t.dtype == torch.float64 else (62.0, 0.6931472)
    u = rate * t
    raised = torch.where(u < -most, torch.full_like(u, -most), u)
    held = torch.where(raised > most, torch.full_like(u, most), raised)
    shifted = held + f.magic
    r = (held - (shifted - f.magic)) * ln2
    e = 1.0 + (r + (r * r) * _elementary._horner(r, f.exp_tail))
    exponent = shifted.view(f.integer) - f.magic_bits
    return e * ((exponent + f.bias) << f.mantissa).view(t.dtype)


def _bits(p: Tensor, q: Tensor, rate: Tensor, hard: bool) -> tuple[Tensor, Tensor, Tensor]:
    """bit(p) - bit(q), and the derivatives of the two by beta p and beta q."""
    if hard:
        return _hard_bit(p) - _hard_bit(q), torch.zeros_like(p), torch.zeros_like(q)
    a, b = _odds(rate, p), _odds(rate, q)
    ua, ub = 1.0 + a, 1.0 + b
    inverse = torch.ones_like(a) / (ua * ub)
    first, second = inverse * ub, inverse * ua
    return (b - a) * inverse, (a * first) * first, (b * second) * second


def _rate(beta: Tensor) -> Tensor:
    return -(beta * _elementary._FORMATS[beta.dtype].log2_e)


def _levels(m: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full((), (1 << m.numel()) - 1, dtype=dtype, device=m.device)


def _planes(m: Tensor, scale: Tensor, beta: Tensor, hard_m: bool) -> _Planes:
    planes = m.numel()
    step = scale / _levels(m, scale.dtype)
    power = (1 << torch.arange(planes - 1, -1, -1, device=m.device)).to(m.dtype)
    odds = _odds(_rate(beta), m)
    soft = torch.ones_like(odds) / (1.0 + odds)
    weight = power * (_hard_bit(m) if hard_m else soft)
    by_mask = step * (power * (torch.zeros_like(m) if hard_m else beta * ((odds * soft) * soft)))
    return _Planes(weight, (step * weight) * beta, by_mask)


def _stored(w: Tensor, p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """w contiguous, in the storage type that the op promises."""
    return p.new_empty(p.shape[1:], dtype=dtype).copy_(w)


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
        difference, _, _ = _bits(p[b].to(compute), q[b].to(compute), _rate(beta), hard_w)
        sum_ = sum_ + shared.weight[b] * difference
    return _stored((scale / _levels(m, compute)) * sum_, p, dtype)


def bitplane_bwd(
    gw: Tensor, p: Tensor, q: Tensor, m: Tensor, scale: Tensor, beta: Tensor, hard_w: bool, hard_m: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = compute_dtype(p.dtype)
    shared = _planes(m, scale, beta, hard_m)
    g = gw.to(compute)
    gp, gq = (torch.empty_like(p, memory_format=torch.contiguous_format) for _ in range(2))
    sums = m.new_zeros(m.shape, dtype=torch.float64)
    for b in range(p.shape[0]):
        difference, by_first, by_second = _bits(p[b].to(compute), q[b].to(compute), _rate(beta), hard_w)
        sums[b] = (g * difference).double().sum()
        along = g * shared.slope[b]
        gp[b] = 0 if hard_w else along * by_first
        gq[b] = 0 if hard_w else -(along * by_second)
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
        difference, by_first, by_second = _bits(p[b].to(compute), q[b].to(compute), _rate(beta), hard_w)
        moved = lift[b] * difference
        if not hard_w:
            tp_b, tq_b = (nothing if t is None else t[b].to(compute) for t in (tp, tq))
            moved = shared.slope[b] * (by_first * tp_b - by_second * tq_b) + moved
        sum_ = sum_ + moved
    return _stored(sum_, p, dtype)
