# SPDX-License-Identifier: Apache-2.0
"""The liq family in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference.layout import broadcast, finish, sum_to_scale


def liq_moments(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(w.dtype)
    scales = 1 if axis < 0 else w.shape[axis]
    count = w.numel() // max(scales, 1)
    wide = w.double()
    mean = sum_to_scale(wide, w, axis, 0, torch.float64) / max(count, 1)
    about = wide - broadcast(mean, w, axis, 0)
    std = (sum_to_scale(about * about, w, axis, 0, torch.float64) / max(count - 1, 1)).sqrt()
    return mean.to(compute), std.to(compute)


def _held(t: Tensor, eps: float) -> Tensor:
    return torch.where(t < eps, torch.full_like(t, eps), t)


def _code(w: Tensor, mean: Tensor, std: Tensor, clip: Tensor, levels: int, axis: int, eps: float):
    """u, q, the mask, and the divisors of u."""
    s, c = broadcast(_held(std, eps), w, axis, 0), _held(clip, eps)
    u = ((w.to(clip.dtype) - broadcast(mean, w, axis, 0)) / s) / c
    one = torch.ones_like(u)
    lifted = torch.where(u < -1, -one, u)
    clamped = torch.where(lifted > 1, one, lifted)
    count = torch.full((), levels, dtype=u.dtype, device=u.device)
    q = (2.0 * torch.round(((clamped + 1.0) * 0.5) * count)) / count - 1.0
    return u, q, (u >= -1) & (u <= 1), s, c


def liq(
    w: Tensor,
    mean: Tensor,
    std: Tensor,
    clip: Tensor,
    levels: int,
    axis: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _, q, _, _, c = _code(w, mean, std, clip, levels, axis, eps)
    return finish(c * q, w, 0, dtype)


def liq_bwd(
    gy: Tensor, w: Tensor, mean: Tensor, std: Tensor, clip: Tensor, levels: int, axis: int, eps: float
) -> tuple[Tensor, Tensor]:
    u, q, m, s, _ = _code(w, mean, std, clip, levels, axis, eps)
    g = gy.to(clip.dtype)
    gw = torch.where(m, g, torch.zeros_like(g)) / s
    gclip = (g * torch.where(m, q - u, q)).double().sum().to(clip.dtype)
    return finish(gw, w, 0, None), gclip


def liq_jvp(
    tw: Tensor | None,
    tclip: Tensor | None,
    w: Tensor,
    mean: Tensor,
    std: Tensor,
    clip: Tensor,
    levels: int,
    axis: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    u, q, m, s, _ = _code(w, mean, std, clip, levels, axis, eps)
    nothing = torch.zeros_like(u)
    through = torch.where(m, nothing if tw is None else tw.to(u.dtype), nothing) / s
    by_clip = torch.where(m, q - u, q) * (torch.zeros_like(clip) if tclip is None else tclip)
    return finish(through + by_clip, w, 0, dtype)
