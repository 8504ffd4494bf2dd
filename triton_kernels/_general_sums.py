# SPDX-License-Identifier: Apache-2.0
"""The backward pass of general_quantize with its sums: the gradients of scale and zero-point by the plan of
:mod:`_sums`, and that of delta, one scalar, from one partial sum a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _rules, _sums
from ._common import double_from_bits, load, program, store
from ._general_gradient import passed, scaled_by_error, shares
from ._general_grid import DELTA, ZERO, code, draws, general_limits, load_group, load_scalars
from ._integer_grid import hold
from ._launch import OPTIONS, Plan, Scales


@triton.jit
def _gradients(gx_ptr, gy_ptr, x_ptr, state_ptr, first, offsets, mask, group, scalars, grid,
               RULES: tl.constexpr, PRESENT: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Write gx of a tile; give its shares of the three sums, 0 where the mask is off. `first`, RUN: as in draws()."""
    storage: tl.constexpr = x_ptr.dtype.element_ty
    x = load(x_ptr, offsets, mask, group[0].dtype, MASKED)
    gy = load(gy_ptr, offsets, mask, x.dtype, MASKED)
    nu, a, delta = scalars
    xi = draws(state_ptr, first, offsets, x.dtype, RULES, RUN)
    u, d, e, m, _ = code(x, xi, group, (nu, a), grid, RULES, PRESENT, storage)
    straight = passed(gy, m, group, RULES, storage)
    gx, extra = scaled_by_error(straight, e, m, delta, PRESENT)
    store(gx_ptr, offsets, gx, mask, MASKED)
    of_scale, outside, of_delta = shares(gy, x, straight, extra, u, d, e, m, RULES, PRESENT)
    if MASKED:
        of_scale = tl.where(mask, of_scale, 0.0)
        outside = tl.where(mask, outside, 0.0)
        of_delta = tl.where(mask, of_delta, 0.0)
    return of_scale, outside, of_delta


@triton.jit
def _load_three(nu_ptr, a_ptr, delta_ptr, dtype: tl.constexpr, PRESENT: tl.constexpr):
    """The device scalars (nu, a, delta); an absent delta is never used."""
    nu, a = load_scalars(nu_ptr, a_ptr, dtype, PRESENT)
    delta = a
    if DELTA & PRESENT:
        delta = tl.load(delta_ptr).to(dtype)
    return nu, a, delta


