# SPDX-License-Identifier: Apache-2.0
"""The ``weight_norms`` family: moments and norms of weight matrices, and the saturating nonlinearity."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import divide, narrow, square_root, widen
from ._elementary import tanh
from ._launch import OPTIONS

#: Elements of a tile; columns of a tile that adds up columns, and rows that a program adds up at most.
_TILE, _COLUMNS, _ROWS = 512, 64, 512


@triton.jit
def _fetch(pointer, at, here):
    return widen(tl.load(pointer + at, mask=here, other=0))


@triton.jit(do_not_specialize=["O", "I"])
def _rows_kernel(moments, row_l1, most, count, w, O, I, BLOCK: tl.constexpr):  # noqa: E741, as the literature has it
    """A program a row, which it passes over three times."""
    row = tl.program_id(0).to(tl.int64)
    at, base = tl.arange(0, BLOCK), row * I
    C: tl.constexpr = moments.dtype.element_ty
    values, sizes = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], C)
    begin = row * 0
    while begin < I:
        v = _fetch(w, base + begin + at, begin + at < I)
        size = tl.where(v < 0.0, -v, v)
        values += v.to(tl.float64)
        sizes += size.to(tl.float64)
        largest = tl.where(size > largest, size, largest)
        begin += BLOCK
    n = (row * 0 + I).to(tl.float64)
    mean = (tl.sum(values, 0) / n).to(C)
    top = tl.max(largest, 0)
    squares, cubes = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    equal = tl.zeros([BLOCK], tl.int32)
    begin = row * 0
    while begin < I:
        here = begin + at < I
        v = _fetch(w, base + begin + at, here)
        d = v - mean
        squares += tl.where(here, (d * d).to(tl.float64), 0.0)
        cubes += tl.where(here, ((d * d) * d).to(tl.float64), 0.0)
        equal += tl.where(here & (tl.where(v < 0.0, -v, v) == top), 1, 0)
        begin += BLOCK
    m2, m3 = (tl.sum(squares, 0) / n).to(C), (tl.sum(cubes, 0) / n).to(C)
    root = m2 * square_root(m2)
    tl.store(moments + row, mean)
    tl.store(moments + O + row, m2)
    tl.store(moments + 2 * O + row, tl.where(m2 == 0.0, 0.0, divide(m3, tl.where(m2 == 0.0, 1.0, root))))
    tl.store(row_l1 + row, tl.sum(sizes, 0).to(C))
    tl.store(most + row, top)
    tl.store(count + row, tl.sum(equal, 0).to(tl.int64))


@triton.jit(do_not_specialize=["O", "I", "rows"])
def _columns_kernel(partial, w, O, I, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: E741
    """Sums of the magnitudes of some columns over some rows, fp64 [parts, I]."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(I, COLUMNS)
    part, columns = pid // tiles, (pid % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = part * rows
    last = tl.minimum(row + rows, O)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    while row < last:
        r = row + tl.arange(0, ROWS)[:, None]
        v = _fetch(w, r * I + columns, (r < last) & (columns < I))
        sums += tl.where(v < 0.0, -v, v).to(tl.float64)
        row += ROWS
    tl.store(partial + part * I + columns, tl.sum(sums, 0, keep_dims=True), mask=columns < I)


@triton.jit(do_not_specialize=["O", "I"])
def _rows_bwd_kernel(gw, g_moments, g_row, g_col, of_most, w, moments, absmax, O, I, BLOCK: tl.constexpr):  # noqa: E741
    row = tl.program_id(0).to(tl.int64)
    at, base = tl.arange(0, BLOCK), row * I
    C: tl.constexpr = moments.dtype.element_ty
    mean, var, skew = tl.load(moments + row), tl.load(moments + O + row), tl.load(moments + 2 * O + row)
    g_mean, g_var, g_skew = tl.load(g_moments + row), tl.load(g_moments + O + row), tl.load(g_moments + 2 * O + row)
    spread = var != 0.0
    held = tl.where(spread, var, 1.0)
    by_root = tl.where(spread, divide(g_skew, held * square_root(held)), 0.0)
    by_var = tl.where(spread, divide(3.0 * (g_skew * skew), held), 0.0)
    n = (row * 0 + I).to(C)
    a = divide(g_mean - 3.0 * (by_root * var), n)
    b = divide(2.0 * g_var - by_var, n)
    c = divide(3.0 * by_root, n)
    of_row, most, share = tl.load(g_row + row), tl.load(absmax), tl.load(of_most)
    begin = row * 0
    while begin < I:
        here = begin + at < I
        v = _fetch(w, base + begin + at, here)
        d = v - mean
        sign = tl.where(v > 0.0, 1.0, tl.where(v < 0.0, -1.0, 0.0)).to(C)
        norms = of_row + tl.load(g_col + begin + at, mask=here, other=0.0)
        norms = norms + tl.where(tl.where(v < 0.0, -v, v) == most, share, 0.0)
        result = (a + d * (b + c * d)) + sign * norms
        tl.store(gw + base + begin + at, narrow(result, gw.dtype.element_ty), mask=here)
        begin += BLOCK


