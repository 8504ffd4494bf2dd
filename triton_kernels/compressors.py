# SPDX-License-Identifier: Apache-2.0
"""The ``compressors`` family: units of buckets, codes and residuals, sums of workers' codes, the largest elements.

Sums are formed in fp64 by parts of buckets, which are then added up; a program of the codes makes whole bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import divide, double_from_bits, magnitude_bits, magnitude_value, narrow, widen
from ._launch import OPTIONS
from ._noise import load_state, uniform_run

#: Elements of a tile, and tiles of a part of a bucket.
_TILE, _STEPS = 512, 8
_MEAN, _L2, _LARGEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _corrected(g, error, at, here, HAS_ERROR: tl.constexpr):
    p = widen(tl.load(g + at, mask=here, other=0))
    if HAS_ERROR:
        p += tl.load(error + at, mask=here, other=0.0)
    return p


@triton.jit
def _finite(v):
    """Neither NaN nor infinite: the exponent has a bit that is 0."""
    if v.dtype == tl.float64:
        return magnitude_bits(v) < 0x7FF0000000000000
    else:
        return magnitude_bits(v) < 0x7F800000


@triton.jit(do_not_specialize=["n", "bucket", "parts", "steps"])
def _sums_kernel(sums, squares, most, g, error, n, bucket, parts, steps, NORM: tl.constexpr, CLIPPED: tl.constexpr,
                 HAS_ERROR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    first = pid // parts * bucket
    begin = first + pid % parts * (steps * BLOCK)
    end = tl.minimum(tl.minimum(first + bucket, n), begin + steps * BLOCK)
    total, square = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    size = tl.zeros([BLOCK], tl.float64)
    while begin < end:
        at = begin + tl.arange(0, BLOCK)
        p = _corrected(g, error, at, at < end, HAS_ERROR)
        v = p.to(tl.float64)
        if NORM == _MEAN:
            total += tl.abs(v)
        elif NORM == _L2:
            square += v * v
        else:
            larger = magnitude_bits(v) > magnitude_bits(size)
            size = tl.where(larger, tl.abs(v), size)
            if CLIPPED:
                square += v * v
        begin += BLOCK
    tl.store(sums + pid, tl.sum(total, 0))
    tl.store(squares + pid, tl.sum(square, 0))
    tl.store(most + pid, magnitude_value(tl.max(magnitude_bits(size), 0)))


@triton.jit(do_not_specialize=["n", "bucket"])
def _encode_kernel(codes, g, error, units, state_ptr, n, bucket, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
                   HAS_ERROR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    PER: tl.constexpr = 8 // WIDTH
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    here = at < n
    p = _corrected(g, error, at, here, HAS_ERROR)
    unit = tl.load(units + at // bucket, mask=here, other=0.0)
    if LEVELS == 0:
        stored = tl.where(p < 0.0, 0, 1)
        c = stored * 2 - 1
    else:
        sound = (unit > 0.0) & _finite(unit)
        ratio = divide(tl.abs(p), tl.where(sound, unit, 1.0))
        a = tl.where(sound, tl.where(ratio < LEVELS, ratio, LEVELS), 0.0)
        whole = a.to(tl.int32)
        up = uniform_run(load_state(state_ptr), start, BLOCK).to(a.dtype) < a - whole.to(a.dtype)
        level = whole + up.to(tl.int32)
        c = tl.where(p < 0.0, -level, level)
        stored = c + LEVELS
    if HAS_ERROR:
        before = tl.load(error + at, mask=here, other=0.0)
        rest = p - unit * c.to(p.dtype)
        tl.store(error + at, tl.where(_finite(unit), rest, before), mask=here)
    stored = tl.where(here, stored, 0)
    shifted = tl.reshape(stored, [BLOCK // PER, PER]) << (tl.arange(0, PER) * WIDTH)[None, :]
    byte = tl.sum(shifted, 1)
    to = start // PER + tl.arange(0, BLOCK // PER)
    tl.store(codes + to, byte.to(tl.uint8), mask=to * PER < n)


@triton.jit(do_not_specialize=["n", "bucket", "buckets", "row", "workers", "levels", "factor_bits"])
def _decode_kernel(out, codes, units, n, bucket, buckets, row, workers, levels, factor_bits, WIDTH: tl.constexpr,
                   ADD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    PER: tl.constexpr = 8 // WIDTH
    C: tl.constexpr = units.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    total = tl.zeros([BLOCK], C)
    k = tl.program_id(0).to(tl.int64) * 0
    while k < workers:
        byte = tl.load(codes + k * row + at // PER, mask=here, other=0).to(tl.int32)
        stored = (byte >> ((at % PER) * WIDTH).to(tl.int32)) & ((1 << WIDTH) - 1)
        if WIDTH == 1:
            c = stored * 2 - 1
        else:
            c = stored - levels
        total += tl.load(units + k * buckets + at // bucket, mask=here, other=0.0) * c.to(C)
        k += 1
    total = total * double_from_bits(factor_bits, C)
    if ADD:
        total = widen(tl.load(out + at, mask=here, other=0)) + total
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["n"])
def _correct_kernel(keys, p_ptr, g, error, n, HAS_ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """p, and keys that grow with |p|: NaN above all, the first of equals above the others (not of fp64)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    p = _corrected(g, error, at, here, HAS_ERROR)
    key = magnitude_bits(p)
    if p.dtype == tl.float64:
        key = tl.where(p == p, key, 0x7FF8000000000000)
    else:
        key = (tl.where(p == p, key, 0x7FC00000).to(tl.int64) << 32) + (0x7FFFFFFF - at)
    tl.store(keys + at, key, mask=here)
    tl.store(p_ptr + at, p, mask=here)


