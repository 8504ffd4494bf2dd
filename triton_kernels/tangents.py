# SPDX-License-Identifier: Apache-2.0
"""The ``tangents`` family: a program keeps what it reads of the primals and walks through the tangents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._channels import tile_of
from ._common import load, program, store
from ._elementary import normal, sigmoid, tanh
from ._launch import OPTIONS, Plan, Scales

#: Tangents whose sums a program forms at once, by the bytes of an element: those of a pack fit the registers.
_VECTORS = {2: 2, 4: 4, 8: 4}
#: Programs to aim at where a primal is short, and least tangents of each.
_PROGRAMS, _LEAST = 1024, 4

# TERMS holds a bit for each part of the combination: 1 t0, 2 t1, 4 f0, 8 f1, 16 shift, 32 mask. A factor is absent (0),
# a primal (1) or a number of channels (2).


@triton.jit
def _held(z):
    raised = tl.where(z < -1000.0, -1000.0, z)
    return tl.where(raised > 1000.0, 1000.0, raised)


@triton.jit
def _factors(p, g, KIND: tl.constexpr):
    """phi'(p) and phi''(p) g (csrc/math/tangents.h)."""
    if KIND == 1:
        return p * (1.0 - p), g * (1.0 - (p + p))
    elif KIND == 2:
        return 1.0 - p * p, (-2.0 * g) * p
    elif KIND == 3:
        z = _held(p)
        s = sigmoid(z)
        rest = 1.0 - s
        return s * (1.0 + z * rest), ((s * rest) * (2.0 + z * (1.0 - (s + s)))) * g
    elif KIND == 4:
        z = _held(p)
        below, density = normal(z)
        return below + z * density, (density * (2.0 - z * z)) * g
    elif KIND == 5:
        z = _held(p)
        c = tl.full(z.shape, 0.7978845608028654, z.dtype)
        square = z * z
        t = tanh(c * (z + 0.044715 * (square * z)))
        q = 1.0 - t * t
        half = 0.5 * z
        first = c * (1.0 + 0.134145 * square)
        second = (0.26829 * c) * z
        slope = 0.5 * (1.0 + t) + (half * q) * first
        bend = q * first + half * (q * second - ((2.0 * t) * q) * (first * first))
        return slope, bend * g
    else:
        return tl.where(p <= 0.0, 0.0, 1.0).to(p.dtype), g


@triton.jit
def _factor(ptr, offsets, valid, channel, C: tl.constexpr, WHAT: tl.constexpr, MASKED: tl.constexpr):
    """A primal, or the numbers of channels."""
    if WHAT == 2:
        return tl.load(ptr + channel)
    else:
        return load(ptr, offsets, valid, C, MASKED)


