# SPDX-License-Identifier: Apache-2.0
"""``bitplane`` with its backward and tangent: a program owns a block of weights and walks down their planes.

Planes are [planes, n], contiguous; ``levels`` is 2^N - 1 and ``top`` is 2^(N-1), the highest plane's power, which
halves from plane to plane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import divide, load, program, store
from ._launch import OPTIONS
from ._soft_bits import bits, difference_of, plane_of, rate_of

_RUNTIME = ["n", "planes", "steps", "pieces"]
#: Programs of the backward pass at most: several waves of any current GPU.
_PIECES = 4096
_MOST_PLANES = 16


@triton.jit
def _head(scale_ptr, beta_ptr, planes):
    """beta, levels, step and the power of the first plane, in the arithmetic type."""
    beta = tl.load(beta_ptr)
    levels = ((1 << planes) - 1).to(beta.dtype)
    return beta, levels, divide(tl.load(scale_ptr), levels), (1 << (planes - 1)).to(beta.dtype)


@triton.jit
def _value_block(
    y_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start, n, planes,
    HARD_W: tl.constexpr, HARD_M: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    beta, _, step, power = _head(scale_ptr, beta_ptr, planes)
    rate = rate_of(beta)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < n
    total = tl.zeros([BLOCK], dtype=beta.dtype)
    b = 0
    while b < planes:
        weight, _, _ = plane_of(tl.load(m_ptr + b), step, beta, power, HARD_M)
        p = load(p_ptr, offsets, mask, beta.dtype, MASKED)
        q = load(q_ptr, offsets, mask, beta.dtype, MASKED)
        total = total + weight * difference_of(p, q, rate, HARD_W)
        p_ptr += n
        q_ptr += n
        power = power * 0.5
        b += 1
    store(y_ptr, offsets, step * total, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _bitplane_kernel(
    y_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, n, planes,
    HARD_W: tl.constexpr, HARD_M: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # `n` comes in units of ALIGN, so that planes are known to start on an access.
    start = program(WIDE) * BLOCK
    if start + BLOCK <= n * ALIGN:
        _value_block(y_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start, n * ALIGN, planes,
                     HARD_W, HARD_M, BLOCK, False)  # fmt: skip
    else:
        _value_block(y_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start, n * ALIGN, planes,
                     HARD_W, HARD_M, BLOCK, True)  # fmt: skip


@triton.jit
def _gradient_block(
    gp_ptr, gq_ptr, sums, gy_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start, n, planes,
    HARD_W: tl.constexpr, HARD_M: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    beta, _, step, power = _head(scale_ptr, beta_ptr, planes)
    rate = rate_of(beta)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < n
    index = tl.arange(0, sums.shape[0])
    g = load(gy_ptr, offsets, mask, beta.dtype, MASKED)
    b = 0
    while b < planes:
        _, slope, _ = plane_of(tl.load(m_ptr + b), step, beta, power, HARD_M)
        p = load(p_ptr, offsets, mask, beta.dtype, MASKED)
        q = load(q_ptr, offsets, mask, beta.dtype, MASKED)
        if HARD_W:
            difference = difference_of(p, q, rate, True)
            of_p, of_q = tl.zeros_like(g), tl.zeros_like(g)
        else:
            difference, by_p, by_q = bits(p, q, rate)
            along = g * slope
            of_p, of_q = along * by_p, (along * by_q) * -1.0  # unary minus would make -0 to +0
        store(gp_ptr, offsets, of_p, mask, MASKED)
        store(gq_ptr, offsets, of_q, mask, MASKED)
        sums = tl.where(index == b, sums + tl.sum(g * difference, 0), sums)
        p_ptr += n
        q_ptr += n
        gp_ptr += n
        gq_ptr += n
        power = power * 0.5
        b += 1
    return sums


@triton.jit(do_not_specialize=_RUNTIME)
def _bitplane_bwd_kernel(
    gp_ptr, gq_ptr, part_ptr, gy_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, n, planes, steps, pieces,
    HARD_W: tl.constexpr, HARD_M: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Program k takes `steps` blocks and leaves partial sum k of every plane: part is [planes, pieces]."""
    count = n * ALIGN
    index = tl.arange(0, PLANES)
    sums = tl.zeros([PLANES], dtype=part_ptr.dtype.element_ty)
    begin = program(WIDE) * steps * BLOCK
    step = 0
    while step < steps:
        start = begin + step * BLOCK
        if start + BLOCK <= count:
            sums = _gradient_block(gp_ptr, gq_ptr, sums, gy_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start,
                                   count, planes, HARD_W, HARD_M, BLOCK, False)  # fmt: skip
        else:
            sums = _gradient_block(gp_ptr, gq_ptr, sums, gy_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start,
                                   count, planes, HARD_W, HARD_M, BLOCK, True)  # fmt: skip
        step += 1
    tl.store(part_ptr + index * pieces + tl.program_id(0), sums, mask=index < planes)


