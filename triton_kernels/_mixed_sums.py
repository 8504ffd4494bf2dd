# SPDX-License-Identifier: Apache-2.0
"""The backward pass of a mixture: one reading of the data for all candidates, then short kernels that join the sums.

A program takes one tile and leaves, for each candidate, a partial sum of each scale that it touches and one of the
weight: under a twentieth of the traffic, and no sum of any candidate has to stay in registers. Within a tile sums are
formed in a fixed tree in the arithmetic type; the second kernels add in fp64 in index order.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import load, program, store
from ._launch import OPTIONS, Plan, Scales
from ._mixture import candidate, epsilon, passed, scale_gradient, term
from ._sums import finish_tile

#: Tile of the columns form: rows enough to make partial sums few, columns enough for whole cache lines.
TILE_ROWS, TILE_COLUMNS = 64, 32

_RUNTIME = ["rows", "columns", "inner", "channels", "chunks", "candidates", "eps_bits", "outer", "rest", "programs"]


@triton.jit
def _gradient_block(
    gx_ptr, gs_ptr, gw_ptr, gy_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr,
    row, column, index, mask, rows, width, channels, chunk, chunks, candidates, eps,
    RULES: tl.constexpr, MOST: tl.constexpr, BY_ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets = row[:, None] * width + column[None, :]
    x = load(x_ptr, offsets, mask, eps.dtype, MASKED)
    gy = load(gy_ptr, offsets, mask, eps.dtype, MASKED)
    passing = tl.zeros_like(x)
    for j in tl.static_range(MOST):
        s, grid, w = candidate(scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, index, channels, j, candidates, eps)
        value, by_scale, m = term(x, s, grid, RULES)
        passing += tl.where(m, w, 0.0)
        of_scale, of_weight = gy * by_scale, gy * value
        if MASKED:
            of_scale, of_weight = tl.where(mask, of_scale, 0.0), tl.where(mask, of_weight, 0.0)
        present = j < candidates
        if BY_ROWS:
            at = (j * rows + row) * chunks + chunk
            tl.store(gs_ptr + at, tl.sum(of_scale, 1), mask=(row < rows) & present)
        else:
            at = (j * chunks + chunk) * width + column
            tl.store(gs_ptr + at, tl.sum(of_scale, 0), mask=(column < width) & present)
        tl.store(gw_ptr + j * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(of_weight, 1), 0), mask=present)
    store(gx_ptr, offsets, passed(gy, passing), mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _mixquant_bwd_kernel(
    gx_ptr, gs_ptr, gw_ptr, gy_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr,
    rows, columns, inner, channels, chunks, candidates, eps_bits,
    RULES: tl.constexpr, MOST: tl.constexpr, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the matrix [rows, columns * ALIGN]: a scale for each row (number modulo channels), or for each
    `inner` neighbouring columns. ALIGN shows the compiler how rows are aligned."""
    eps = epsilon(eps_bits, scale_ptr.dtype.element_ty)
    pid = program(WIDE)
    chunk, line = pid % chunks, pid // chunks
    first_row = (line if BY_ROWS else chunk) * ROWS
    first_column = (chunk if BY_ROWS else line) * COLUMNS
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    width = columns * ALIGN
    mask = (row < rows)[:, None] & (column < width)[None, :]
    if BY_ROWS:
        index = (row % channels)[:, None]
    else:
        index = ((column // inner) % channels)[None, :]
    # Whole tiles carry no mask, so that their accesses are wide.
    if (first_row + ROWS <= rows) & (first_column + COLUMNS <= width):
        _gradient_block(gx_ptr, gs_ptr, gw_ptr, gy_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr,
                        row, column, index, mask, rows, width, channels, chunk, chunks, candidates, eps,
                        RULES, MOST, BY_ROWS, False)  # fmt: skip
    else:
        _gradient_block(gx_ptr, gs_ptr, gw_ptr, gy_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr,
                        row, column, index, mask, rows, width, channels, chunk, chunks, candidates, eps,
                        RULES, MOST, BY_ROWS, True)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _mixquant_bwd_scale_kernel(
    gs_ptr, part_ptr, weight_ptr, factor_ptr, outer, channels, rest, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Partial sums [candidates, outer, channels, rest] to gradients [candidates, channels]."""
    j = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    base = part_ptr + j.to(tl.int64) * outer * channels * rest
    total = tl.zeros([CHANNELS, PARTS], dtype=tl.float64)
    first = 0
    while first < outer * rest:
        part = first + tl.arange(0, PARTS)
        at = (part // rest * channels)[None, :] * rest + channel[:, None] * rest + (part % rest)[None, :]
        mask = present[:, None] & (part < outer * rest)[None, :]
        total += tl.load(base + at, mask=mask, other=0.0).to(tl.float64)
        first += PARTS
    gradient = tl.sum(total, 1).to(gs_ptr.dtype.element_ty)
    gradient = scale_gradient(gradient, tl.load(weight_ptr + j), tl.load(factor_ptr + j))
    tl.store(gs_ptr + j.to(tl.int64) * channels + channel, gradient, mask=present)


@triton.jit(do_not_specialize=_RUNTIME)
def _mixquant_bwd_weight_kernel(gw_ptr, part_ptr, programs, PARTS: tl.constexpr):
    """Partial sums [candidates, programs] to gradients [candidates]."""
    j = tl.program_id(0)
    total = tl.zeros([PARTS], dtype=tl.float64)
    base = part_ptr + j.to(tl.int64) * programs
    first = 0
    while first < programs:
        part = first + tl.arange(0, PARTS)
        total += tl.load(base + part, mask=part < programs, other=0.0).to(tl.float64)
        first += PARTS
    tl.store(gw_ptr + j, tl.sum(total, 0).to(gw_ptr.dtype.element_ty))


def options(most: int, plan: Plan | None = None) -> dict:
    """Launch options. Twice the threads where four warps would run out of registers: with eight candidates, on the
    large tiles of the columns form, and in fp64, whose tiles are the small ones, where rows are not aligned."""
    tile = plan.tile_rows * plan.tile_columns if plan else _launch.BLOCK
    many = most == 8 or tile > _launch.BLOCK or (tile < _launch.BLOCK and plan.align == 1)
    return {**OPTIONS, "num_warps": 8} if many else OPTIONS


def plan_of(scales: Scales, vector: int, block: int) -> Plan:
    """The plan of the other reductions with one tile a program."""
    plan = Plan.of(scales, vector, block)
    if plan.by_rows:
        chunks = triton.cdiv(plan.columns, plan.tile_columns)
        return dataclasses.replace(plan, steps=1, chunks=chunks, rest=chunks)
    tile_rows = min(TILE_ROWS, triton.next_power_of_2(plan.rows))
    chunks = triton.cdiv(plan.rows, tile_rows)
    tile_columns = min(TILE_COLUMNS, triton.next_power_of_2(plan.columns))
    return dataclasses.replace(
        plan, tile_rows=tile_rows, tile_columns=tile_columns, steps=1, chunks=chunks, outer=chunks
    )


def backward(
    gx: torch.Tensor,
    gs: torch.Tensor,
    gw: torch.Tensor,
    gy: torch.Tensor,
    x: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    scales: Scales,
    eps_bits: int,
    rules: int,
) -> None:
    """Fill gx, gs and gw; `parameters` are scale, qmin, qmax, weight and factor, contiguous."""
    *mixture, factor = parameters
    scale, weight, count = mixture[0], mixture[-1], len(gw)
    plan = plan_of(scales, _launch.vector(gx, gy, x), _launch.block(x))
    most = triton.next_power_of_2(count)
    gs_part = torch.empty((count, plan.partials), dtype=scale.dtype, device=x.device)
    gw_part = torch.empty((count, *plan.grid), dtype=scale.dtype, device=x.device)
    _mixquant_bwd_kernel[plan.grid](
        _launch.raw(gx), gs_part, gw_part, _launch.raw(gy), _launch.raw(x), *mixture,
        plan.rows, plan.columns // plan.align, scales.inner, scales.channels, plan.chunks, count, eps_bits,
        rules, most, plan.by_rows, plan.tile_rows, plan.tile_columns, plan.align,
        _launch.wide(x), **options(most, plan),
    )  # fmt: skip
    tile = finish_tile(scales.channels)
    _mixquant_bwd_scale_kernel[(triton.cdiv(scales.channels, tile[0]), count)](
        gs, gs_part, weight, factor, plan.outer, scales.channels, plan.rest, *tile, **OPTIONS
    )
    _mixquant_bwd_weight_kernel[(count,)](gw, gw_part, gw_part.shape[1], _launch.BLOCK, **OPTIONS)
