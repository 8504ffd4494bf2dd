# SPDX-License-Identifier: Apache-2.0
"""``fake_quantize`` with its backward, tangent and dynamic form: the maps, and the functions that launch everything.

Maps walk the storage in blocks (:func:`_common.run_tile`). What adds or compares over the elements of a scale is in
:mod:`_sums` and :mod:`_absmax`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _absmax, _launch, _sums
from ._common import double_from_bits, load, program, run_tile, store
from ._integer_grid import code, limits, load_group
from ._launch import OPTIONS, Scales

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["n", "inner", "channels", "qmin", "qmax", "eps_bits", "factor_bits"]


@triton.jit
def _fake_quantize_block(
    y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    s, z = load_group(scale_ptr, zero_ptr, index, grid, RULES, HAS_ZERO)
    x = load(x_ptr, offsets, mask, s.dtype, MASKED)
    _, d, _ = code(x, s, z, grid, RULES, HAS_ZERO)
    store(y_ptr, offsets, d * s, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_kernel(
    y_ptr, x_ptr, scale_ptr, zero_ptr, n, inner, channels, qmin, qmax, eps_bits,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    # Whole blocks carry no mask, so that their accesses are 16 bytes wide whatever n is.
    if start + BLOCK <= n:
        _fake_quantize_block(y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, False)
    else:
        _fake_quantize_block(y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, True)


@triton.jit
def _tangent_block(
    y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, factor,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_TX: tl.constexpr, HAS_TS: tl.constexpr, HAS_TZ: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    s, z = load_group(scale_ptr, zero_ptr, index, grid, RULES, HAS_ZERO)
    x = load(x_ptr, offsets, mask, s.dtype, MASKED)
    u, d, m = code(x, s, z, grid, RULES, HAS_ZERO)
    # Absent tangents count as 0 and are multiplied like present ones: 0 times infinity must stay NaN.
    through, ts, tz = tl.zeros_like(x), factor * 0.0, factor * 0.0
    if HAS_TX:
        through = tl.where(m, load(tx_ptr, offsets, mask, s.dtype, MASKED), 0.0)
    if HAS_TS:
        ts = tl.load(ts_ptr + index) * factor
    if HAS_TZ:
        tz = tl.load(tz_ptr + index) * factor
    by_scale = tl.where(m, d - u, d) * ts
    by_zero = tl.where(m, 0.0, s * tz)
    store(y_ptr, offsets, (through + by_scale) - by_zero, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_jvp_kernel(
    y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, n, inner, channels, qmin, qmax, eps_bits, factor_bits,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_TX: tl.constexpr, HAS_TS: tl.constexpr, HAS_TZ: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    factor = double_from_bits(factor_bits, scale_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    if start + BLOCK <= n:
        _tangent_block(y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, factor,
                       RULES, HAS_ZERO, HAS_TX, HAS_TS, HAS_TZ, BLOCK, RUN, False)  # fmt: skip
    else:
        _tangent_block(y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, factor,
                       RULES, HAS_ZERO, HAS_TX, HAS_TS, HAS_TZ, BLOCK, RUN, True)  # fmt: skip


@triton.jit
def _pass_block(
    gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, span, grid,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    s, z = load_group(scale_ptr, zero_ptr, index, grid, RULES, HAS_ZERO)
    x = load(x_ptr, offsets, mask, s.dtype, MASKED)
    gy = load(gy_ptr, offsets, mask, s.dtype, MASKED)
    _, _, m = code(x, s, z, grid, RULES, HAS_ZERO)
    store(gx_ptr, offsets, tl.where(m, gy, 0.0), mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_pass_kernel(
    gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, n, inner, channels, qmin, qmax, eps_bits,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The backward pass that wants no gradient of the scale: a map."""
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    if start + BLOCK <= n:
        _pass_block(gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, False)
    else:
        _pass_block(gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, True)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    x = _launch.dense(x, group)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        scales, block = Scales.of(x, axis, group), _launch.block(x)
        with _launch.on_device(x):
            _fake_quantize_kernel[(triton.cdiv(x.numel(), block),)](
                _launch.raw(y), _launch.raw(x), *_launch.parameters(scale, zero_point),
                x.numel(), scales.inner, scales.channels, qmin, qmax, _launch.bits(eps),
                rules, zero_point is not None, block, scales.run(block), _launch.wide(x), **OPTIONS,
            )  # fmt: skip
    return y


def fake_quantize_bwd(
    gy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    need_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _launch.dense(x, group)
    gy = _launch.like(gy, x)
    gx = torch.empty_like(x)
    empty = x.numel() == 0
    gs = torch.zeros_like(scale, memory_format=torch.contiguous_format) if need_scale else scale.new_empty(0)
    gz = torch.zeros_like(gs) if need_scale and zero_point is not None else scale.new_empty(0)
    if empty:
        return gx, gs, gz
    scales, block = Scales.of(x, axis, group), _launch.block(x)
    shared = (*_launch.parameters(scale, zero_point), qmin, qmax, _launch.bits(eps))
    with _launch.on_device(x):
        if need_scale:
            _sums.backward(gx, gs, gz, gy, x, shared, scales, _launch.bits(factor), rules, zero_point is not None)
        else:
            scale_, zero_, *grid = shared
            _fake_quantize_pass_kernel[(triton.cdiv(x.numel(), block),)](
                _launch.raw(gx), _launch.raw(gy), _launch.raw(x), scale_, zero_,
                x.numel(), scales.inner, scales.channels, *grid,
                rules, zero_point is not None, block, scales.run(block), _launch.wide(x), **OPTIONS,
            )  # fmt: skip
    return gx, gs, gz


def fake_quantize_jvp(
    tx: torch.Tensor | None,
    ts: torch.Tensor | None,
    tz: torch.Tensor | None,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    x = _launch.dense(x, group)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return y
    scales, block = Scales.of(x, axis, group), _launch.block(x)
    scale, zero = _launch.parameters(scale, zero_point)
    # The pointer of an absent tangent is never read: any tensor stands in.
    tangents = (
        _launch.raw(x if tx is None else _launch.like(tx, x)),
        scale if ts is None else ts.contiguous(),
        scale if tz is None else tz.contiguous(),
    )
    with _launch.on_device(x):
        _fake_quantize_jvp_kernel[(triton.cdiv(x.numel(), block),)](
            _launch.raw(y), *tangents, _launch.raw(x), scale, zero,
            x.numel(), scales.inner, scales.channels, qmin, qmax, _launch.bits(eps), _launch.bits(factor),
            rules, zero_point is not None, tx is not None, ts is not None, tz is not None,
            block, scales.run(block), _launch.wide(x), **OPTIONS,
        )  # fmt: skip
    return y


def fake_quantize_absmax(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _launch.dense(x, group)
    scale = _launch.zero_scales(x, axis, group)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype), scale
    scales, block = Scales.of(x, axis, group), _launch.block(x)
    if _absmax.fits(scales, block):
        y = torch.empty_like(x, dtype=dtype)
        with _launch.on_device(x):
            _absmax.fused(y, scale, x, scales, qmin, qmax, _launch.bits(eps), rules)
        return y, scale
    with _launch.on_device(x):
        _absmax.scale_into(scale, x, scales, qmax)
    return fake_quantize(x, scale, None, qmin, qmax, axis, group, eps, rules, dtype), scale
