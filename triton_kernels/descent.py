# SPDX-License-Identifier: Apache-2.0
"""The ``descent`` family: rows of numbers, and the steps of the optimizers over a list of tensors.

A program reads the numbers of its tensor from the row on the device, so that no value passes through the host. Sums of
LAMB are formed as in :mod:`sharpness`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _multi, _updates
from ._common import narrow, program, widen
from ._multi import STEPS, deliver, extent, fetch, pairs, place, pointer, put
from ._noise import load_state
from ._rows import make_rows
from ._updates import AVERAGE, BETA1, C1, C2, FIRST, FLAGS, GAIN, GAIN1, NESTEROV, RATE, SHRINK, SKIP

#: Rules of a step; SGD's takes the rows of LARS too.
_SGD, _ADAM, _PADAM, _LAMB = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
#: Streams that a form may lack.
_OUTS, _FIRSTS, _MEANS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_LARGEST, _AVERAGES, _BACKUP = tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
#: Columns of the tables.
_STEPPED = tl.constexpr(12)
_MOVED = tl.constexpr(8)


@triton.jit
def _mixed(row, g_ptr, f_ptr, start, end, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """The gradient of a tile: c2 g + c1 f."""
    u = row[C2] * widen(fetch(g_ptr, start, end, BLOCK, MASKED))
    if _FIRSTS & STREAMS:
        u = u + row[C1] * widen(fetch(f_ptr, start, end, BLOCK, MASKED))
    return u


@triton.jit
def _average_tile(a_ptr, start, end, new, weight, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    if weight != 0.0:
        a = fetch(a_ptr, start, end, BLOCK, MASKED)
        put(a_ptr, start, end, a + weight * (new - a), BLOCK, MASKED)


@triton.jit
def _step_tile(pointers, start, end, row, rate, seed, first, RULE: tl.constexpr, STREAMS: tl.constexpr,
               SEEDED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    source_ptr, w_ptr, out_ptr, g_ptr, f_ptr, m_ptr, v_ptr, l_ptr, a_ptr = pointers
    w = widen(fetch(source_ptr, start, end, BLOCK, MASKED))
    if RULE == _LAMB:
        m, v = fetch(m_ptr, start, end, BLOCK, MASKED), fetch(v_ptr, start, end, BLOCK, MASKED)
        d = _updates.lamb(row, w, m, v)
    else:
        u = _updates.decayed(row, _mixed(row, g_ptr, f_ptr, start, end, STREAMS, BLOCK, MASKED), w)
        if RULE == _SGD:
            u = row[GAIN] * u
            d = u
            if _MEANS & STREAMS:
                m = row[BETA1] * fetch(m_ptr, start, end, BLOCK, MASKED) + row[GAIN1] * u
                m = tl.where((row[FLAGS] & FIRST) != 0, u, m)
                put(m_ptr, start, end, m, BLOCK, MASKED)
                d = tl.where((row[FLAGS] & NESTEROV) != 0, u + row[BETA1] * m, m)
        else:
            m, v = fetch(m_ptr, start, end, BLOCK, MASKED), fetch(v_ptr, start, end, BLOCK, MASKED)
            m, v = _updates.moments(row, u, m, v)
            put(m_ptr, start, end, m, BLOCK, MASKED)
            put(v_ptr, start, end, v, BLOCK, MASKED)
            if _LARGEST & STREAMS:
                x = fetch(l_ptr, start, end, BLOCK, MASKED)
                v = tl.where(x > v, x, v)
                put(l_ptr, start, end, v, BLOCK, MASKED)
            if RULE == _PADAM:
                d = _updates.padam(row, m, v)
            else:
                d = _updates.adam(row, m, v)
    new = row[SHRINK] * w - rate * d
    if _AVERAGES & STREAMS:
        _average_tile(a_ptr, start, end, new, row[AVERAGE], BLOCK, MASKED)
    if _OUTS & STREAMS:
        deliver(out_ptr, start, end, new, seed, first, SEEDED, BLOCK, MASKED)
    deliver(w_ptr, start, end, new, seed, first, SEEDED, BLOCK, MASKED)


@triton.jit
def _restore_tile(pointers, start, end, STREAMS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Weights are moved, not converted: a NaN keeps its payload."""
    raw = fetch(pointers[0], start, end, BLOCK, MASKED)
    put(pointers[1], start, end, raw, BLOCK, MASKED)
    if _OUTS & STREAMS:
        put(pointers[2], start, end, narrow(widen(raw), pointers[2].dtype.element_ty), BLOCK, MASKED)


