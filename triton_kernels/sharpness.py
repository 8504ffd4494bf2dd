# SPDX-License-Identifier: Apache-2.0
"""The ``sharpness`` family: sums over a list of tensors, the scale of an ascent, and the ascent.

Sums are formed in fp64: a program adds tile by tile and then across the tile, a second kernel adds the programs of each
tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _multi
from ._common import double_from_bits, program, square_root, widen
from ._launch import OPTIONS
from ._multi import STEPS, deliver, extent, fetch, pairs, place, pointer, put
from ._noise import load_state

_PAIR, _SCALED = tl.constexpr(1), tl.constexpr(2)
_BY_SIZE, _BY_SIGN = tl.constexpr(1), tl.constexpr(2)
#: Columns of the tables.
_SUMMED = tl.constexpr(4)
_RAISED = tl.constexpr(8)


@triton.jit
def _pair(g_ptr, o_ptr, start, end, KIND: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile and that of its partner in fp64; zeros beyond the end."""
    g = widen(fetch(g_ptr, start, end, BLOCK, MASKED)).to(tl.float64)
    if KIND == 0:
        return g, g
    else:
        return g, widen(fetch(o_ptr, start, end, BLOCK, MASKED)).to(tl.float64)


@triton.jit
def _sums_chunk(partials, g_ptr, o_ptr, start, end, eta_bits, KIND: tl.constexpr, BLOCK: tl.constexpr):
    eta = double_from_bits(eta_bits, tl.float64)
    gg = tl.zeros([BLOCK // 2], tl.float64)
    go = tl.zeros([BLOCK // 2], tl.float64)
    oo = tl.zeros([BLOCK // 2], tl.float64)
    while start < end:
        if start + BLOCK <= end:
            g, o = _pair(g_ptr, o_ptr, start, end, KIND, BLOCK, False)
        else:
            g, o = _pair(g_ptr, o_ptr, start, end, KIND, BLOCK, True)
        if KIND == _SCALED:
            g = (tl.abs(o) + eta) * g
        gg += pairs(g * g, BLOCK)
        if KIND == _PAIR:
            go += pairs(g * o, BLOCK)
            oo += pairs(o * o, BLOCK)
        start += BLOCK
    to = partials + 3 * tl.program_id(0)
    tl.store(to, tl.sum(gg, 0))
    if KIND == _PAIR:
        tl.store(to + 1, tl.sum(go, 0))
        tl.store(to + 2, tl.sum(oo, 0))
    else:
        tl.store(to + 1, 0.0)
        tl.store(to + 2, 0.0)


@triton.jit
def _sharpness_sums_list_kernel(
    tensors, chunks, partials, eta_bits,
    G: tl.constexpr, OTHER: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Three sums of each chunk."""
    pid = program(True)
    row = tensors + tl.load(chunks + 2 * pid) * _SUMMED
    start, end = extent(tl.load(chunks + 2 * pid + 1), tl.load(row + 1), BLOCK * STEPS, WIDE)
    _sums_chunk(partials, pointer(row, 2, G), pointer(row, 3, OTHER), start, end, eta_bits, KIND, BLOCK)


@triton.jit(do_not_specialize=["t", "n", "eta_bits"])
def _sharpness_sums_kernel(
    g_ptr, o_ptr, t, n, partials, eta_bits, KIND: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    """The same for one tensor."""
    start, end = extent(program(WIDE) * (BLOCK * STEPS), n, BLOCK * STEPS, WIDE)
    _sums_chunk(partials, g_ptr, o_ptr, start, end, eta_bits, KIND, BLOCK)


@triton.jit(do_not_specialize=["tensors", "wanted", "eps_bits"])
def _sharpness_scale_kernel(out, sums, rho, tensors, wanted, eps_bits, LINF: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the norm, then the scales."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    at = 0
    while at < tensors:
        total += tl.load(sums + 3 * (at + lanes), mask=at + lanes < tensors, other=0.0)
        at += BLOCK
    norm = square_root(tl.sum(total, 0))
    finite = norm < float("inf")
    at = 0
    while at < wanted:
        scale = tl.load(rho + at + lanes, mask=at + lanes < wanted, other=0.0)
        if LINF:
            scale = tl.where(finite, scale, 0.0)
        else:
            scale = tl.where(finite & (norm > 0.0), scale / (norm + double_from_bits(eps_bits, tl.float64)), 0.0)
        tl.store(out + at + lanes, scale, mask=at + lanes < wanted)
        at += BLOCK
    tl.store(out + wanted, norm)
    tl.store(out + wanted + 1, tl.where(finite, 0.0, 1.0).to(tl.float64))


@triton.jit
def _risen(w, g, s, eta, metric):
    """w and its perturbation (csrc/math/sharpness.h)."""
    size = tl.abs(w) + eta
    sign = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, g))
    risen = w + s * tl.where(metric == _BY_SIZE, (size * size) * g, tl.where(metric == _BY_SIGN, sign, g))
    return tl.where(s == 0.0, w, risen)


@triton.jit
def _ascent_tile(w_ptr, g_ptr, to_ptr, kept_ptr, start, end, numbers, seed, first,
                 KEEP: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    s, eta, metric = numbers
    raw = fetch(w_ptr, start, end, BLOCK, MASKED)
    w = widen(raw)
    g = widen(fetch(g_ptr, start, end, BLOCK, MASKED))
    if KEEP:
        put(kept_ptr, start, end, raw, BLOCK, MASKED)
    deliver(to_ptr, start, end, _risen(w, g, s, eta, metric), seed, first, SEEDED, BLOCK, MASKED)


@triton.jit
def _rise(w_ptr, g_ptr, to_ptr, start, end, t, first, at, metric, backup, scale, eta_bits, state,
          KEEP: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    C: tl.constexpr = tl.float64 if w_ptr.dtype.element_ty == tl.float64 else tl.float32
    numbers = (tl.load(scale + t).to(C), double_from_bits(eta_bits, C), metric)
    kept_ptr = place(backup, at, w_ptr) if KEEP else w_ptr
    seed = load_state(state) if SEEDED else first
    if start + BLOCK <= end:
        _ascent_tile(w_ptr, g_ptr, to_ptr, kept_ptr, start, end, numbers, seed, first, KEEP, SEEDED, BLOCK, False)
    else:
        _ascent_tile(w_ptr, g_ptr, to_ptr, kept_ptr, start, end, numbers, seed, first, KEEP, SEEDED, BLOCK, True)


@triton.jit(do_not_specialize=["eta_bits"])
def _sharpness_ascent_list_kernel(
    tensors, chunks, backup, scale, eta_bits, state, W: tl.constexpr, G: tl.constexpr, TO: tl.constexpr,
    KEEP: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """w + e of each tensor, where it is wanted."""
    pid = program(True)
    row = tensors + tl.load(chunks + 2 * pid) * _RAISED
    start, end = extent(tl.load(chunks + 2 * pid + 1), tl.load(row + 1), BLOCK, WIDE)
    t, first, at, metric = tl.load(row), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    w_ptr, g_ptr, to_ptr = pointer(row, 5, W), pointer(row, 6, G), pointer(row, 7, TO)
    _rise(w_ptr, g_ptr, to_ptr, start, end, t, first, at, metric, backup, scale, eta_bits, state,
          KEEP, SEEDED, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["t", "n", "first", "at", "metric", "eta_bits"])
def _sharpness_ascent_kernel(
    w_ptr, g_ptr, to_ptr, t, n, first, at, metric, backup, scale, eta_bits, state,
    KEEP: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same for one tensor."""
    start, end = extent(program(WIDE) * BLOCK, n, BLOCK, WIDE)
    _rise(w_ptr, g_ptr, to_ptr, start, end, t, first, at, metric, backup, scale, eta_bits, state,
          KEEP, SEEDED, BLOCK)  # fmt: skip


def _of_each(values: list[int], count: int) -> list[int]:
    """One value for all, or one a tensor."""
    return values * count if len(values) == 1 else values


def sharpness_sums(gs: list[torch.Tensor], others: list[torch.Tensor], kind: list[int], eta: float) -> torch.Tensor:
    if not gs:
        return torch.zeros((0, 3), dtype=torch.float64)
    work = _multi.Work(gs)
    for t, (g, of) in enumerate(zip(gs, _of_each(kind, len(gs)), strict=True)):
        if g.numel():
            g = work.weights(g, False)
            work.add([t, g.numel()], [g, work.partner(others[t], g, False) if of else g], of)
    sums = gs[0].new_zeros((len(gs), 3), dtype=torch.float64)
    for group in work.groups(STEPS.value):
        group.launch_sums(sums, _sharpness_sums_list_kernel, _sharpness_sums_kernel, _launch.bits(eta))
    return sums


def sharpness_scale(sums: torch.Tensor, rho: torch.Tensor, eps: float, linf: bool) -> torch.Tensor:
    out = rho.new_empty(rho.numel() + 2)
    with _launch.on_device(rho):
        _sharpness_scale_kernel[(1,)](
            out, sums.contiguous(), rho.contiguous(), len(sums), rho.numel(), _launch.bits(eps), linf, 256, **OPTIONS
        )
    return out


def sharpness_ascent_(
    ws: list[torch.Tensor],
    gs: list[torch.Tensor],
    outs: list[torch.Tensor],
    backup: torch.Tensor | None,
    at: list[int],
    scale: torch.Tensor,
    metric: list[int],
    eta: float,
    state: torch.Tensor | None = None,
) -> None:
    work, scale = _multi.Work(ws), scale.contiguous()
    kept = scale if backup is None else work.flat(backup, True)
    firsts, places = _multi.draws(ws), at or [0] * len(ws)
    for t, (w, of) in enumerate(zip(ws, _of_each(metric, len(ws)), strict=True)):
        if w.numel():
            w = work.weights(w, not outs)
            to = work.partner(outs[t], w, True) if outs else w
            numbers = [t, w.numel(), firsts[t], places[t], of]
            seeded = state is not None and to.dtype == torch.bfloat16
            work.add(numbers, [w, work.partner(gs[t], w, False), to], backup is not None, seeded)
    shared = (kept, scale, _launch.bits(eta), scale if state is None else state)
    for group in work.groups():
        group.launch(_sharpness_ascent_list_kernel, _sharpness_ascent_kernel, *shared)
    work.finish()
