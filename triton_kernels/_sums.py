# SPDX-License-Identifier: Apache-2.0
"""The backward pass with the gradients of scale and zero-point: one reading of the data, then a short second kernel.

Each program adds in the arithmetic type over its tiles, element by element and then across the tile in a fixed tree;
the second kernel adds the partial sums in fp64 in index order. A row that one program sees whole is finished at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import double_from_bits, load, program, store
from ._integer_grid import code, hold, limits, load_group, scale_share
from ._launch import OPTIONS, Plan, Scales


@triton.jit
def _gradients(gx_ptr, gy_ptr, x_ptr, offsets, mask, s, z, grid,
               RULES: tl.constexpr, HAS_ZERO: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Write gx of a tile; give its shares of the two sums, 0 where the mask is off."""
    x = load(x_ptr, offsets, mask, s.dtype, MASKED)
    gy = load(gy_ptr, offsets, mask, s.dtype, MASKED)
    u, d, m = code(x, s, z, grid, RULES, HAS_ZERO)
    store(gx_ptr, offsets, tl.where(m, gy, 0.0), mask, MASKED)
    share = scale_share(gy, u, d, m)
    outside = tl.where(m, 0.0, gy)
    if MASKED:
        share = tl.where(mask, share, 0.0)
        outside = tl.where(mask, outside, 0.0)
    return share, outside


@triton.jit
def _finish(gs_ptr, gz_ptr, at, gs, gz, s, factor, mask, HAS_ZERO: tl.constexpr):
    """Sums to gradients."""
    tl.store(gs_ptr + at, gs * factor, mask=mask)
    if HAS_ZERO:
        tl.store(gz_ptr + at, -(s * (gz * factor)), mask=mask)