@triton.jit
def _combine_tile(
    y_ptr, t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, offsets, n, channel, channels, k, until,
    TERMS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    valid = offsets < n
    if P0:
        a0 = _factor(p0, offsets, valid, channel, C, P0, MASKED)
    if P1:
        a1 = _factor(p1, offsets, valid, channel, C, P1, MASKED)
    if KIND:
        if P1:
            a0, a1 = _factors(a0, a1, KIND)
        else:
            a0, _unused = _factors(a0, a0, KIND)
    if TERMS & 4:
        of_f0 = load(f0, offsets, valid, C, MASKED)
    if TERMS & 8:
        of_f1 = load(f1, offsets, valid, C, MASKED)
    if TERMS & 32:
        of_mask = load(mask, offsets, valid, C, MASKED)
    while k < until:
        row = k.to(tl.int64) * n
        number = k.to(tl.int64) * channels + channel
        if TERMS & 1:
            v = load(t0 + row, offsets, valid, C, MASKED)
            if P0:
                v = a0 * v
        if TERMS & 2:
            x = load(t1 + row, offsets, valid, C, MASKED)
            if P1:
                x = a1 * x
            if TERMS & 1:
                v = v + x
            else:
                v = x
        if TERMS & 4:
            x = of_f0 * tl.load(r0 + number)
            if TERMS & 3:
                v = v + x
            else:
                v = x
        if TERMS & 8:
            v = v + of_f1 * tl.load(r1 + number)
        if TERMS & 16:
            v = v + tl.load(shift + number)
        if TERMS & 32:
            v = v * of_mask
        store(y_ptr + row, offsets, v, valid, MASKED)
        k += 1


@triton.jit(do_not_specialize=["units", "count", "channels", "inner", "splits"])
def _combine_kernel(
    y_ptr, t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, units, count, channels, inner, splits,
    TERMS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    ONE: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the primals and a share of the tangents. A primal has units * ALIGN elements, which tells the compiler
    where its accesses may be wide; with ONE a tile lies within a channel."""
    C: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = program(WIDE)
    if WIDE:
        n = units.to(tl.int64) * ALIGN
    else:
        n = units * ALIGN
    start = pid // splits * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    share = tl.cdiv(count, splits)
    k = (pid % splits).to(tl.int32) * share
    until = tl.minimum(count, k + share)
    if ONE:
        channel = start // inner % channels
    else:
        channel = offsets // inner % channels
    if start + BLOCK <= n:
        _combine_tile(y_ptr, t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, offsets, n, channel, channels, k, until,
                      TERMS, P0, P1, KIND, C, False)  # fmt: skip
    else:
        _combine_tile(y_ptr, t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, offsets, n, channel, channels, k, until,
                      TERMS, P0, P1, KIND, C, True)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "units", "steps", "chunks", "count", "partials"])
def _sums_kernel(
    mapped, dots, totals, t0, p0, t1, p1, mask, rows, units, steps, chunks, count, partials,
    BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    VECTORS: tl.constexpr, DOTS: tl.constexpr, SECOND: tl.constexpr, MAPPED: tl.constexpr, TOTALS: tl.constexpr,
):  # fmt: skip
    """Some tangents over some tiles of a line of the matrix [rows, columns]; neighbouring programs share a line."""
    C: tl.constexpr = tl.float64 if t0.dtype.element_ty == tl.float64 else tl.float32
    columns = units * ALIGN
    n = rows.to(tl.int64) * columns
    groups = tl.cdiv(count, VECTORS)
    k = tl.program_id(0) % groups * VECTORS + tl.arange(0, VECTORS)
    pid = program(WIDE) // groups
    chunk, line = pid % chunks, pid // chunks
    base = k.to(tl.int64)[:, None, None] * n
    held = (k < count)[:, None, None]
    dot = tl.zeros([VECTORS, ROWS, COLUMNS], C)
    total = tl.zeros([VECTORS, ROWS, COLUMNS], C)
    step = 0
    while step < steps:
        row, column, inside = tile_of(chunk * steps + step, line, rows, columns, BY_ROWS, ROWS, COLUMNS)
        at = row[None, :, None] * columns + column[None, None, :]
        valid = held & inside[None, :, :]
        t = load(t0 + base, at, valid, C, True)
        if DOTS:
            term = t * load(p0, at, inside[None, :, :], C, True)
            if SECOND:
                term = term + load(t1 + base, at, valid, C, True) * load(p1, at, inside[None, :, :], C, True)
            dot += term
        if TOTALS:
            total += t
        if MAPPED:
            store(mapped + base, at, t * load(mask, at, inside[None, :, :], C, True), valid, True)
        step += 1
    place_of = k.to(tl.int64)[:, None] * partials
    if BY_ROWS:
        line_of = line * ROWS + tl.arange(0, ROWS)[None, :]
        to = place_of + line_of * chunks + chunk
        kept = (k < count)[:, None] & (line_of < rows)
        axis: tl.constexpr = 2
    else:
        line_of = line * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        to = place_of + chunk * columns + line_of
        kept = (k < count)[:, None] & (line_of < columns)
        axis: tl.constexpr = 1
    if DOTS:
        tl.store(dots + to, tl.sum(dot, axis), mask=kept)
    if TOTALS:
        tl.store(totals + to, tl.sum(total, axis), mask=kept)


def _what(p: torch.Tensor | None) -> int:
    return 0 if p is None else 2 if p.dim() == 1 else 1


def tangents_combine(
    t0: torch.Tensor | None,
    p0: torch.Tensor | None,
    t1: torch.Tensor | None,
    p1: torch.Tensor | None,
    f0: torch.Tensor | None,
    r0: torch.Tensor | None,
    f1: torch.Tensor | None,
    r1: torch.Tensor | None,
    shift: torch.Tensor | None,
    mask: torch.Tensor | None,
    kind: int,
) -> torch.Tensor:
    like = next(t for t in (t0, t1, f0) if t is not None)
    count, (_, channels, inner) = len(like if like is not f0 else r0), like.shape[-3:]
    out = like.new_empty((count, *like.shape[-3:]))
    if not out.numel():
        return out
    n = out[0].numel()
    terms = sum(1 << k for k, t in enumerate((t0, t1, f0, f1, shift, mask)) if t is not None)
    if not any(t is not None for t in (r0, shift)) and 2 not in (_what(p0), _what(p1)):
        channels, inner = 1, n
    block = _launch.block(out)
    align = _launch.vector(out)
    align = align if n % align == 0 else 1
    tiles = triton.cdiv(n, block)
    splits = triton.cdiv(count, triton.cdiv(count, min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(count, _LEAST))))
    wide = n * splits > _launch._NARROW_LIMIT
    # The pointer of what is absent is never read.
    tensors = [_launch.raw(out if t is None else t) for t in (t0, p0, t1, p1, f0, r0, f1, r1, shift, mask)]
    with _launch.on_device(out):
        _combine_kernel[(tiles * splits,)](
            _launch.raw(out), *tensors, n // align, count, channels, inner, splits, terms, _what(p0), _what(p1), kind,
            block, channels == 1 or inner % block == 0, align, wide, **OPTIONS,
        )  # fmt: skip
    return out


def tangents_sums(
    t0: torch.Tensor,
    p0: torch.Tensor | None,
    t1: torch.Tensor | None,
    p1: torch.Tensor | None,
    mask: torch.Tensor | None,
    total: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, outer, channels, inner = t0.shape
    wide = torch.float64 if t0.dtype == torch.float64 else torch.float32
    mapped = t0.new_empty(t0.shape if mask is not None else 0)
    wanted = (p0 is not None, total)
    if not t0.numel():
        return mapped, *(t0.new_zeros((count, channels) if w else 0, dtype=wide) for w in wanted)
    vectors = 1 if count == 1 else _VECTORS[t0.element_size()]
    scales = Scales(1, 1, outer * inner) if channels == 1 else Scales(outer, channels, inner)
    plan = Plan.of(scales, _launch.vector(t0), _launch.block(t0) // vectors)
    partials = [t0.new_empty((count, plan.partials) if w else 0, dtype=wide) for w in wanted]
    tensors = [_launch.raw(t0 if t is None else t) for t in (t0, p0, t1, p1, mask)]
    with _launch.on_device(t0):
        _sums_kernel[(plan.grid[0] * triton.cdiv(count, vectors),)](
            _launch.raw(mapped), *partials, *tensors, plan.rows, plan.columns // plan.align, plan.steps, plan.chunks,
            count, plan.partials, plan.by_rows, plan.tile_rows, plan.tile_columns, plan.align, _launch.wide(t0),
            vectors, p0 is not None, t1 is not None, mask is not None, bool(total), **OPTIONS,
        )  # fmt: skip
    shape = (count, plan.outer, scales.channels, plan.rest)
    sums = [p.view(shape).sum((1, 3), dtype=torch.float64).to(wide) if p.numel() else p for p in partials]
    return mapped, *sums
