# SPDX-License-Identifier: Apache-2.0
"""The ``inputs`` family: noise of a strength for each sample, and steps of projected attacks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import divide, double_from_bits, narrow, square_root, widen
from ._elementary import log_of_normal
from ._launch import OPTIONS
from ._noise import load_state, normal_run, uniform_run, words

_UNIFORM, _EXPONENTIAL = tl.constexpr(1), tl.constexpr(2)
#: Elements of a tile.
_TILE = 512


@triton.jit
def _stream(state, number: tl.constexpr):
    """The state with `number` added to its offset."""
    seed_low, seed_high, low, high = state
    moved = low + number
    return seed_low, seed_high, moved, high + tl.where(moved < low, 1, 0).to(tl.uint32)


@triton.jit(do_not_specialize=["count", "most_bits"])
def _strength_kernel(sigma, state_ptr, count, most_bits, LAW: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    most = double_from_bits(most_bits, tl.float32)
    v = tl.zeros([BLOCK], tl.float32) + most
    if LAW != 0:
        w0, w1, w2, w3 = words(_stream(load_state(state_ptr), 2), index >> 2)
        j = index & 3
        word = tl.where(j < 2, tl.where(j == 0, w0, w1), tl.where(j == 2, w2, w3))
        u = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        v = most * u if LAW == _UNIFORM else most * -log_of_normal(u, 0.0)
    tl.store(sigma + index, v, mask=index < count)


@triton.jit(do_not_specialize=["K", "n", "length", "keep_bits"])
def _noise_kernel(noisy, x, sigma, state_ptr, K, n, samples, length, keep_bits, MASKED: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    here = at < n
    state = load_state(state_ptr)
    value = widen(tl.load(x + at, mask=here, other=0))
    sample = at // length
    of_copy = (start * 0 + n + 7) // 8 * 8
    k = start * 0
    while k < K:
        factor = tl.load(sigma + k * samples + sample, mask=here, other=0.0) * 3.4641016
        noise = factor * normal_run(state, k * of_copy + start, BLOCK)
        v = value + noise.to(value.dtype)
        if MASKED:
            kept = uniform_run(_stream(state, 1), k * of_copy + start, BLOCK)
            v = tl.where(kept < double_from_bits(keep_bits, tl.float32), v, value)
        tl.store(noisy + k * n + at, narrow(v, noisy.dtype.element_ty), mask=here)
        k += 1


@triton.jit
def _held(v, low, high):
    raised = tl.where(v < low, low, v)
    return tl.where(raised > high, high, raised)


@triton.jit
def _fetch(pointer, at, here):
    return widen(tl.load(pointer + at, mask=here, other=0))


@triton.jit(do_not_specialize=["n", "length", "step_bits", "eps_bits", "low_bits", "high_bits"])
def _sign_kernel(out, xa, x0, g, active, n, length, step_bits, eps_bits, low_bits, high_bits, ACTIVE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    a, o, d = _fetch(xa, at, here), _fetch(x0, at, here), _fetch(g, at, here)
    C: tl.constexpr = a.dtype
    eps = double_from_bits(eps_bits, C)
    sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    moved = _held((a + double_from_bits(step_bits, C) * sign) - o, -eps, eps)
    v = _held(o + moved, double_from_bits(low_bits, C), double_from_bits(high_bits, C))
    if ACTIVE:
        v = tl.where(tl.load(active + at // length, mask=here, other=0) != 0, v, a)
    tl.store(out + at, narrow(v, out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["length", "step_bits", "eps_bits", "low_bits", "high_bits"])
def _norm_kernel(out, xa, x0, g, active, length, step_bits, eps_bits, low_bits, high_bits, ACTIVE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """A program a sample, which it passes over three times."""
    sample = tl.program_id(0).to(tl.int64)
    base, at = sample * length, tl.arange(0, BLOCK)
    C: tl.constexpr = tl.float64 if xa.dtype.element_ty == tl.float64 else tl.float32
    step, eps = double_from_bits(step_bits, C), double_from_bits(eps_bits, C)
    squares = tl.zeros([BLOCK], tl.float64)
    begin = sample * 0
    while begin < length:
        d = _fetch(g, base + begin + at, begin + at < length).to(tl.float64)
        squares += d * d
        begin += BLOCK
    norm = square_root(tl.sum(squares, 0)).to(C)
    scale = tl.where(norm == 0.0, 0.0, divide(step, tl.where(norm == 0.0, 1.0, norm)))
    squares = tl.zeros([BLOCK], tl.float64)
    begin = sample * 0
    while begin < length:
        here = begin + at < length
        o = _fetch(x0, base + begin + at, here)
        d = (_fetch(xa, base + begin + at, here) + scale * _fetch(g, base + begin + at, here)) - o
        d = tl.where(here, d.to(tl.float64), 0.0)
        squares += d * d
        begin += BLOCK
    distance = square_root(tl.sum(squares, 0)).to(C)
    shrink = tl.where(distance > eps, divide(eps, distance), distance * 0.0 + 1.0)
    begin = sample * 0
    while begin < length:
        here = begin + at < length
        a, o = _fetch(xa, base + begin + at, here), _fetch(x0, base + begin + at, here)
        moved = shrink * ((a + scale * _fetch(g, base + begin + at, here)) - o)
        v = _held(o + moved, double_from_bits(low_bits, C), double_from_bits(high_bits, C))
        if ACTIVE:
            v = tl.where(tl.load(active + sample) != 0, v, a)
        tl.store(out + base + begin + at, narrow(v, out.dtype.element_ty), mask=here)
        begin += BLOCK


def inputs_noise(
    x: torch.Tensor, state: torch.Tensor, K: int, law: int, most: float, keep: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x, n, samples = x.contiguous(), x.numel(), x.shape[0]
    noisy = x.new_empty((K, *x.shape))
    sigma = x.new_empty((K, samples), dtype=torch.float32)
    with _launch.on_device(x):
        if sigma.numel():
            grid = (triton.cdiv(sigma.numel(), _TILE),)
            _strength_kernel[grid](sigma, state, sigma.numel(), _launch.bits(most), law, _TILE, **OPTIONS)
        if noisy.numel():
            tile = _TILE // 2 if x.dtype == torch.float64 else _TILE
            numbers = (K, n, samples, n // samples, _launch.bits(keep), keep < 1, tile)
            pointers = (_launch.raw(noisy), _launch.raw(x), sigma, state)
            _noise_kernel[(triton.cdiv(n, tile),)](*pointers, *numbers, **OPTIONS)
    return noisy, sigma


def inputs_pgd_step(
    xa: torch.Tensor,
    x0: torch.Tensor,
    g: torch.Tensor,
    active: torch.Tensor | None,
    step: float,
    eps: float,
    norm: int,
    low: float,
    high: float,
) -> torch.Tensor:
    xa, samples, n = xa.contiguous(), xa.shape[0], xa.numel()
    out = torch.empty_like(xa)
    if n == 0:
        return out
    of_samples = xa if active is None else active.contiguous().view(torch.int8)
    tensors = [*(_launch.raw(t) for t in (out, xa, x0.contiguous(), g.contiguous())), _launch.raw(of_samples)]
    numbers = [_launch.bits(v) for v in (step, eps, low, high)]
    tile = _TILE // 2 if xa.dtype == torch.float64 else _TILE
    with _launch.on_device(xa):
        if norm == 0:
            grid, sizes = (triton.cdiv(n, tile),), (n, n // samples)
            _sign_kernel[grid](*tensors, *sizes, *numbers, active is not None, tile, **OPTIONS)
        else:
            _norm_kernel[(samples,)](*tensors, n // samples, *numbers, active is not None, tile, **OPTIONS)
    return out