_RUNTIME = ["rows", "columns", "row_stride", "inner", "channels", "steps", "chunks", "outer", "rest", "qmin", "qmax",
            "eps_bits", "factor_bits"]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_bwd_row_kernel(
    gx_ptr, gs_ptr, gz_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, columns, steps, qmin, qmax, eps_bits,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One scale for the whole tensor: program k takes `steps` blocks and leaves partial sum k."""
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    s, z = load_group(scale_ptr, zero_ptr, 0, grid, RULES, HAS_ZERO)
    share = tl.zeros([BLOCK], dtype=s.dtype)
    outside = tl.zeros([BLOCK], dtype=s.dtype)
    first = program(WIDE) * steps * BLOCK
    step = 0
    while step < steps:
        start = first + step * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < columns
        if start + BLOCK <= columns:
            a, b = _gradients(gx_ptr, gy_ptr, x_ptr, offsets, mask, s, z, grid, RULES, HAS_ZERO, False)
        else:
            a, b = _gradients(gx_ptr, gy_ptr, x_ptr, offsets, mask, s, z, grid, RULES, HAS_ZERO, True)
        share += a
        outside += b
        step += 1
    tl.store(gs_ptr + tl.program_id(0), tl.sum(share, 0))
    if HAS_ZERO:
        tl.store(gz_ptr + tl.program_id(0), tl.sum(outside, 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_bwd_rows_kernel(
    gx_ptr, gs_ptr, gz_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, rows, columns, channels, steps, chunks,
    qmin, qmax, eps_bits, factor_bits,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    DIRECT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A scale for each row (number modulo channels). `columns` counts in units of ALIGN, so that the compiler sees
    how rows are aligned. DIRECT: rows fit a tile and each is all of a scale."""
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    pid = program(WIDE)
    row = (pid // chunks) * ROWS + tl.arange(0, ROWS)
    s, z = load_group(scale_ptr, zero_ptr, (row % channels)[:, None], grid, RULES, HAS_ZERO)
    first = (pid % chunks) * steps * COLUMNS
    start = row[:, None] * (columns * ALIGN)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows)[:, None] & (column < columns * ALIGN)
    share, outside = _gradients(gx_ptr, gy_ptr, x_ptr, start + column, mask, s, z, grid, RULES, HAS_ZERO, True)
    if not DIRECT:
        step = 1
        while step < steps:
            column = (first + step * COLUMNS + tl.arange(0, COLUMNS))[None, :]
            mask = (row < rows)[:, None] & (column < columns * ALIGN)
            a, b = _gradients(gx_ptr, gy_ptr, x_ptr, start + column, mask, s, z, grid, RULES, HAS_ZERO, True)
            share += a
            outside += b
            step += 1
    gs, gz = tl.sum(share, 1), tl.sum(outside, 1)
    if DIRECT:
        factor = double_from_bits(factor_bits, s.dtype)
        held = hold(tl.load(scale_ptr + row % channels), grid[2])
        _finish(gs_ptr, gz_ptr, row, gs, gz, held, factor, row < rows, HAS_ZERO)
    else:
        at = row * chunks + pid % chunks
        tl.store(gs_ptr + at, gs, mask=row < rows)
        if HAS_ZERO:
            tl.store(gz_ptr + at, gz, mask=row < rows)


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_bwd_columns_kernel(
    gx_ptr, gs_ptr, gz_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, rows, columns, inner, channels, steps, chunks,
    qmin, qmax, eps_bits,
    RULES: tl.constexpr, HAS_ZERO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A scale for each `inner` neighbouring columns; `columns` in units of ALIGN as above."""
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    pid = program(WIDE)
    column = (pid // chunks) * COLUMNS + tl.arange(0, COLUMNS)
    s, z = load_group(scale_ptr, zero_ptr, ((column // inner) % channels)[None, :], grid, RULES, HAS_ZERO)
    inside = column < columns * ALIGN
    share = tl.zeros([ROWS, COLUMNS], dtype=s.dtype)
    outside = tl.zeros([ROWS, COLUMNS], dtype=s.dtype)
    first = (pid % chunks) * steps * ROWS
    step = 0
    while step < steps:
        row = first + step * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row[:, None] * (columns * ALIGN) + column[None, :]
        a, b = _gradients(gx_ptr, gy_ptr, x_ptr, offsets, mask, s, z, grid, RULES, HAS_ZERO, True)
        share += a
        outside += b
        step += 1
    at = (pid % chunks) * (columns * ALIGN) + column
    tl.store(gs_ptr + at, tl.sum(share, 0), mask=inside)
    if HAS_ZERO:
        tl.store(gz_ptr + at, tl.sum(outside, 0), mask=inside)


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_bwd_finish_kernel(
    gs_ptr, gz_ptr, gs_part_ptr, gz_part_ptr, scale_ptr, outer, channels, rest, eps_bits, factor_bits,
    HAS_ZERO: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial sums [outer, channels, rest] to gradients [channels]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    gs = tl.zeros([CHANNELS, PARTS], dtype=tl.float64)
    gz = tl.zeros([CHANNELS, PARTS], dtype=tl.float64)
    first = 0
    while first < outer * rest:
        part = first + tl.arange(0, PARTS)
        at = (part // rest * channels)[None, :] * rest + channel[:, None] * rest + (part % rest)[None, :]
        mask = present[:, None] & (part < outer * rest)[None, :]
        gs += tl.load(gs_part_ptr + at, mask=mask, other=0.0).to(tl.float64)
        if HAS_ZERO:
            gz += tl.load(gz_part_ptr + at, mask=mask, other=0.0).to(tl.float64)
        first += PARTS
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    factor = double_from_bits(factor_bits, dtype)
    s = hold(tl.load(scale_ptr + channel, mask=present, other=1.0), double_from_bits(eps_bits, dtype))
    _finish(gs_ptr, gz_ptr, channel, tl.sum(gs, 1).to(dtype), tl.sum(gz, 1).to(dtype), s, factor, present, HAS_ZERO)


def finish_tile(channels: int) -> tuple[int, int]:
    """Tile [channels, parts] of the kernels that join partial results."""
    return (1, _launch.BLOCK) if channels == 1 else (32, 32)


def join(
    gs: torch.Tensor, gz: torch.Tensor, gs_part: torch.Tensor, gz_part: torch.Tensor, scale: torch.Tensor,
    plan: Plan, scales: Scales, eps_bits: int, factor_bits: int, has_zero: bool,
) -> None:  # fmt: skip
    """Fill gs and, with a zero-point, gz from the partial sums of a plan."""
    tile = finish_tile(scales.channels)
    _fake_quantize_bwd_finish_kernel[(triton.cdiv(scales.channels, tile[0]),)](
        gs, gz, gs_part, gz_part, scale, plan.outer, scales.channels, plan.rest, eps_bits, factor_bits,
        has_zero, *tile, **OPTIONS,
    )  # fmt: skip


def backward(
    gx: torch.Tensor,
    gs: torch.Tensor,
    gz: torch.Tensor,
    gy: torch.Tensor,
    x: torch.Tensor,
    shared: tuple,
    scales: Scales,
    factor_bits: int,
    rules: int,
    has_zero: bool,
) -> None:
    """Fill gx, gs and gz; `shared` is (scale, zero_point, qmin, qmax, eps_bits) as the kernels take them."""
    plan = Plan.of(scales, _launch.vector(gx, gy, x), _launch.block(x))
    scale, zero, qmin, qmax, eps_bits = shared
    direct = plan.direct
    part = torch.empty(0 if direct else (1 + has_zero, plan.partials), dtype=scale.dtype, device=x.device)
    gs_out, gz_out = (gs, gz) if direct else (part[0], part[-1])
    data = (_launch.raw(gx), gs_out, gz_out, _launch.raw(gy), _launch.raw(x), scale, zero)
    tile = (plan.tile_rows, plan.tile_columns, plan.align)
    wide = _launch.wide(x)
    columns = plan.columns // plan.align
    if plan.rows == 1 and plan.by_rows:
        _fake_quantize_bwd_row_kernel[plan.grid](
            *data, plan.columns, plan.steps, qmin, qmax, eps_bits, rules, has_zero, plan.tile_columns, wide, **OPTIONS
        )
    elif plan.by_rows:
        _fake_quantize_bwd_rows_kernel[plan.grid](
            *data, plan.rows, columns, scales.channels, plan.steps, plan.chunks, qmin, qmax, eps_bits, factor_bits,
            rules, has_zero, *tile, direct, wide, **OPTIONS,
        )  # fmt: skip
    else:
        _fake_quantize_bwd_columns_kernel[plan.grid](
            *data, plan.rows, columns, scales.inner, scales.channels, plan.steps, plan.chunks, qmin, qmax, eps_bits,
            rules, has_zero, *tile, wide, **OPTIONS,
        )  # fmt: skip
    if not direct:
        join(gs, gz, gs_out, gz_out, scale, plan, scales, eps_bits, factor_bits, has_zero)
