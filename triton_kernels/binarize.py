# SPDX-License-Identifier: Apache-2.0
"""``binarize`` with its backward and tangent: sums over channels, then a map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._channels import Sums, place, store_sums, tile_of
from ._common import double_from_bits, load, program, run_tile, store
from ._launch import OPTIONS, Scales

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["rows", "columns", "steps", "chunks", "n", "inner", "channels", "clip_bits"]


@triton.jit
def _sign(x):
    return tl.where(x < 0.0, -1.0, tl.where(x >= 0.0, 1.0, x)).to(x.dtype)


@triton.jit(do_not_specialize=_RUNTIME)
def _binarize_sums_kernel(
    sum_ptr, total_ptr, x_ptr, v_ptr, h_ptr, rows, columns, steps, chunks,
    HAS_V: tl.constexpr, HAS_H: tl.constexpr, WEIGH: tl.constexpr,
    BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial sums of |x| or sign(x) v, weighed by h on wish, and of h."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    width = columns * ALIGN
    chunk, line = place(chunks, WIDE)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    totals = tl.zeros([ROWS, COLUMNS], tl.float64)
    step = 0
    while step < steps:
        row, column, mask = tile_of(chunk * steps + step, line, rows, width, BY_ROWS, ROWS, COLUMNS)
        offsets = row[:, None] * width + column[None, :]
        x = load(x_ptr, offsets, mask, dtype, True)
        term = tl.abs(x)
        if HAS_V:
            term = _sign(x) * load(v_ptr, offsets, mask, dtype, True)
        if HAS_H:
            h = load(h_ptr, offsets, mask, dtype, True)
            totals += h.to(tl.float64)
            if WEIGH:
                term = h * term
        sums += term.to(tl.float64)
        step += 1
    store_sums(sum_ptr, sums, chunk, chunks, line, rows, width, BY_ROWS, ROWS, COLUMNS)
    if HAS_H:
        store_sums(total_ptr, totals, chunk, chunks, line, rows, width, BY_ROWS, ROWS, COLUMNS)


@triton.jit
def _map_block(
    y_ptr, v_ptr, x_ptr, h_ptr, alpha_ptr, k_ptr, span, clip,
    HAS_V: tl.constexpr, HAS_H: tl.constexpr, HAS_K: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = alpha_ptr.dtype.element_ty
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    x = load(x_ptr, offsets, mask, dtype, MASKED)
    alpha = tl.load(alpha_ptr + index)
    if HAS_V:
        v = load(v_ptr, offsets, mask, dtype, MASKED)
        y = tl.where(tl.abs(x) <= clip, v * alpha, 0.0)
        if HAS_K:
            share = _sign(x)
            if HAS_H:
                share = load(h_ptr, offsets, mask, dtype, MASKED) * share
            y = y + share * tl.load(k_ptr + index)
    else:
        y = _sign(x) * alpha
    store(y_ptr, offsets, y, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _binarize_map_kernel(
    y_ptr, v_ptr, x_ptr, h_ptr, alpha_ptr, k_ptr, n, inner, channels, clip_bits,
    HAS_V: tl.constexpr, HAS_H: tl.constexpr, HAS_K: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sign(x) alpha; with v the part straight through the sign, and with k the part through the scale."""
    clip = double_from_bits(clip_bits, alpha_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    # Whole blocks carry no mask, so that their accesses are 16 bytes wide whatever n is.
    if start + BLOCK <= n:
        _map_block(y_ptr, v_ptr, x_ptr, h_ptr, alpha_ptr, k_ptr, span, clip, HAS_V, HAS_H, HAS_K, BLOCK, RUN, False)
    else:
        _map_block(y_ptr, v_ptr, x_ptr, h_ptr, alpha_ptr, k_ptr, span, clip, HAS_V, HAS_H, HAS_K, BLOCK, RUN, True)


def _importance(h, x):
    return None if h is None else _launch.like(h.expand_as(x), x)


def _quotients(x, v, h, scales, shape, compute, weigh, with_sum=True, more=None):
    """For each channel the op's sum on wish, plus a cotangent of alpha, over sum h; 0 where that is 0."""
    absent = torch.empty(0, dtype=compute, device=x.device)
    if x.numel():
        sums = Sums(scales, x, *(t for t in (v, h) if t is not None))
        of_x, of_h = sums.partials(), sums.partials()
        _binarize_sums_kernel[sums.grid](
            of_x, of_h, _launch.raw(x), _launch.raw(x if v is None else v), absent if h is None else h, *sums.layout,
            v is not None, h is not None, weigh, *sums.tile, **OPTIONS,
        )  # fmt: skip
        sum_ = sums.join(of_x) if with_sum else torch.zeros(scales.channels, dtype=torch.float64, device=x.device)
        total = torch.full_like(sum_, scales.outer * scales.inner) if h is None else sums.join(of_h)
    else:
        sum_ = total = torch.zeros(scales.channels, dtype=torch.float64, device=x.device)
    if more is not None:
        sum_ = sum_ + more.reshape(-1).double()
    return torch.where(total == 0, 0.0, sum_ / total).to(compute).reshape(shape)


def _map(v, x, h, alpha, k, clip, scales, dtype):
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        block = _launch.block(x)
        _binarize_map_kernel[(triton.cdiv(x.numel(), block),)](
            _launch.raw(y), _launch.raw(x if v is None else v), _launch.raw(x), alpha if h is None else h,
            alpha, alpha if k is None else k, x.numel(), scales.inner, scales.channels, _launch.bits(clip),
            v is not None, h is not None, k is not None, block, scales.run(block), _launch.wide(x), **OPTIONS,
        )  # fmt: skip
    return y


def _compute(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def binarize(
    x: torch.Tensor, h: torch.Tensor | None, axis: int, group: int, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _launch.dense(x, group)
    scales, h = Scales.of(x, axis, group), _importance(h, x)
    shape = _launch.scale_shape(x, axis, group)
    with _launch.on_device(x):
        alpha = _quotients(x, None, h, scales, shape, _compute(x), True)
        return _map(None, x, None, alpha, None, 0.0, scales, dtype), alpha


def binarize_bwd(
    gy: torch.Tensor,
    ga: torch.Tensor | None,
    x: torch.Tensor,
    h: torch.Tensor | None,
    alpha: torch.Tensor,
    clip: float,
    through_alpha: bool,
    axis: int,
    group: int,
) -> torch.Tensor:
    x, alpha, k = _launch.dense(x, group), alpha.contiguous(), None
    gy, h, scales = _launch.like(gy, x), _importance(h, x), Scales.of(x, axis, group)
    with _launch.on_device(x):
        if through_alpha or ga is not None:
            k = _quotients(x, gy, h, scales, alpha.shape, alpha.dtype, False, through_alpha, ga)
        return _map(gy, x, h, alpha, k, clip, scales, None)


def binarize_jvp(
    tx: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    alpha: torch.Tensor,
    clip: float,
    through_alpha: bool,
    axis: int,
    group: int,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, alpha = _launch.dense(x, group), alpha.contiguous()
    tx, h, scales = _launch.like(tx, x), _importance(h, x), Scales.of(x, axis, group)
    with _launch.on_device(x):
        ta = _quotients(x, tx, h, scales, alpha.shape, alpha.dtype, True)
        return _map(tx, x, None, alpha, ta if through_alpha else None, clip, scales, dtype), ta