@triton.jit
def _step(
    w_ptr, out_ptr, g_ptr, f_ptr, m_ptr, v_ptr, l_ptr, a_ptr, start, end, t, first, at, backup, rows, sums, state,
    RULE: tl.constexpr, STREAMS: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = tl.float64 if w_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = _updates.load_row(rows, t, C)
    rate = _updates.lamb_rate(rows, sums, t, C) if RULE == _LAMB else row[RATE]
    seed = load_state(state) if SEEDED else first
    source_ptr = place(backup, at, w_ptr) if _BACKUP & STREAMS else w_ptr
    pointers = (source_ptr, w_ptr, out_ptr, g_ptr, f_ptr, m_ptr, v_ptr, l_ptr, a_ptr)
    if (row[FLAGS] & SKIP) != 0:
        if start + BLOCK <= end:
            _restore_tile(pointers, start, end, STREAMS, BLOCK, False)
        else:
            _restore_tile(pointers, start, end, STREAMS, BLOCK, True)
    elif start + BLOCK <= end:
        _step_tile(pointers, start, end, row, rate, seed, first, RULE, STREAMS, SEEDED, BLOCK, False)
    else:
        _step_tile(pointers, start, end, row, rate, seed, first, RULE, STREAMS, SEEDED, BLOCK, True)


@triton.jit
def _descent_list_kernel(
    tensors, chunks, backup, rows, sums, state, W: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    M: tl.constexpr, V: tl.constexpr, X: tl.constexpr, A: tl.constexpr, RULE: tl.constexpr, STREAMS: tl.constexpr,
    SEEDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A step of each tensor, or its restoration."""
    pid = program(True)
    row = tensors + tl.load(chunks + 2 * pid) * _STEPPED
    start, end = extent(tl.load(chunks + 2 * pid + 1), tl.load(row + 1), BLOCK, WIDE)
    t, first, at = tl.load(row), tl.load(row + 2), tl.load(row + 3)
    _step(
        pointer(row, 4, W), pointer(row, 5, OUT), pointer(row, 6, G), pointer(row, 7, F), pointer(row, 8, M),
        pointer(row, 9, V), pointer(row, 10, X), pointer(row, 11, A), start, end, t, first, at, backup, rows, sums,
        state, RULE, STREAMS, SEEDED, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["t", "n", "first", "at"])
def _descent_kernel(
    w_ptr, out_ptr, g_ptr, f_ptr, m_ptr, v_ptr, l_ptr, a_ptr, t, n, first, at, backup, rows, sums, state,
    RULE: tl.constexpr, STREAMS: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same for one tensor."""
    start, end = extent(program(WIDE) * BLOCK, n, BLOCK, WIDE)
    _step(w_ptr, out_ptr, g_ptr, f_ptr, m_ptr, v_ptr, l_ptr, a_ptr, start, end, t, first, at, backup, rows, sums,
          state, RULE, STREAMS, SEEDED, BLOCK)  # fmt: skip


@triton.jit
def _moments_tile(pointers, start, end, row, STREAMS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Moves the moments of a tile; gives its q and w in fp64."""
    source_ptr, g_ptr, f_ptr, m_ptr, v_ptr = pointers
    w = widen(fetch(source_ptr, start, end, BLOCK, MASKED))
    m, v = fetch(m_ptr, start, end, BLOCK, MASKED), fetch(v_ptr, start, end, BLOCK, MASKED)
    if (row[FLAGS] & SKIP) == 0:
        m, v = _updates.moments(row, _mixed(row, g_ptr, f_ptr, start, end, STREAMS, BLOCK, MASKED), m, v)
        put(m_ptr, start, end, m, BLOCK, MASKED)
        put(v_ptr, start, end, v, BLOCK, MASKED)
    q = _updates.lamb(row, w, m, v)
    if MASKED:
        q = tl.where(start + tl.arange(0, BLOCK) < end, q, 0.0)
    return q.to(tl.float64), w.to(tl.float64)


@triton.jit
def _moments_chunk(
    partials, w_ptr, g_ptr, f_ptr, m_ptr, v_ptr, start, end, t, at, backup, rows,
    STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = tl.float64 if w_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = _updates.load_row(rows, t, C)
    pointers = (place(backup, at, w_ptr) if _BACKUP & STREAMS else w_ptr, g_ptr, f_ptr, m_ptr, v_ptr)
    qq = tl.zeros([BLOCK // 2], tl.float64)
    ww = tl.zeros([BLOCK // 2], tl.float64)
    while start < end:
        if start + BLOCK <= end:
            q, w = _moments_tile(pointers, start, end, row, STREAMS, BLOCK, False)
        else:
            q, w = _moments_tile(pointers, start, end, row, STREAMS, BLOCK, True)
        qq += pairs(q * q, BLOCK)
        ww += pairs(w * w, BLOCK)
        start += BLOCK
    to = partials + 3 * tl.program_id(0)
    tl.store(to, tl.sum(qq, 0))
    tl.store(to + 1, 0.0)
    tl.store(to + 2, tl.sum(ww, 0))


@triton.jit
def _descent_moments_list_kernel(
    tensors, chunks, partials, backup, rows, W: tl.constexpr, G: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    V: tl.constexpr, STREAMS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first half of LAMB: moments, and the sums of each chunk."""
    pid = program(True)
    row = tensors + tl.load(chunks + 2 * pid) * _MOVED
    start, end = extent(tl.load(chunks + 2 * pid + 1), tl.load(row + 1), BLOCK * STEPS, WIDE)
    w_ptr, g_ptr, f_ptr = pointer(row, 3, W), pointer(row, 4, G), pointer(row, 5, F)
    _moments_chunk(partials, w_ptr, g_ptr, f_ptr, pointer(row, 6, M), pointer(row, 7, V), start, end,
                   tl.load(row), tl.load(row + 2), backup, rows, STREAMS, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["t", "n", "at"])
def _descent_moments_kernel(
    w_ptr, g_ptr, f_ptr, m_ptr, v_ptr, t, n, at, partials, backup, rows,
    STREAMS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same for one tensor."""
    start, end = extent(program(WIDE) * (BLOCK * STEPS), n, BLOCK * STEPS, WIDE)
    _moments_chunk(partials, w_ptr, g_ptr, f_ptr, m_ptr, v_ptr, start, end, t, at, backup, rows, STREAMS, BLOCK)


def descent_rows_(
    hyper: torch.Tensor,
    group: torch.Tensor,
    steps: torch.Tensor,
    mix: torch.Tensor,
    of_gradients: torch.Tensor | None,
    of_weights: torch.Tensor | None,
    rule: int,
) -> torch.Tensor:
    return make_rows(hyper, group, steps, mix, of_gradients, of_weights, rule)


def _steps(ws, outs, backup, at, gs, firsts, states, averages, rows, sums, state, rule) -> None:
    """One launch a form; `states` are momenta, or means, squares and largest, each a list that may be empty."""
    work, rows = _multi.Work(ws), rows.contiguous()
    kept = rows if backup is None else work.flat(backup, False)
    lists = ((outs, True), (gs, False), (firsts, False), *states, (averages, True))
    optional = (
        (_OUTS, outs),
        (_FIRSTS, firsts),
        (_MEANS, states[0][0]),
        (_LARGEST, states[2][0]),
        (_AVERAGES, averages),
    )
    streams = sum(bit.value for bit, of in optional if of) + (0 if backup is None else _BACKUP.value)
    numbered = zip(ws, _multi.draws(ws), at or [0] * len(ws), strict=True)
    for t, (w, first, place_) in enumerate(numbered):
        if w.numel():
            w = work.weights(w, True)
            partners = [work.partner(of[t], w, changed) if of else w for of, changed in lists]
            seeded = state is not None and torch.bfloat16 in (w.dtype, partners[0].dtype)
            work.add([t, w.numel(), first, place_], [w, *partners], rule, streams, seeded)
    shared = (kept, rows, rows if sums is None else sums.contiguous(), rows if state is None else state)
    for made in work.groups():
        made.launch(_descent_list_kernel, _descent_kernel, *shared)
    work.finish()


def descent_sgd_(
    ws: list[torch.Tensor],
    outs: list[torch.Tensor],
    backup: torch.Tensor | None,
    at: list[int],
    gs: list[torch.Tensor],
    firsts: list[torch.Tensor],
    momenta: list[torch.Tensor],
    averages: list[torch.Tensor],
    rows: torch.Tensor,
    state: torch.Tensor | None = None,
) -> None:
    states = ((momenta, True), ([], False), ([], False))
    _steps(ws, outs, backup, at, gs, firsts, states, averages, rows, None, state, _SGD.value)


def descent_adam_(
    ws: list[torch.Tensor],
    outs: list[torch.Tensor],
    backup: torch.Tensor | None,
    at: list[int],
    gs: list[torch.Tensor],
    firsts: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    largest: list[torch.Tensor],
    averages: list[torch.Tensor],
    rows: torch.Tensor,
    padam: bool,
    state: torch.Tensor | None = None,
) -> None:
    states = ((means, True), (squares, True), (largest, True))
    rule = _PADAM.value if padam else _ADAM.value
    _steps(ws, outs, backup, at, gs, firsts, states, averages, rows, None, state, rule)


def descent_lamb_moments_(
    ws: list[torch.Tensor],
    backup: torch.Tensor | None,
    at: list[int],
    gs: list[torch.Tensor],
    firsts: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    rows: torch.Tensor,
) -> torch.Tensor:
    work, rows = _multi.Work(ws), rows.contiguous()
    kept = rows if backup is None else work.flat(backup, False)
    streams = (_FIRSTS.value if firsts else 0) + (0 if backup is None else _BACKUP.value)
    for t, (w, place_) in enumerate(zip(ws, at or [0] * len(ws), strict=True)):
        if w.numel():
            w = work.weights(w, False)
            g = work.partner(gs[t], w, False)
            f = work.partner(firsts[t], w, False) if firsts else g
            moved = [work.partner(of[t], w, True) for of in (means, squares)]
            work.add([t, w.numel(), place_], [w, g, f, *moved], streams)
    sums = rows.new_zeros((len(ws), 3))
    for made in work.groups(STEPS.value):
        made.launch_sums(sums, _descent_moments_list_kernel, _descent_moments_kernel, kept, rows)
    work.finish()
    return sums


def descent_lamb_(
    ws: list[torch.Tensor],
    outs: list[torch.Tensor],
    backup: torch.Tensor | None,
    at: list[int],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    averages: list[torch.Tensor],
    rows: torch.Tensor,
    sums: torch.Tensor,
    state: torch.Tensor | None = None,
) -> None:
    states = ((means, False), (squares, False), ([], False))
    _steps(ws, outs, backup, at, [], [], states, averages, rows, sums, state, _LAMB.value)
