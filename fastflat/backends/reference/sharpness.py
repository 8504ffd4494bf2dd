# SPDX-License-Identifier: Apache-2.0
"""The sharpness family in plain PyTorch, tensor by tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops.sharpness import METRICS, SUM_PAIR, SUM_SCALED
from fastflat.backends.reference import _elementary
from fastflat.backends.reference._lists import Writer, computed, kept, of_each, rounded

_LARGEST = torch.finfo(torch.float64).max


def sharpness_sums(gs: list[Tensor], others: list[Tensor], kind: list[int], eta: float) -> Tensor:
    rows = []
    for t, g in enumerate(gs):
        first = g.double()
        nothing = first.new_zeros(())
        if of_each(kind, t) == SUM_PAIR:
            second = others[t].double()
            rows += [(first * first).sum(), (first * second).sum(), (second * second).sum()]
        elif of_each(kind, t) == SUM_SCALED:
            scaled = (others[t].double().abs() + eta) * first
            rows += [(scaled * scaled).sum(), nothing, nothing]
        else:
            rows += [(first * first).sum(), nothing, nothing]
    return torch.stack(rows).view(-1, 3) if rows else torch.zeros(0, 3, dtype=torch.float64)


def sharpness_scale(sums: Tensor, rho: Tensor, eps: float, linf: bool) -> Tensor:
    norm = _elementary.sqrt(sums[:, 0].sum())
    usable = norm <= _LARGEST
    if linf:
        scale = torch.where(usable, rho, torch.zeros_like(rho))
    else:
        scale = torch.where(usable & (norm > 0), rho / (norm + eps), torch.zeros_like(rho))
    return torch.cat((scale, norm.view(1), (~usable).to(norm.dtype).view(1)))


def sharpness_ascent_(
    ws: list[Tensor],
    gs: list[Tensor],
    outs: list[Tensor],
    backup: Tensor | None,
    at: list[int],
    scale: Tensor,
    metric: list[int],
    eta: float,
    state: Tensor | None = None,
) -> None:
    writer = Writer(state)
    for t, w in enumerate(ws):
        value = computed(w)
        g = gs[t].to(value.dtype)
        s = rounded(scale[t], w)
        if of_each(metric, t) == METRICS["scaled"]:
            size = value.abs() + torch.full((), eta, dtype=value.dtype, device=w.device)
            e = s * ((size * size) * g)
        elif of_each(metric, t) == METRICS["linf"]:
            e = s * torch.where(g > 0, torch.ones_like(g), torch.where(g < 0, -torch.ones_like(g), g))
        else:
            e = s * g
        risen = torch.where(s == 0, value, value + e)
        if backup is not None:
            kept(backup, at[t], w).copy_(w)
        writer.write(risen, outs[t] if outs else w)
        writer.next(w.numel())
