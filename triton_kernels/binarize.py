# SPDX-License-Identifier: Apache-2.0
"""``binarize`` with its backward and tangent: sums over channels, then a map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._channels import channel_tile, grid_of, partials
from ._common import double_from_bits, load, store
from ._launch import BLOCK, OPTIONS, Scales

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["count", "inner", "channels", "chunks", "clip_bits"]


@triton.jit
def _sign(x):
    return tl.where(x < 0.0, -1.0, tl.where(x >= 0.0, 1.0, x)).to(x.dtype)


@triton.jit(do_not_specialize=_RUNTIME)
def _binarize_sums_kernel(
    sum_ptr, total_ptr, x_ptr, v_ptr, h_ptr, count, inner, channels, chunks,
    HAS_V: tl.constexpr, HAS_H: tl.constexpr, WEIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of |x| or sign(x) v, weighed by h on wish, and of h."""
    _, offsets, mask = channel_tile(count, inner, channels, chunks, BLOCK)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    x = load(x_ptr, offsets, mask, dtype, True)
    term = tl.abs(x)
    if HAS_V:
        term = _sign(x) * load(v_ptr, offsets, mask, dtype, True)
    if HAS_H:
        h = load(h_ptr, offsets, mask, dtype, True)
        tl.store(total_ptr + tl.program_id(0), tl.sum(h.to(tl.float64), 0))
        if WEIGH:
            term = h * term
    tl.store(sum_ptr + tl.program_id(0), tl.sum(term.to(tl.float64), 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _binarize_map_kernel(
    y_ptr, v_ptr, x_ptr, h_ptr, alpha_ptr, k_ptr, count, inner, channels, chunks, clip_bits,
    HAS_V: tl.constexpr, HAS_H: tl.constexpr, HAS_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sign(x) alpha; with v the part straight through the sign, and with k the part through the scale."""
    channel, offsets, mask = channel_tile(count, inner, channels, chunks, BLOCK)
    dtype: tl.constexpr = alpha_ptr.dtype.element_ty
    x = load(x_ptr, offsets, mask, dtype, True)
    alpha = tl.load(alpha_ptr + channel)
    if HAS_V:
        v = load(v_ptr, offsets, mask, dtype, True)
        y = tl.where(tl.abs(x) <= double_from_bits(clip_bits, dtype), v * alpha, 0.0)
        if HAS_K:
            share = _sign(x)
            if HAS_H:
                share = load(h_ptr, offsets, mask, dtype, True) * share
            y = y + share * tl.load(k_ptr + channel)
    else:
        y = _sign(x) * alpha
    store(y_ptr, offsets, y, mask, True)


def _importance(h, x):
    return None if h is None else _launch.like(h.expand_as(x), x)


def _quotients(x, v, h, scales, shape, compute, weigh, with_sum=True, more=None):
    """For each channel the op's sum on wish, plus a cotangent of alpha, over sum h; 0 where that is 0."""
    grid, layout = grid_of(scales)
    sums, totals = partials(x, layout), partials(x, layout)
    place = torch.empty(0, dtype=compute, device=x.device) if h is None else h
    if x.numel():
        _binarize_sums_kernel[grid](
            sums, totals, _launch.raw(x), _launch.raw(x if v is None else v), place, *layout,
            v is not None, h is not None, weigh, BLOCK, **OPTIONS,
        )  # fmt: skip
    sum_ = sums.sum(1)
    if not with_sum:
        sum_ = torch.zeros_like(sum_)
    total = torch.full_like(sum_, layout[0]) if h is None else totals.sum(1)
    if more is not None:
        sum_ = sum_ + more.reshape(-1).double()
    return torch.where(total == 0, 0.0, sum_ / total).to(compute).reshape(shape)


def _map(v, x, h, alpha, k, clip, scales, dtype):
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        grid, layout = grid_of(scales)
        _binarize_map_kernel[grid](
            _launch.raw(y), _launch.raw(x if v is None else v), _launch.raw(x), alpha if h is None else h,
            alpha, alpha if k is None else k, *layout, _launch.bits(clip),
            v is not None, h is not None, k is not None, BLOCK, **OPTIONS,
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