@triton.jit(do_not_specialize=_RUNTIME)
def _bitplane_finish_kernel(
    gm_ptr, gs_ptr, part_ptr, m_ptr, scale_ptr, beta_ptr, planes, pieces, HARD_M: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """One program: partial sums [planes, pieces] to the gradients of m and of the scale."""
    beta, levels, step, power = _head(scale_ptr, beta_ptr, planes)
    dtype: tl.constexpr = beta.dtype
    total = (levels * 0.0).to(tl.float64)
    b = 0
    while b < planes:
        sums = tl.zeros([PARTS], dtype=tl.float64)
        first = 0
        while first < pieces:
            at = first + tl.arange(0, PARTS)
            sums += tl.load(part_ptr + at, mask=at < pieces, other=0.0).to(tl.float64)
            first += PARTS
        d = tl.sum(sums, 0)
        weight, _, by_mask = plane_of(tl.load(m_ptr + b), step, beta, power, HARD_M)
        total += weight.to(tl.float64) * d
        if HARD_M:
            tl.store(gm_ptr + b, levels * 0.0)
        else:
            tl.store(gm_ptr + b, by_mask * d.to(dtype))
        part_ptr += pieces
        power = power * 0.5
        b += 1
    tl.store(gs_ptr, divide(total.to(dtype), levels))


@triton.jit
def _tangent_block(
    y_ptr, tp_ptr, tq_ptr, tm_ptr, ts_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start, n, planes,
    HAS_TP: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TM: tl.constexpr, HAS_TS: tl.constexpr,
    HARD_W: tl.constexpr, HARD_M: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    beta, levels, step, power = _head(scale_ptr, beta_ptr, planes)
    rate = rate_of(beta)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < n
    # Absent tangents count as 0 and are multiplied like present ones: 0 times infinity must stay NaN.
    total = tl.zeros([BLOCK], dtype=beta.dtype)
    tp, tq = tl.zeros_like(total), tl.zeros_like(total)
    tm, ts = levels * 0.0, levels * 0.0
    if HAS_TS:
        ts = tl.load(ts_ptr)
    b = 0
    while b < planes:
        weight, slope, by_mask = plane_of(tl.load(m_ptr + b), step, beta, power, HARD_M)
        if HAS_TM:
            tm = tl.load(tm_ptr + b)
        lift = by_mask * tm + weight * divide(ts, levels)
        p = load(p_ptr, offsets, mask, beta.dtype, MASKED)
        q = load(q_ptr, offsets, mask, beta.dtype, MASKED)
        if HARD_W:
            total = total + lift * difference_of(p, q, rate, True)
        else:
            difference, by_p, by_q = bits(p, q, rate)
            if HAS_TP:
                tp = load(tp_ptr, offsets, mask, beta.dtype, MASKED)
            if HAS_TQ:
                tq = load(tq_ptr, offsets, mask, beta.dtype, MASKED)
            total = total + (slope * (by_p * tp - by_q * tq) + lift * difference)
        p_ptr += n
        q_ptr += n
        tp_ptr += n
        tq_ptr += n
        power = power * 0.5
        b += 1
    store(y_ptr, offsets, total, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _bitplane_jvp_kernel(
    y_ptr, tp_ptr, tq_ptr, tm_ptr, ts_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, n, planes,
    HAS_TP: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TM: tl.constexpr, HAS_TS: tl.constexpr,
    HARD_W: tl.constexpr, HARD_M: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start = program(WIDE) * BLOCK
    if start + BLOCK <= n * ALIGN:
        _tangent_block(y_ptr, tp_ptr, tq_ptr, tm_ptr, ts_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start,
                       n * ALIGN, planes, HAS_TP, HAS_TQ, HAS_TM, HAS_TS, HARD_W, HARD_M, BLOCK, False)  # fmt: skip
    else:
        _tangent_block(y_ptr, tp_ptr, tq_ptr, tm_ptr, ts_ptr, p_ptr, q_ptr, m_ptr, scale_ptr, beta_ptr, start,
                       n * ALIGN, planes, HAS_TP, HAS_TQ, HAS_TM, HAS_TS, HARD_W, HARD_M, BLOCK, True)  # fmt: skip


def _sizes(p: torch.Tensor, *streams: torch.Tensor) -> tuple[int, int, int]:
    """Elements of a plane, elements of a block, and the alignment of the planes in elements."""
    n = p[0].numel()
    vector = _launch.vector(p, *streams)
    return n, _launch.block(p), vector if n % vector == 0 else 1


def _new(p: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.empty(p.shape[1:], dtype=dtype or p.dtype, device=p.device)


def bitplane(
    p: torch.Tensor,
    q: torch.Tensor,
    m: torch.Tensor,
    scale: torch.Tensor,
    beta: torch.Tensor,
    hard_w: bool,
    hard_m: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    p, q, m = p.contiguous(), q.contiguous(), m.contiguous()
    w = _new(p, dtype)
    n, block, align = _sizes(p, w)
    if n:
        with _launch.on_device(p):
            _bitplane_kernel[(triton.cdiv(n, block),)](
                _launch.raw(w), _launch.raw(p), _launch.raw(q), m, scale, beta, n // align, p.shape[0],
                hard_w, hard_m, block, align, _launch.wide(p), **OPTIONS,
            )  # fmt: skip
    return w


def bitplane_bwd(
    gw: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    m: torch.Tensor,
    scale: torch.Tensor,
    beta: torch.Tensor,
    hard_w: bool,
    hard_m: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gw, p, q, m = (t.contiguous() for t in (gw, p, q, m))
    gp, gq, gm, gs = (torch.empty_like(t) for t in (p, q, m, scale))
    n, _, align = _sizes(p, gw)
    # Beside two gradients and a sum, a thread has registers for one access of the narrowest tensor; in fp64 for two.
    block = max(_launch.BLOCK // 2, 32 * OPTIONS["num_warps"] * _launch.vector(p, gw))
    planes, blocks = p.shape[0], triton.cdiv(n, block)
    steps = triton.cdiv(blocks, _PIECES)
    pieces = triton.cdiv(blocks, steps) if blocks else 0
    part = torch.empty((planes, pieces), dtype=m.dtype, device=p.device)
    with _launch.on_device(p):
        if pieces:
            _bitplane_bwd_kernel[(pieces,)](
                _launch.raw(gp), _launch.raw(gq), part, _launch.raw(gw), _launch.raw(p), _launch.raw(q),
                m, scale, beta, n // align, planes, steps, pieces,
                hard_w, hard_m, _MOST_PLANES, block, align, _launch.wide(p), **OPTIONS,
            )  # fmt: skip
        _bitplane_finish_kernel[(1,)](gm, gs, part, m, scale, beta, planes, pieces, hard_m, _launch.BLOCK, **OPTIONS)
    return gp, gq, gm, gs


def bitplane_jvp(
    tp: torch.Tensor | None,
    tq: torch.Tensor | None,
    tm: torch.Tensor | None,
    ts: torch.Tensor | None,
    p: torch.Tensor,
    q: torch.Tensor,
    m: torch.Tensor,
    scale: torch.Tensor,
    beta: torch.Tensor,
    hard_w: bool,
    hard_m: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    p, q, m = p.contiguous(), q.contiguous(), m.contiguous()
    tw = _new(p, dtype)
    n, block, align = _sizes(p, tw)
    if n:
        # The pointer of an absent tangent is never read: any tensor stands in.
        tangents = [like if t is None else t.contiguous() for t, like in ((tp, p), (tq, q), (tm, m), (ts, scale))]
        with _launch.on_device(p):
            _bitplane_jvp_kernel[(triton.cdiv(n, block),)](
                _launch.raw(tw), *(_launch.raw(t) for t in tangents), _launch.raw(p), _launch.raw(q), m, scale, beta,
                n // align, p.shape[0], *(t is not None for t in (tp, tq, tm, ts)),
                hard_w, hard_m, block, align, _launch.wide(p), **OPTIONS,
            )  # fmt: skip
    return tw