@triton.jit
def _tanh(x):
    """With all its digits near 0: csrc/math/weight_norms.h."""
    z = x * x
    above = x * (135135.0 + z * (17325.0 + z * (378.0 + z)))
    below = 135135.0 + z * (62370.0 + z * (3150.0 + z * 28.0))
    near = tl.abs(x) < 0.5
    return tl.where(near, divide(above, below), tanh(x))


@triton.jit(do_not_specialize=["n"])
def _saturate_kernel(y, w, alpha, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here, a = at < n, tl.load(alpha)
    v = _fetch(w, at, here)
    tl.store(y + at, narrow(a * _tanh(divide(v, tl.zeros_like(v) + a)), y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["n"])
def _saturate_bwd_kernel(gw, partial, gy, w, alpha, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    here, a = at < n, tl.load(alpha)
    g, v = _fetch(gy, at, here), _fetch(w, at, here)
    x = divide(v, tl.zeros_like(v) + a)
    t = _tanh(x)
    slope = 1.0 - t * t
    tl.store(gw + at, narrow(g * slope, gw.dtype.element_ty), mask=here)
    share = tl.where(here, (g * (t - x * slope)).to(tl.float64), 0.0)
    tl.store(partial + pid, tl.sum(share, 0))


def _compute(w: torch.Tensor, *shape: int) -> torch.Tensor:
    return w.new_empty(shape, dtype=torch.float64 if w.dtype == torch.float64 else torch.float32)


def _tile(w: torch.Tensor) -> int:
    return _TILE // 2 if w.dtype == torch.float64 else _TILE


def weight_norms_reduce(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    w, (rows, columns) = w.contiguous(), w.shape
    moments, row_l1, most = _compute(w, 3, rows), _compute(w, rows), _compute(w, rows)
    count = w.new_zeros(rows, dtype=torch.int64)
    of_part = max(16, -(-rows // _ROWS))
    parts = triton.cdiv(rows, of_part)
    partial = w.new_empty((parts, columns), dtype=torch.float64)
    with _launch.on_device(w):
        if rows:
            _rows_kernel[(rows,)](moments, row_l1, most, count, _launch.raw(w), rows, columns, _tile(w), **OPTIONS)
        if partial.numel():
            grid = (parts * triton.cdiv(columns, _COLUMNS),)
            _columns_kernel[grid](partial, _launch.raw(w), rows, columns, of_part, 8, _COLUMNS, **OPTIONS)
    largest = most.amax() if w.numel() else most.new_zeros(())
    equal = torch.where(most == largest, count, 0).sum().to(most.dtype)
    return moments, row_l1, partial.sum(0).to(most.dtype), torch.stack([largest, equal])


def weight_norms_reduce_bwd(
    g_moments: torch.Tensor,
    g_row: torch.Tensor,
    g_col: torch.Tensor,
    g_absmax: torch.Tensor,
    w: torch.Tensor,
    moments: torch.Tensor,
    absmax: torch.Tensor,
) -> torch.Tensor:
    w, (rows, columns) = w.contiguous(), w.shape
    gw = torch.empty_like(w)
    if w.numel():
        given = [t.contiguous() for t in (g_moments, g_row, g_col, g_absmax / absmax[1])]
        tensors = (_launch.raw(gw), *given, _launch.raw(w), moments.contiguous(), absmax.contiguous())
        with _launch.on_device(w):
            _rows_bwd_kernel[(rows,)](*tensors, rows, columns, _tile(w), **OPTIONS)
    return gw


def weight_norms_saturate(w: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    w = w.contiguous()
    y, n, tile = torch.empty_like(w), w.numel(), _tile(w)
    if n:
        with _launch.on_device(w):
            _saturate_kernel[(triton.cdiv(n, tile),)](_launch.raw(y), _launch.raw(w), alpha, n, tile, **OPTIONS)
    return y


def weight_norms_saturate_bwd(
    gy: torch.Tensor, w: torch.Tensor, alpha: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    w, n, tile = w.contiguous(), w.numel(), _tile(w)
    gw, partial = torch.empty_like(w), w.new_empty(triton.cdiv(n, tile), dtype=torch.float64)
    if n:
        tensors = (_launch.raw(gw), partial, _launch.raw(gy.contiguous()), _launch.raw(w), alpha)
        with _launch.on_device(w):
            _saturate_bwd_kernel[(len(partial),)](*tensors, n, tile, **OPTIONS)
    return gw, partial.sum().to(alpha.dtype)
