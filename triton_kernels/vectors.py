# SPDX-License-Identifier: Apache-2.0
"""The ``vectors`` family: dots with a basis, their subtraction, random signs, quadratic forms of slices.

Sums are formed in fp64: a program adds tile by tile and then across the tile, a second kernel adds the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import narrow, widen
from ._launch import OPTIONS
from ._noise import load_state, words
from .sharpness import sharpness_sums

#: Rows of the basis that a program of the dots takes; vectors that share its reading.
_ROWS, _VECTORS = 4, 8
#: Elements of a tile of the dots, for one vector and for several.
_DOT_BLOCK = {1: 512, _VECTORS: 128}
_STEPS = 8
_SUM_BLOCK = 256
#: Philox blocks of a program.
_DRAWS = 16


@triton.jit
def _fetch(pointers, mask, MASKED: tl.constexpr):
    """Elements in the arithmetic type; 0 where the mask is off."""
    if MASKED:
        return widen(tl.load(pointers, mask=mask, other=0))
    else:
        return widen(tl.load(pointers))


@triton.jit
def _products(q_ptr, w_ptr, at, j, k, n, rows, vectors, MASKED: tl.constexpr):
    """Products of tiles of the rows j [R, 1, 1] and the vectors k [1, V, 1], in fp64."""
    x = _fetch(q_ptr + j * n + at, (j < rows) & (at < n), MASKED).to(tl.float64)
    y = _fetch(w_ptr + k * n + at, (k < vectors) & (at < n), MASKED).to(tl.float64)
    return x * y


@triton.jit(do_not_specialize=["units", "rows", "vectors", "steps", "chunks"])
def _dot_kernel(
    partials, q_ptr, w_ptr, units, rows, vectors, steps, chunks, ROWS: tl.constexpr, VECTORS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A few dots of a chunk; neighbouring programs share what they read. A row has units * ALIGN elements, which tells
    the compiler where its accesses may be wide."""
    n = units.to(tl.int64) * ALIGN
    groups, tiles = tl.cdiv(vectors, VECTORS), tl.cdiv(rows, ROWS)
    pid = tl.program_id(0).to(tl.int64)
    k0, j0, chunk = (pid % groups) * VECTORS, (pid // groups % tiles) * ROWS, pid // groups // tiles
    j = j0 + tl.arange(0, ROWS)[:, None, None]
    k = k0 + tl.arange(0, VECTORS)[None, :, None]
    at = chunk * steps * BLOCK
    end = tl.minimum(at + steps * BLOCK, n)
    sums = tl.zeros([ROWS, VECTORS, BLOCK], tl.float64)
    whole = (j0 + ROWS <= rows) & (k0 + VECTORS <= vectors)
    lanes = tl.arange(0, BLOCK)[None, None, :]
    while at < end:
        if whole & (at + BLOCK <= n):
            sums += _products(q_ptr, w_ptr, at + lanes, j, k, n, rows, vectors, False)
        else:
            sums += _products(q_ptr, w_ptr, at + lanes, j, k, n, rows, vectors, True)
        at += BLOCK
    total = tl.sum(sums, 2)
    of_row = j0 + tl.arange(0, ROWS)[:, None]
    of_vector = k0 + tl.arange(0, VECTORS)[None, :]
    to = partials + (of_row * vectors + of_vector) * chunks + chunk
    tl.store(to, total, mask=(of_row < rows) & (of_vector < vectors))


@triton.jit(do_not_specialize=["chunks"])
def _total_kernel(out, partials, chunks, BLOCK: tl.constexpr):
    """The sum of the chunks of each number."""
    pid = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    at = 0
    while at < chunks:
        total += tl.load(partials + pid * chunks + at + lanes, mask=at + lanes < chunks, other=0.0)
        at += BLOCK
    tl.store(out + pid, tl.sum(total, 0))


@triton.jit
def _subtract_tile(partials, w_ptr, q_ptr, c, n, rows, vectors, k, at, to, VECTORS: tl.constexpr, MASKED: tl.constexpr):
    C: tl.constexpr = w_ptr.dtype.element_ty
    held = (k < vectors) & (at < n)
    left = _fetch(w_ptr + k * n + at, held, MASKED)
    j = 0
    while j < rows:
        factor = tl.load(c + j * vectors + k, mask=k < vectors, other=0.0).to(C)
        x = _fetch(q_ptr + j.to(tl.int64) * n + at, at < n, MASKED).to(C)
        left = left - factor * x
        j += 1
    if MASKED:
        tl.store(w_ptr + k * n + at, left, mask=held)
        left = tl.where(held, left, 0.0)
    else:
        tl.store(w_ptr + k * n + at, left)
    wide = left.to(tl.float64)
    tl.store(to, tl.sum(wide * wide, 1, keep_dims=True), mask=k < vectors)


@triton.jit(do_not_specialize=["units", "rows", "vectors", "tiles"])
def _subtract_kernel(
    partials, w_ptr, q_ptr, c, units, rows, vectors, tiles, VECTORS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A tile of a few vectors: w - c[0] q[0] - c[1] q[1] - ..., and the squares of what is left."""
    n = units.to(tl.int64) * ALIGN
    groups = tl.cdiv(vectors, VECTORS)
    pid = tl.program_id(0).to(tl.int64)
    k0, tile = (pid % groups) * VECTORS, pid // groups
    k = k0 + tl.arange(0, VECTORS)[:, None]
    at = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    to = partials + k * tiles + tile
    if (k0 + VECTORS <= vectors) & (tile * BLOCK + BLOCK <= n):
        _subtract_tile(partials, w_ptr, q_ptr, c, n, rows, vectors, k, at, to, VECTORS, False)
    else:
        _subtract_tile(partials, w_ptr, q_ptr, c, n, rows, vectors, k, at, to, VECTORS, True)


@triton.jit(do_not_specialize=["n"])
def _signs_kernel(y_ptr, state, n, DRAWS: tl.constexpr):
    """+-1 of 128 elements of each of DRAWS Philox blocks."""
    first = tl.program_id(0).to(tl.int64) * DRAWS
    w0, w1, w2, w3 = words(load_state(state), first + tl.arange(0, DRAWS))
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    bit = (word[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    offsets = first * 128 + tl.arange(0, 4 * DRAWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    sign = narrow(tl.where(bit != 0, -1.0, 1.0), y_ptr.dtype.element_ty)
    if (first + DRAWS) * 128 <= n:
        tl.store(y_ptr + offsets, sign)
    else:
        tl.store(y_ptr + offsets, sign, mask=offsets < n)


def _aligned(w: torch.Tensor, q: torch.Tensor) -> tuple[int, int]:
    """The length of a row in units, and the elements of a unit."""
    n, align = w.shape[1], _launch.vector(w, q)
    return (n // align, align) if n % align == 0 else (n, 1)


def _several(vectors: int) -> int:
    return 1 if vectors == 1 else _VECTORS


def _totals(partials: torch.Tensor, out: torch.Tensor) -> None:
    if out.numel():
        _total_kernel[(out.numel(),)](out, partials, partials.shape[-1], _SUM_BLOCK, **OPTIONS)


def vectors_dot(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    (rows, n), vectors = q.shape, len(w)
    out = w.new_zeros((rows, vectors), dtype=torch.float64)
    if not out.numel() or n == 0:
        return out
    group = _several(vectors)
    block = _DOT_BLOCK[group]
    across = triton.cdiv(rows, _ROWS) * triton.cdiv(vectors, group)
    blocks = triton.cdiv(n, block)
    steps = max(triton.cdiv(blocks, triton.cdiv(_launch.PROGRAMS, across)), min(_STEPS, blocks))
    chunks = triton.cdiv(blocks, steps)
    partials = w.new_empty((rows, vectors, chunks), dtype=torch.float64)
    units, align = _aligned(w, q)
    with _launch.on_device(w):
        _dot_kernel[(chunks * across,)](
            partials, _launch.raw(q), w, units, rows, vectors, steps, chunks, _ROWS, group, block, align, **OPTIONS
        )
        _totals(partials, out)
    return out


def vectors_subtract_(w: torch.Tensor, q: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    vectors, n = w.shape
    squares = w.new_zeros(vectors, dtype=torch.float64)
    if not w.numel():
        return squares
    group = _several(vectors)
    block = _launch.block(w) // (1 if group == 1 else 4)
    tiles = triton.cdiv(n, block)
    partials = w.new_empty((vectors, tiles), dtype=torch.float64)
    units, align = _aligned(w, q)
    with _launch.on_device(w):
        _subtract_kernel[(tiles * triton.cdiv(vectors, group),)](
            partials, w, _launch.raw(q), c, units, len(q), vectors, tiles, group, block, align, **OPTIONS
        )
        _totals(partials, squares)
    return squares


def vectors_rademacher(state: torch.Tensor, k: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    y = state.new_empty((k, n), dtype=dtype)
    if y.numel():
        with _launch.on_device(state):
            programs = triton.cdiv(y.numel(), 128 * _DRAWS)
            _signs_kernel[(programs,)](_launch.raw(y), state, y.numel(), _DRAWS, **OPTIONS)
    return y


def vectors_quadratic(v: torch.Tensor, hv: torch.Tensor, starts: list[int]) -> torch.Tensor:
    slices = [slice(starts[t], starts[t + 1]) for t in range(len(starts) - 1)]
    segments = [[rows[k, s] for k in range(len(v)) for s in slices] for rows in (v, hv)]
    if not segments[0]:
        return hv.new_zeros((len(v), len(slices)), dtype=torch.float64)
    return sharpness_sums(*segments, [1], 0.0)[:, 1].reshape(len(v), len(slices)).contiguous()
