# SPDX-License-Identifier: Apache-2.0
"""``liq`` with its moments, backward and tangent: csrc/math/liq.h operation by operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._channels import channel_tile, grid_of, partials
from ._common import divide, double_from_bits, load, round_even, store
from ._launch import BLOCK, OPTIONS, Scales

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["count", "inner", "channels", "chunks", "levels", "eps_bits"]


@triton.jit(do_not_specialize=_RUNTIME)
def _liq_moment_kernel(
    sum_ptr, w_ptr, about_ptr, count, inner, channels, chunks, SECOND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Partial sums of w, or of its squared distance from the mean."""
    channel, offsets, mask = channel_tile(count, inner, channels, chunks, BLOCK)
    w = load(w_ptr, offsets, mask, tl.float64, True)
    if SECOND:
        w = tl.where(mask, w - tl.load(about_ptr + channel), 0.0)
        w = w * w
    tl.store(sum_ptr + tl.program_id(0), tl.sum(w, 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _liq_kernel(
    y_ptr, sum_ptr, v_ptr, tclip_ptr, w_ptr, mean_ptr, std_ptr, clip_ptr, count, inner, channels, chunks, levels,
    eps_bits, KIND: tl.constexpr, HAS_V: tl.constexpr, HAS_TCLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KIND 0: y. 1: the gradient of w, and a partial sum of that of clip. 2: the tangent of y."""
    channel, offsets, mask = channel_tile(count, inner, channels, chunks, BLOCK)
    dtype: tl.constexpr = clip_ptr.dtype.element_ty
    eps = double_from_bits(eps_bits, dtype)
    std, clip = tl.load(std_ptr + channel), tl.load(clip_ptr)
    s, c = tl.where(std < eps, eps, std), tl.where(clip < eps, eps, clip)
    w = load(w_ptr, offsets, mask, dtype, True)
    u = divide(divide(w - tl.load(mean_ptr + channel), s), c)
    lifted = tl.where(u < -1.0, -1.0, u)
    clamped = tl.where(lifted > 1.0, 1.0, lifted)
    top = levels.to(dtype)
    q = divide(2.0 * round_even(((clamped + 1.0) * 0.5) * top), top) - 1.0
    inside = (u >= -1.0) & (u <= 1.0)
    if KIND == 0:
        y = c * q
    else:
        v = tl.zeros_like(w)
        if HAS_V:
            v = load(v_ptr, offsets, mask, dtype, True)
        residual = tl.where(inside, q - u, q)
        y = divide(tl.where(inside, v, 0.0), s)
        if KIND == 1:
            share = tl.where(mask, v * residual, 0.0)
            tl.store(sum_ptr + tl.program_id(0), tl.sum(share.to(tl.float64), 0))
        else:
            if HAS_TCLIP:
                tclip = tl.load(tclip_ptr)
            else:
                tclip = tl.zeros_like(clip)
            y = y + residual * tclip
    store(y_ptr, offsets, y, mask, True)


def _launch_liq(kind, y, sums, v, tclip, w, mean, std, clip, levels, axis, eps):
    grid, layout = grid_of(Scales.of(w, axis, 0))
    with _launch.on_device(w):
        _liq_kernel[grid](
            _launch.raw(y), clip if sums is None else sums, _launch.raw(w if v is None else v),
            clip if tclip is None else tclip, _launch.raw(w), mean.contiguous(), std.contiguous(), clip,
            *layout, levels, _launch.bits(eps), kind, v is not None, tclip is not None, BLOCK, **OPTIONS,
        )  # fmt: skip


def liq_moments(w: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    w = _launch.dense(w)
    compute = torch.float64 if w.dtype == torch.float64 else torch.float32
    shape = () if axis < 0 else (w.shape[axis],)
    if not w.numel():
        return tuple(torch.zeros(shape, dtype=compute, device=w.device) for _ in range(2))
    grid, layout = grid_of(Scales.of(w, axis, 0))
    sums = partials(w, layout)
    with _launch.on_device(w):
        _liq_moment_kernel[grid](sums, _launch.raw(w), sums, *layout, False, BLOCK, **OPTIONS)
        mean = sums.sum(1) / layout[0]
        _liq_moment_kernel[grid](sums, _launch.raw(w), mean, *layout, True, BLOCK, **OPTIONS)
        std = (sums.sum(1) / max(layout[0] - 1, 1)).sqrt()
    return mean.to(compute).reshape(shape), std.to(compute).reshape(shape)


def liq(
    w: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    clip: torch.Tensor,
    levels: int,
    axis: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    w = _launch.dense(w)
    y = torch.empty_like(w, dtype=dtype)
    if w.numel():
        _launch_liq(0, y, None, None, None, w, mean, std, clip, levels, axis, eps)
    return y


def liq_bwd(
    gy: torch.Tensor,
    w: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    clip: torch.Tensor,
    levels: int,
    axis: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    w = _launch.dense(w)
    gw = torch.empty_like(w)
    if not w.numel():
        return gw, torch.zeros_like(clip)
    sums = partials(w, grid_of(Scales.of(w, axis, 0))[1])
    _launch_liq(1, gw, sums, _launch.like(gy, w), None, w, mean, std, clip, levels, axis, eps)
    return gw, sums.sum().to(clip.dtype)


def liq_jvp(
    tw: torch.Tensor | None,
    tclip: torch.Tensor | None,
    w: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    clip: torch.Tensor,
    levels: int,
    axis: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    w = _launch.dense(w)
    ty = torch.empty_like(w, dtype=dtype)
    if w.numel():
        tw = None if tw is None else _launch.like(tw, w)
        _launch_liq(2, ty, None, tw, tclip, w, mean, std, clip, levels, axis, eps)
    return ty