@triton.jit(do_not_specialize=["k"])
def _take_kernel(values, p_ptr, indices, k, HAS_ERROR: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = number < k
    at = tl.load(indices + number, mask=here, other=0)
    p = tl.load(p_ptr + at, mask=here, other=0.0)
    sent = narrow(p, values.dtype.element_ty)
    tl.store(values + number, sent, mask=here)
    if HAS_ERROR:
        rest = p - widen(sent)
        tl.store(p_ptr + at, tl.where(_finite(rest), rest, 0.0), mask=here)


def _compute(g: torch.Tensor) -> torch.dtype:
    return torch.float64 if g.dtype == torch.float64 else torch.float32


def _tile(g: torch.Tensor) -> int:
    return _TILE // 2 if g.dtype == torch.float64 else _TILE


def compressors_units(
    g: torch.Tensor, error: torch.Tensor | None, norm: int, levels: int, bucket: int, clip: float
) -> torch.Tensor:
    g, n, tile = g.contiguous(), g.numel(), _tile(g)
    buckets, size = triton.cdiv(n, bucket), min(bucket, n)
    parts = triton.cdiv(size, tile * _STEPS)
    sums, squares, most = torch.empty((3, buckets, parts), dtype=torch.float64, device=g.device)
    if n:
        tensors = (sums, squares, most, _launch.raw(g), g if error is None else error)
        constants = (norm, clip > 0, error is not None, tile)
        with _launch.on_device(g):
            _sums_kernel[(buckets * parts,)](*tensors, n, bucket, parts, _STEPS, *constants, **OPTIONS)
    count = torch.full((buckets,), float(bucket), dtype=torch.float64, device=g.device)
    if n % bucket:
        count[-1] = n % bucket
    if norm == 0:
        found = sums.sum(1) / count
    elif norm == 1:
        found = squares.sum(1).sqrt()
    else:
        found = most.amax(1) if parts else count
        if clip > 0:
            limit = clip * (squares.sum(1) / count).sqrt()
            found = torch.where(found > limit, limit, found)
    return (found / max(levels, 1)).to(_compute(g))


def compressors_encode_(
    g: torch.Tensor,
    error: torch.Tensor | None,
    units: torch.Tensor,
    state: torch.Tensor | None,
    levels: int,
    bucket: int,
) -> torch.Tensor:
    g, n = g.contiguous(), g.numel()
    width = 1 if levels == 0 else 2 if levels == 1 else 4 if levels <= 7 else 8
    codes = torch.empty((n * width + 7) // 8, dtype=torch.uint8, device=g.device)
    if n:
        tensors = (codes, _launch.raw(g), g if error is None else error, units.contiguous())
        draws = units if state is None else state.contiguous()
        tile = _tile(g)
        constants = (levels, width, error is not None, tile)
        with _launch.on_device(g):
            _encode_kernel[(triton.cdiv(n, tile),)](*tensors, draws, n, bucket, *constants, **OPTIONS)
    return codes


def compressors_decode_(
    out: torch.Tensor,
    codes: torch.Tensor,
    units: torch.Tensor,
    levels: int,
    bucket: int,
    factor: float,
    add: bool,
) -> None:
    n, tile = out.numel(), _tile(out)
    if n == 0:
        return
    width = 1 if levels == 0 else 2 if levels == 1 else 4 if levels <= 7 else 8
    tensors = (_launch.raw(out), codes.contiguous(), units.contiguous())
    sizes = (n, bucket, triton.cdiv(n, bucket), codes.shape[1], len(codes), levels, _launch.bits(factor))
    with _launch.on_device(out):
        _decode_kernel[(triton.cdiv(n, tile),)](*tensors, *sizes, width, add, tile, **OPTIONS)


def compressors_topk_(g: torch.Tensor, error: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    g, n, tile = g.contiguous(), g.numel(), _tile(g)
    values = torch.empty(k, dtype=g.dtype, device=g.device)
    keys = torch.empty(n, dtype=torch.int64, device=g.device)
    p = torch.empty(n, dtype=_compute(g), device=g.device) if error is None else error
    with _launch.on_device(g):
        if n:
            tensors = (keys, p, _launch.raw(g), p)
            _correct_kernel[(triton.cdiv(n, tile),)](*tensors, n, error is not None, tile, **OPTIONS)
        if g.dtype == torch.float64:
            chosen = torch.sort(keys, descending=True, stable=True).indices[:k]
        else:
            chosen = torch.topk(keys, k, sorted=False).indices
        indices = chosen.sort().values.to(torch.int32)
        if k:
            grid = (triton.cdiv(k, tile),)
            _take_kernel[grid](_launch.raw(values), p, indices, k, error is not None, tile, **OPTIONS)
    return values, indices