_RUNTIME = ["rows", "columns", "inner", "channels", "steps", "chunks", "count", "qmin", "qmax", "eps_bits",
            "factor_bits"]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_bwd_row_kernel(
    gx_ptr, gs_ptr, gz_ptr, gd_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, nu_ptr, a_ptr, delta_ptr,
    columns, steps, qmin, qmax, eps_bits,
    RULES: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One scale for the whole tensor: program k takes `steps` blocks and leaves partial sum k."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    grid = general_limits(qmin, qmax, eps_bits, dtype, RULES)
    scalars = _load_three(nu_ptr, a_ptr, delta_ptr, dtype, PRESENT)
    group = load_group(scale_ptr, zero_ptr, 0, grid, RULES, PRESENT, x_ptr.dtype.element_ty)
    of_scale = tl.zeros([BLOCK], dtype=dtype)
    outside = tl.zeros([BLOCK], dtype=dtype)
    of_delta = tl.zeros([BLOCK], dtype=dtype)
    first = program(WIDE) * steps * BLOCK
    step = 0
    while step < steps:
        start = first + step * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < columns
        if start + BLOCK <= columns:
            p, q, r = _gradients(gx_ptr, gy_ptr, x_ptr, state_ptr, start, offsets, mask, group, scalars, grid,
                                 RULES, PRESENT, BLOCK, False)  # fmt: skip
        else:
            p, q, r = _gradients(gx_ptr, gy_ptr, x_ptr, state_ptr, start, offsets, mask, group, scalars, grid,
                                 RULES, PRESENT, BLOCK, True)  # fmt: skip
        of_scale += p
        outside += q
        of_delta += r
        step += 1
    tl.store(gs_ptr + tl.program_id(0), tl.sum(of_scale, 0))
    if ZERO & PRESENT:
        tl.store(gz_ptr + tl.program_id(0), tl.sum(outside, 0))
    if DELTA & PRESENT:
        tl.store(gd_ptr + tl.program_id(0), tl.sum(of_delta, 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_bwd_rows_kernel(
    gx_ptr, gs_ptr, gz_ptr, gd_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, nu_ptr, a_ptr, delta_ptr,
    rows, columns, channels, steps, chunks, qmin, qmax, eps_bits, factor_bits,
    RULES: tl.constexpr, PRESENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    RUN: tl.constexpr, DIRECT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A scale for each row (number modulo channels). `columns` counts in units of ALIGN, so that the compiler sees
    how rows are aligned. DIRECT: rows fit a tile and each is all of a scale. RUN: COLUMNS, or 0 where rows do not start
    at multiples of 8."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    grid = general_limits(qmin, qmax, eps_bits, dtype, RULES)
    scalars = _load_three(nu_ptr, a_ptr, delta_ptr, dtype, PRESENT)
    pid = program(WIDE)
    row = (pid // chunks) * ROWS + tl.arange(0, ROWS)
    group = load_group(scale_ptr, zero_ptr, (row % channels)[:, None], grid, RULES, PRESENT, x_ptr.dtype.element_ty)
    first = (pid % chunks) * steps * COLUMNS
    start = row[:, None] * (columns * ALIGN)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    mask = (row < rows)[:, None] & (column < columns * ALIGN)
    of_scale, outside, of_delta = _gradients(
        gx_ptr, gy_ptr, x_ptr, state_ptr, start + first, start + column, mask, group, scalars, grid,
        RULES, PRESENT, RUN, True,
    )  # fmt: skip
    if not DIRECT:
        step = 1
        while step < steps:
            here = first + step * COLUMNS
            column = (here + tl.arange(0, COLUMNS))[None, :]
            mask = (row < rows)[:, None] & (column < columns * ALIGN)
            p, q, r = _gradients(gx_ptr, gy_ptr, x_ptr, state_ptr, start + here, start + column, mask, group, scalars,
                                 grid, RULES, PRESENT, RUN, True)  # fmt: skip
            of_scale += p
            outside += q
            of_delta += r
            step += 1
    gs, gz = tl.sum(of_scale, 1), tl.sum(outside, 1)
    if DIRECT:
        factor = double_from_bits(factor_bits, dtype)
        tl.store(gs_ptr + row, gs * factor, mask=row < rows)
        if ZERO & PRESENT:
            held = hold(tl.load(scale_ptr + row % channels), grid[2])
            tl.store(gz_ptr + row, -(held * (gz * factor)), mask=row < rows)
    else:
        at = row * chunks + pid % chunks
        tl.store(gs_ptr + at, gs, mask=row < rows)
        if ZERO & PRESENT:
            tl.store(gz_ptr + at, gz, mask=row < rows)
    if DELTA & PRESENT:
        tl.store(gd_ptr + pid, tl.sum(tl.sum(of_delta, 1), 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_bwd_columns_kernel(
    gx_ptr, gs_ptr, gz_ptr, gd_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, nu_ptr, a_ptr, delta_ptr,
    rows, columns, inner, channels, steps, chunks, qmin, qmax, eps_bits,
    RULES: tl.constexpr, PRESENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A scale for each `inner` neighbouring columns; `columns` in units of ALIGN, RUN as above."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    grid = general_limits(qmin, qmax, eps_bits, dtype, RULES)
    scalars = _load_three(nu_ptr, a_ptr, delta_ptr, dtype, PRESENT)
    pid = program(WIDE)
    left = (pid // chunks) * COLUMNS
    column = left + tl.arange(0, COLUMNS)
    index = ((column // inner) % channels)[None, :]
    group = load_group(scale_ptr, zero_ptr, index, grid, RULES, PRESENT, x_ptr.dtype.element_ty)
    inside = column < columns * ALIGN
    of_scale = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    outside = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    of_delta = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    first = (pid % chunks) * steps * ROWS
    step = 0
    while step < steps:
        row = first + step * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        start = row[:, None] * (columns * ALIGN)
        p, q, r = _gradients(gx_ptr, gy_ptr, x_ptr, state_ptr, start + left, start + column[None, :], mask, group,
                             scalars, grid, RULES, PRESENT, RUN, True)  # fmt: skip
        of_scale += p
        outside += q
        of_delta += r
        step += 1
    at = (pid % chunks) * (columns * ALIGN) + column
    tl.store(gs_ptr + at, tl.sum(of_scale, 0), mask=inside)
    if ZERO & PRESENT:
        tl.store(gz_ptr + at, tl.sum(outside, 0), mask=inside)
    if DELTA & PRESENT:
        tl.store(gd_ptr + pid, tl.sum(tl.sum(of_delta, 1), 0))


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_delta_kernel(gd_ptr, part_ptr, count, PARTS: tl.constexpr):
    """Partial sums [count] to the gradient of delta."""
    gd = tl.zeros([PARTS], dtype=tl.float64)
    first = 0
    while first < count:
        part = first + tl.arange(0, PARTS)
        gd += tl.load(part_ptr + part, mask=part < count, other=0.0).to(tl.float64)
        first += PARTS
    tl.store(gd_ptr, tl.sum(gd, 0).to(gd_ptr.dtype.element_ty))


def backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    gy: torch.Tensor,
    x: torch.Tensor,
    parameters: tuple,
    grid: tuple[int, int, int],
    scales: Scales,
    factor_bits: int,
    rules: int,
    present: int,
) -> None:
    """Fill (gx, gs, gz, gd), of which empty ones are not wanted. `parameters` is (scale, zero_point, state, nu, a,
    delta) and `grid` (qmin, qmax, eps_bits), as the kernels take them."""
    gx, gs, gz, gd = gradients
    scale = parameters[0]
    plan = Plan.of(scales, _launch.vector(gx, gy, x), _launch.block(x))
    wanted, zero = gs.numel() > 0, bool(present & ZERO.value)
    direct = wanted and plan.direct
    part = torch.empty(0 if direct else (1 + zero, plan.partials), dtype=scale.dtype, device=x.device)
    gs_out, gz_out = (gs, gz) if direct else (part[0], part[-1])
    gd_out = scale.new_empty(plan.grid if present & DELTA.value else 0)
    data = (_launch.raw(gx), gs_out, gz_out, gd_out, _launch.raw(gy), _launch.raw(x), *parameters)
    run = plan.tile_columns if plan.columns % 8 == 0 and plan.tile_columns % 8 == 0 else 0
    tile = (plan.tile_rows, plan.tile_columns, plan.align, run)
    columns, wide = plan.columns // plan.align, _launch.wide(x)
    # A draw for each element by itself takes registers that the sums need.
    options = OPTIONS if run or not rules & _rules.DRAWS.value else {**OPTIONS, "num_warps": 8}
    if plan.rows == 1 and plan.by_rows:
        tile = max(plan.tile_columns, 8)  # a run of draws
        _general_quantize_bwd_row_kernel[plan.grid](
            *data, plan.columns, plan.steps, *grid, rules, present, tile, wide, **OPTIONS
        )
    elif plan.by_rows:
        _general_quantize_bwd_rows_kernel[plan.grid](
            *data, plan.rows, columns, scales.channels, plan.steps, plan.chunks, *grid, factor_bits,
            rules, present, *tile, direct, wide, **options,
        )  # fmt: skip
    else:
        _general_quantize_bwd_columns_kernel[plan.grid](
            *data, plan.rows, columns, scales.inner, scales.channels, plan.steps, plan.chunks, *grid,
            rules, present, *tile, wide, **options,
        )  # fmt: skip
    if wanted and not direct:
        _sums.join(gs, gz, gs_out, gz_out, scale, plan, scales, grid[2], factor_bits, zero)
    if gd.numel():
        _general_quantize_delta_kernel[(1,)](gd, gd_out, gd_out.numel(), _launch.BLOCK, **OPTIONS)
