# SPDX-License-Identifier: Apache-2.0
"""``liq`` with its moments, backward and tangent: csrc/math/liq.h operation by operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._channels import Sums, place, store_sums, tile_of
from ._common import divide, double_from_bits, load, program, round_even, run_tile, store
from ._launch import OPTIONS, Scales

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["rows", "columns", "steps", "chunks", "n", "inner", "channels", "levels", "eps_bits"]


@triton.jit(do_not_specialize=_RUNTIME)
def _liq_moment_kernel(
    sum_ptr, w_ptr, about_ptr, rows, columns, steps, chunks, inner, channels, SECOND: tl.constexpr,
    BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial sums of w, or of its squared distance from the mean."""
    width = columns * ALIGN
    chunk, line = place(chunks, WIDE)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    step = 0
    while step < steps:
        row, column, mask = tile_of(chunk * steps + step, line, rows, width, BY_ROWS, ROWS, COLUMNS)
        w = load(w_ptr, row[:, None] * width + column[None, :], mask, tl.float64, True)
        if SECOND:
            index = (row % channels)[:, None] if BY_ROWS else ((column // inner) % channels)[None, :]
            w = tl.where(mask, w - tl.load(about_ptr + index), 0.0)
            w = w * w
        sums += w
        step += 1
    store_sums(sum_ptr, sums, chunk, chunks, line, rows, width, BY_ROWS, ROWS, COLUMNS)


@triton.jit
def _block(
    y_ptr, sum_ptr, v_ptr, tclip_ptr, w_ptr, mean_ptr, std_ptr, clip_ptr, span, levels, eps,
    KIND: tl.constexpr, HAS_V: tl.constexpr, HAS_TCLIP: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = clip_ptr.dtype.element_ty
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    std, clip = tl.load(std_ptr + index), tl.load(clip_ptr)
    s, c = tl.where(std < eps, eps, std), tl.where(clip < eps, eps, clip)
    w = load(w_ptr, offsets, mask, dtype, MASKED)
    u = divide(divide(w - tl.load(mean_ptr + index), s), c)
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
            v = load(v_ptr, offsets, mask, dtype, MASKED)
        residual = tl.where(inside, q - u, q)
        y = divide(tl.where(inside, v, 0.0), s)
        if KIND == 1:
            share = tl.where(mask, v * residual, 0.0)
            tl.store(sum_ptr + tl.program_id(0), tl.sum(share.to(tl.float64)))
        else:
            if HAS_TCLIP:
                tclip = tl.load(tclip_ptr)
            else:
                tclip = tl.zeros_like(clip)
            y = y + residual * tclip
    store(y_ptr, offsets, y, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _liq_kernel(
    y_ptr, sum_ptr, v_ptr, tclip_ptr, w_ptr, mean_ptr, std_ptr, clip_ptr, n, inner, channels, levels, eps_bits,
    KIND: tl.constexpr, HAS_V: tl.constexpr, HAS_TCLIP: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """KIND 0: y. 1: the gradient of w, and a partial sum of that of clip. 2: the tangent of y."""
    eps = double_from_bits(eps_bits, clip_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    # Whole blocks carry no mask, so that their accesses are 16 bytes wide whatever n is.
    if start + BLOCK <= n:
        _block(y_ptr, sum_ptr, v_ptr, tclip_ptr, w_ptr, mean_ptr, std_ptr, clip_ptr, span, levels, eps,
               KIND, HAS_V, HAS_TCLIP, BLOCK, RUN, False)  # fmt: skip
    else:
        _block(y_ptr, sum_ptr, v_ptr, tclip_ptr, w_ptr, mean_ptr, std_ptr, clip_ptr, span, levels, eps,
               KIND, HAS_V, HAS_TCLIP, BLOCK, RUN, True)  # fmt: skip


def _programs(w):
    return triton.cdiv(w.numel(), _launch.block(w))


def _launch_liq(kind, y, sums, v, tclip, w, mean, std, clip, levels, axis, eps):
    scales, block = Scales.of(w, axis, 0), _launch.block(w)
    with _launch.on_device(w):
        _liq_kernel[(_programs(w),)](
            _launch.raw(y), clip if sums is None else sums, _launch.raw(w if v is None else v),
            clip if tclip is None else tclip, _launch.raw(w), mean.contiguous(), std.contiguous(), clip,
            w.numel(), scales.inner, scales.channels, levels, _launch.bits(eps), kind, v is not None,
            tclip is not None, block, scales.run(block), _launch.wide(w), **OPTIONS,
        )  # fmt: skip


def liq_moments(w: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    w = _launch.dense(w)
    compute = torch.float64 if w.dtype == torch.float64 else torch.float32
    shape = () if axis < 0 else (w.shape[axis],)
    if not w.numel():
        return tuple(torch.zeros(shape, dtype=compute, device=w.device) for _ in range(2))
    scales = Scales.of(w, axis, 0)
    sums, count, of_scales = Sums(scales, w), scales.outer * scales.inner, (scales.inner, scales.channels)
    part = sums.partials()
    with _launch.on_device(w):
        _liq_moment_kernel[sums.grid](
            part, _launch.raw(w), part[:0], *sums.layout, *of_scales, False, *sums.tile, **OPTIONS
        )
        mean = sums.join(part) / count
        _liq_moment_kernel[sums.grid](part, _launch.raw(w), mean, *sums.layout, *of_scales, True, *sums.tile, **OPTIONS)
        std = (sums.join(part) / max(count - 1, 1)).sqrt()
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
    sums = torch.empty(_programs(w), dtype=torch.float64, device=w.device)
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
