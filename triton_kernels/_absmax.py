# SPDX-License-Identifier: Apache-2.0
"""The largest magnitude of each scale, and the scale it gives. Magnitudes are compared as integers: NaN wins, and the
result is the same in any order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._channels import place, tile_of
from ._common import divide, load, magnitude_bits, magnitude_value, program, store
from ._integer_grid import code, hold, limits
from ._launch import OPTIONS, Plan, Scales
from ._sums import finish_tile

_RUNTIME = ["rows", "columns", "inner", "channels", "steps", "chunks", "outer", "rest", "qmin", "qmax", "eps_bits"]


@triton.jit
def _scale_of(top, qmax):
    """Magnitude bits to scale: the largest magnitude lands on the highest code."""
    one = tl.full(qmax.shape, 1.0, qmax.dtype)
    return divide(magnitude_value(top), tl.where(qmax < one, one, qmax))


@triton.jit(do_not_specialize=_RUNTIME)
def _fake_quantize_absmax_fused_kernel(
    y_ptr, scale_ptr, x_ptr, rows, columns, qmin, qmax, eps_bits,
    RULES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A scale for each row, which stays in registers between its maximum and its quantization."""
    grid = limits(qmin, qmax, eps_bits, scale_ptr.dtype.element_ty)
    row = program(WIDE) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns * ALIGN)[None, :]
    offsets = row[:, None] * (columns * ALIGN) + column[None, :]
    x = load(x_ptr, offsets, mask, grid[2].dtype, True)
    scale = _scale_of(tl.max(magnitude_bits(x), 1), grid[1])
    tl.store(scale_ptr + row, scale, mask=row < rows)
    s = hold(scale, grid[2])[:, None]
    _, d, _ = code(x, s, s, grid, RULES, False)
    store(y_ptr, offsets, d * s, mask, True)


@triton.jit(do_not_specialize=_RUNTIME)
def _absmax_row_kernel(
    part_ptr, x_ptr, columns, steps, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """One scale for the whole tensor: program k takes `steps` blocks and leaves maximum k."""
    dtype: tl.constexpr = tl.float64 if part_ptr.dtype.element_ty == tl.int64 else tl.float32
    top = tl.zeros([BLOCK], dtype=part_ptr.dtype.element_ty)
    first = program(WIDE) * steps * BLOCK
    step = 0
    while step < steps:
        start = first + step * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < columns
        if start + BLOCK <= columns:
            bits = magnitude_bits(load(x_ptr, offsets, mask, dtype, False))
        else:
            bits = magnitude_bits(load(x_ptr, offsets, mask, dtype, True))
        top = tl.maximum(top, bits)
        step += 1
    tl.store(part_ptr + tl.program_id(0), tl.max(top, 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _absmax_tiles_kernel(
    part_ptr, x_ptr, rows, columns, steps, chunks,
    BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Maxima of chunks of rows [rows, chunks] or of columns [chunks, columns]; `columns` in units of ALIGN."""
    dtype: tl.constexpr = tl.float64 if part_ptr.dtype.element_ty == tl.int64 else tl.float32
    chunk, line = place(chunks, WIDE)
    width = columns * ALIGN
    top = tl.zeros([ROWS, COLUMNS], dtype=part_ptr.dtype.element_ty)
    step = 0
    while step < steps:
        row, column, mask = tile_of(chunk * steps + step, line, rows, width, BY_ROWS, ROWS, COLUMNS)
        bits = magnitude_bits(load(x_ptr, row[:, None] * width + column[None, :], mask, dtype, True))
        top = tl.maximum(top, bits)
        step += 1
    if BY_ROWS:
        row = line * ROWS + tl.arange(0, ROWS)
        tl.store(part_ptr + row * chunks + chunk, tl.max(top, 1), mask=row < rows)
    else:
        column = line * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(part_ptr + chunk * width + column, tl.max(top, 0), mask=column < width)


@triton.jit(do_not_specialize=_RUNTIME)
def _absmax_finish_kernel(
    scale_ptr, part_ptr, outer, channels, rest, qmax, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Maxima [outer, channels, rest] to scales [channels]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    top = tl.zeros([CHANNELS, PARTS], dtype=part_ptr.dtype.element_ty)
    first = 0
    while first < outer * rest:
        part = first + tl.arange(0, PARTS)
        at = (part // rest * channels)[None, :] * rest + channel[:, None] * rest + (part % rest)[None, :]
        mask = (channel < channels)[:, None] & (part < outer * rest)[None, :]
        top = tl.maximum(top, tl.load(part_ptr + at, mask=mask, other=0))
        first += PARTS
    scale = _scale_of(tl.max(top, 1), qmax.to(scale_ptr.dtype.element_ty))
    tl.store(scale_ptr + channel, scale, mask=channel < channels)


def fits(scales: Scales, block: int) -> bool:
    """Whether each scale is one row that a program can hold."""
    return scales.outer == 1 and scales.inner * _launch.BLOCK <= _launch.FUSED * block


def fused(
    y: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, scales: Scales, qmin: int, qmax: int, eps_bits: int,
    rules: int,
) -> None:  # fmt: skip
    """Fill scale and y in one pass over rows that fit."""
    columns = triton.next_power_of_2(scales.inner)
    rows = max(1, _launch.block(x) // columns)
    vector = _launch.vector(x, y)
    align = vector if scales.inner % vector == 0 else 1
    _fake_quantize_absmax_fused_kernel[(triton.cdiv(scales.channels, rows),)](
        _launch.raw(y), scale, _launch.raw(x), scales.channels, scales.inner // align, qmin, qmax, eps_bits,
        rules, rows, columns, align, _launch.wide(x), **OPTIONS,
    )  # fmt: skip


def scale_into(scale: torch.Tensor, x: torch.Tensor, scales: Scales, qmax: int) -> None:
    """Fill scale from all of x."""
    plan = Plan.of(scales, _launch.vector(x), _launch.block(x))
    part = torch.empty(
        plan.partials, dtype=torch.int64 if scale.dtype == torch.float64 else torch.int32, device=x.device
    )
    if plan.by_rows and plan.rows == 1:
        _absmax_row_kernel[plan.grid](
            part, _launch.raw(x), plan.columns, plan.steps, plan.tile_columns, _launch.wide(x), **OPTIONS
        )
    else:
        _absmax_tiles_kernel[plan.grid](
            part, _launch.raw(x), plan.rows, plan.columns // plan.align, plan.steps, plan.chunks,
            plan.by_rows, plan.tile_rows, plan.tile_columns, plan.align, _launch.wide(x), **OPTIONS,
        )  # fmt: skip
    tile = finish_tile(scales.channels)
    _absmax_finish_kernel[(triton.cdiv(scales.channels, tile[0]),)](
        scale, part, plan.outer, scales.channels, plan.rest, qmax, *tile, **OPTIONS
    )
