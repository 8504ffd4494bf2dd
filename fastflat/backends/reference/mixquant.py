# SPDX-License-Identifier: Apache-2.0
"""The mixquant family in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference.fake_quantize import _code, group_parameters
from fastflat.backends.reference.layout import blocked, broadcast, finish, sum_to_scale


def _weighted(v: Tensor, factor: Tensor) -> Tensor:
    """A term of a sum: v * factor, left out (-0) where the factor is 0."""
    return torch.where(factor == 0, torch.full_like(v, -0.0), v * factor)


def _passed(v: Tensor, passing: Tensor) -> Tensor:
    return torch.where(passing == 0, torch.zeros_like(v), v * passing)


def _terms(
    x: Tensor, scale: Tensor, qmin: Tensor, qmax: Tensor, axis: int, group: int, eps: float, rules: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Q_j(x), dQ_j/ds and the mask of each candidate."""
    data = blocked(x, group).to(compute_dtype(x.dtype))
    for s_j, lowest, highest in zip(scale, qmin, qmax, strict=True):
        g = group_parameters(s_j, None, 0, 0, eps, rules)
        g.s, g.inv = broadcast(g.s, x, axis, group), broadcast(g.inv, x, axis, group)
        u, d, m = _code(data, g, lowest, highest, rules)
        yield d * g.s, torch.where(m, d - u, d), m


def mixquant(
    x: Tensor,
    scale: Tensor,
    qmin: Tensor,
    qmax: Tensor,
    weight: Tensor,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    y = torch.full_like(blocked(x, group), -0.0, dtype=scale.dtype)
    for (value, _, _), w in zip(_terms(x, scale, qmin, qmax, axis, group, eps, rules), weight, strict=True):
        y = y + _weighted(value, w)
    return finish(y, x, group, dtype)


def mixquant_bwd(
    gy: Tensor,
    x: Tensor,
    scale: Tensor,
    qmin: Tensor,
    qmax: Tensor,
    weight: Tensor,
    factor: Tensor,
    axis: int,
    group: int,
    eps: float,
    rules: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gy = blocked(gy, group).to(scale.dtype)
    passing = torch.zeros_like(gy)
    gs, gw = [], []
    for (value, by_scale, m), w, f in zip(
        _terms(x, scale, qmin, qmax, axis, group, eps, rules), weight, factor, strict=True
    ):
        passing = passing + torch.where(m, w, torch.zeros_like(w))
        total = sum_to_scale(gy * by_scale, x, axis, group, scale.dtype)
        gs.append(torch.where(w == 0, torch.zeros_like(total), total * (w * f)))
        gw.append((gy * value).double().sum().to(scale.dtype))
    return finish(_passed(gy, passing), x, group, None), torch.stack(gs), torch.stack(gw)


def mixquant_jvp(
    tx: Tensor | None,
    ts: Tensor | None,
    tw: Tensor | None,
    x: Tensor,
    scale: Tensor,
    qmin: Tensor,
    qmax: Tensor,
    weight: Tensor,
    factor: Tensor,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    nothing = torch.zeros_like(blocked(x, group), dtype=scale.dtype)
    passing, rest = nothing, -nothing
    ts = torch.zeros_like(scale) if ts is None else ts
    tw = torch.zeros_like(weight) if tw is None else tw
    for j, (value, by_scale, m) in enumerate(_terms(x, scale, qmin, qmax, axis, group, eps, rules)):
        passing = passing + torch.where(m, weight[j], torch.zeros_like(weight[j]))
        rest = rest + _weighted(by_scale, broadcast(ts[j] * (weight[j] * factor[j]), x, axis, group))
        rest = rest + _weighted(value, tw[j])
    tx = nothing if tx is None else blocked(tx, group).to(scale.dtype)
    return finish(_passed(tx, passing) + rest, x, group, dtype)
