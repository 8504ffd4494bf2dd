# SPDX-License-Identifier: Apache-2.0
"""The ``row_tangents`` family: K tangents of layer norm, RMS norm, softmax and cross-entropy.

A program holds the primal values of some rows, or of one, and walks over the tangents; a row that is longer than a tile
is passed over twice for each of them. Sums are formed in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import divide, narrow, widen
from ._elementary import exp
from ._launch import OPTIONS

#: Elements of a tile of several rows, and of the longest row that a program holds; half in fp64.
_TILE, _LONGEST = 1024, 4096
#: Programs that fill any current GPU; with fewer, tangents are shared out among them, too.
_ENOUGH = 256


@triton.jit
def _fetch(pointer, offsets, mask):
    """Elements in the arithmetic type; 0 where the mask is off."""
    return widen(tl.load(pointer + offsets, mask=mask, other=0))


@triton.jit
def _write(pointer, offsets, v, mask):
    tl.store(pointer + offsets, narrow(v, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _total(v):
    """Sum of each row, [rows, 1], in fp64."""
    return tl.sum(v.to(tl.float64), 1, keep_dims=True)


@triton.jit
def _mean(total, D, dtype: tl.constexpr):
    return divide(total.to(dtype), D.to(dtype))


@triton.jit
def _share(R, share, K, ROWS: tl.constexpr):
    """Rows [ROWS, 1] of a program, and its first and last tangent."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(R, ROWS)
    rows = (pid % blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (pid // blocks) * share
    return rows, first, tl.minimum(first + share, K)


@triton.jit
def _norm_values(x, n, weight, along, bias, inside, at, k, D, m, s, inv, X: tl.constexpr, W: tl.constexpr,
                 ALONG: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """((x - m) - n s) inv w + n along + bias, of what there is."""
    v = n
    if X:
        v = ((x - m) - n * s) * inv
        if W:
            v = v * _fetch(weight, at, inside)
    if ALONG:
        by_weight = n * _fetch(along, k * D + at, inside)
        v = v + by_weight if X else by_weight
    if BIAS:
        by_bias = _fetch(bias, k * D + at, inside)
        v = v + by_bias if X or ALONG else by_bias
    return v


@triton.jit(do_not_specialize=["K", "R", "units", "share"])
def _norm_kernel(
    out, mean, scale, x, normal, inv, weight, along, bias, K, R, units, share, CENTERED: tl.constexpr,
    X: tl.constexpr, W: tl.constexpr, ALONG: tl.constexpr, BIAS: tl.constexpr, RESIDENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    D = units.to(tl.int64) * ALIGN
    rows, k, last = _share(R, share, K, ROWS)
    alive = rows < R
    at = tl.arange(0, BLOCK)[None, :]
    i = tl.load(inv + rows, mask=alive, other=0.0)
    C: tl.constexpr = inv.dtype.element_ty
    inside = alive & (at < D)
    if RESIDENT:
        n = _fetch(normal, rows * D + at, inside)
    while k < last:
        base = (k * R + rows) * D
        m, s = tl.zeros_like(i), tl.zeros_like(i)
        if RESIDENT:
            values = n
            if X:
                values = _fetch(x, base + at, inside)
                if CENTERED:
                    m = _mean(_total(values), D, C)
                s = _mean(_total(values * n), D, C)
            v = _norm_values(values, n, weight, along, bias, inside, at, k, D, m, s, i, X, W, ALONG, BIAS)
            _write(out, base + at, v, inside)
        else:
            if X:
                of_x = tl.zeros([ROWS, BLOCK], tl.float64)
                of_product = tl.zeros([ROWS, BLOCK], tl.float64)
                begin = D * 0
                while begin < D:
                    here = alive & (begin + at < D)
                    values = _fetch(x, base + begin + at, here)
                    if CENTERED:
                        of_x += values.to(tl.float64)
                    of_product += (values * _fetch(normal, rows * D + begin + at, here)).to(tl.float64)
                    begin += BLOCK
                if CENTERED:
                    m = _mean(_total(of_x), D, C)
                s = _mean(_total(of_product), D, C)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                of_normal = _fetch(normal, rows * D + begin + at, here)
                values = of_normal
                if X:
                    values = _fetch(x, base + begin + at, here)
                at_ = begin + at
                v = _norm_values(values, of_normal, weight, along, bias, here, at_, k, D, m, s, i, X, W, ALONG, BIAS)
                _write(out, base + begin + at, v, here)
                begin += BLOCK
        if X:
            tl.store(mean + k * R + rows, m, mask=alive)
            tl.store(scale + k * R + rows, -s * i * i, mask=alive)
        k += 1


@triton.jit
def _incoming(g, along, weight, grad, base, at, k, D, inside, G: tl.constexpr, ALONG: tl.constexpr, W: tl.constexpr):
    """rh = g w + grad along, of what there is; grad where nothing is."""
    rh = grad
    if G:
        rh = _fetch(g, base + at, inside)
        if W:
            rh = rh * _fetch(weight, at, inside)
    if ALONG:
        by_weight = grad * _fetch(along, k * D + at, inside)
        rh = rh + by_weight if G else by_weight
    return rh


@triton.jit
def _weighted(grad, weight, at, inside, W: tl.constexpr):
    return grad * _fetch(weight, at, inside) if W else grad


@triton.jit
def _tangent(x, base, at, inside, grad, X: tl.constexpr):
    return _fetch(x, base + at, inside) if X else tl.zeros_like(grad)


@triton.jit
def _backward_values(rh, n, x, h, numbers, RH: tl.constexpr, MOVED: tl.constexpr, SCALE: tl.constexpr):
    """The terms of csrc/math/row_tangents.h that there are."""
    rh_mean, inv, by_normal, m, by_x, h_mean, i = numbers
    v = n * by_normal
    if RH:
        v = (rh - rh_mean) * inv + v
    if MOVED:
        v = v + (x - m) * by_x
    if SCALE:
        v = v + (h - h_mean) * i
    return v


@triton.jit
def _backward_numbers(inv, i, m, h_mean, B, rh_mean, P, Q):
    return rh_mean, inv, -(inv * (P + inv * Q) + 3.0 * (i * B)), m, -(inv * inv) * B, h_mean, i


@triton.jit(do_not_specialize=["K", "R", "units", "share"])
def _norm_bwd_kernel(
    out, g, x, mean, scale, along, normal, grad, inv, weight, K, R, units, share, CENTERED: tl.constexpr,
    G: tl.constexpr, X: tl.constexpr, MEAN: tl.constexpr, SCALE: tl.constexpr, ALONG: tl.constexpr, W: tl.constexpr,
    RESIDENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    D = units.to(tl.int64) * ALIGN
    rows, k, last = _share(R, share, K, ROWS)
    alive = rows < R
    at = tl.arange(0, BLOCK)[None, :]
    of_inv = tl.load(inv + rows, mask=alive, other=0.0)
    C: tl.constexpr = inv.dtype.element_ty
    RH: tl.constexpr = G or ALONG
    MOVED: tl.constexpr = X or MEAN
    inside = alive & (at < D)
    h_mean = tl.zeros_like(of_inv)
    if RESIDENT:
        n = _fetch(normal, rows * D + at, inside)
        of_grad = _fetch(grad, rows * D + at, inside)
        h = _weighted(of_grad, weight, at, inside, W)
        if CENTERED:
            h_mean = _mean(_total(h), D, C)
        B = _mean(_total(h * n), D, C)
    else:
        of_h = tl.zeros([ROWS, BLOCK], tl.float64)
        of_product = tl.zeros([ROWS, BLOCK], tl.float64)
        begin = D * 0
        while begin < D:
            here = alive & (begin + at < D)
            part = _weighted(_fetch(grad, rows * D + begin + at, here), weight, begin + at, here, W)
            of_h += part.to(tl.float64)
            of_product += (part * _fetch(normal, rows * D + begin + at, here)).to(tl.float64)
            begin += BLOCK
        if CENTERED:
            h_mean = _mean(_total(of_h), D, C)
        B = _mean(_total(of_product), D, C)
    while k < last:
        of_k = k * R + rows
        base = of_k * D
        none = tl.zeros_like(of_inv)
        m, i, rh_mean, P, Q = none, none, none, none, none
        if MEAN:
            m = tl.load(mean + of_k, mask=alive, other=0.0)
        if SCALE:
            i = tl.load(scale + of_k, mask=alive, other=0.0)
        if RESIDENT:
            rh = _incoming(g, along, weight, of_grad, base, at, k, D, inside, G, ALONG, W)
            values = _tangent(x, base, at, inside, of_grad, X)
            if RH:
                if CENTERED:
                    rh_mean = _mean(_total(rh), D, C)
                P = _mean(_total(rh * n), D, C)
            if MOVED:
                Q = _mean(_total((values - m) * h), D, C)
            numbers = _backward_numbers(of_inv, i, m, h_mean, B, rh_mean, P, Q)
            v = _backward_values(rh, n, values, h, numbers, RH, MOVED, SCALE)
            _write(out, base + at, v, inside)
        else:
            of_rh = tl.zeros([ROWS, BLOCK], tl.float64)
            of_product = tl.zeros([ROWS, BLOCK], tl.float64)
            of_moved = tl.zeros([ROWS, BLOCK], tl.float64)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                part = _fetch(grad, rows * D + begin + at, here)
                rh = _incoming(g, along, weight, part, base, begin + at, k, D, here, G, ALONG, W)
                values = _tangent(x, base, begin + at, here, part, X)
                if RH:
                    of_rh += rh.to(tl.float64)
                    of_product += (rh * _fetch(normal, rows * D + begin + at, here)).to(tl.float64)
                if MOVED:
                    of_moved += ((values - m) * _weighted(part, weight, begin + at, here, W)).to(tl.float64)
                begin += BLOCK
            if RH:
                if CENTERED:
                    rh_mean = _mean(_total(of_rh), D, C)
                P = _mean(_total(of_product), D, C)
            if MOVED:
                Q = _mean(_total(of_moved), D, C)
            numbers = _backward_numbers(of_inv, i, m, h_mean, B, rh_mean, P, Q)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                part = _fetch(grad, rows * D + begin + at, here)
                rh = _incoming(g, along, weight, part, base, begin + at, k, D, here, G, ALONG, W)
                values = _tangent(x, base, begin + at, here, part, X)
                of_normal = _fetch(normal, rows * D + begin + at, here)
                of_weighted = _weighted(part, weight, begin + at, here, W)
                v = _backward_values(rh, of_normal, values, of_weighted, numbers, RH, MOVED, SCALE)
                _write(out, base + begin + at, v, here)
                begin += BLOCK
        k += 1


@triton.jit
def _probabilities(p, offsets, inside, LOG: tl.constexpr):
    q = _fetch(p, offsets, inside)
    return exp(q) if LOG else q


@triton.jit(do_not_specialize=["K", "R", "units", "share"])
def _softmax_kernel(
    out, t, p, scale, K, R, units, share, LOG: tl.constexpr, SCALE: tl.constexpr, RESIDENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    D = units.to(tl.int64) * ALIGN
    rows, k, last = _share(R, share, K, ROWS)
    alive = rows < R
    at = tl.arange(0, BLOCK)[None, :]
    inside = alive & (at < D)
    C: tl.constexpr = tl.float64 if t.dtype.element_ty == tl.float64 else tl.float32
    if RESIDENT:
        q = _probabilities(p, rows * D + at, inside, LOG)
    factor = tl.full([ROWS, 1], 1.0, C)
    if SCALE:
        factor = tl.load(scale + rows, mask=alive, other=0.0)
    while k < last:
        base = (k * R + rows) * D
        if RESIDENT:
            values = _fetch(t, base + at, inside)
            dot = _total(values * q).to(C)
            _write(out, base + at, (factor * q) * (values - dot), inside)
        else:
            of_product = tl.zeros([ROWS, BLOCK], tl.float64)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                part = _probabilities(p, rows * D + begin + at, here, LOG)
                of_product += (_fetch(t, base + begin + at, here) * part).to(tl.float64)
                begin += BLOCK
            dot = _total(of_product).to(C)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                part = _probabilities(p, rows * D + begin + at, here, LOG)
                values = _fetch(t, base + begin + at, here)
                _write(out, base + begin + at, (factor * part) * (values - dot), here)
                begin += BLOCK
        k += 1


@triton.jit
def _tangents(g, along, offsets, inside, p, G: tl.constexpr, ALONG: tl.constexpr):
    """Of the incoming gradient and of the probabilities; p in the place of what is absent."""
    of_g, of_along = p, p
    if G:
        of_g = _fetch(g, offsets, inside)
    if ALONG:
        of_along = _fetch(along, offsets, inside)
    return of_g, of_along


@triton.jit
def _softmax_bwd_values(g, along, p, grad, of_grad, of_along, of_g, G: tl.constexpr, ALONG: tl.constexpr):
    v = p
    if ALONG:
        v = along * (grad - of_grad) - p * of_along
    if G:
        v = v + p * (g - of_g) if ALONG else p * (g - of_g)
    return v


@triton.jit(do_not_specialize=["K", "R", "units", "share"])
def _softmax_bwd_kernel(
    out, g, along, p, grad, K, R, units, share, G: tl.constexpr, ALONG: tl.constexpr, RESIDENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    D = units.to(tl.int64) * ALIGN
    rows, k, last = _share(R, share, K, ROWS)
    alive = rows < R
    at = tl.arange(0, BLOCK)[None, :]
    inside = alive & (at < D)
    C: tl.constexpr = tl.float64 if p.dtype.element_ty == tl.float64 else tl.float32
    of_grad = tl.zeros([ROWS, 1], C)
    if RESIDENT:
        q = _fetch(p, rows * D + at, inside)
        incoming = _fetch(grad, rows * D + at, inside)
        if ALONG:
            of_grad = _total(incoming * q).to(C)
    elif ALONG:
        of_product = tl.zeros([ROWS, BLOCK], tl.float64)
        begin = D * 0
        while begin < D:
            here = alive & (begin + at < D)
            part = _fetch(grad, rows * D + begin + at, here) * _fetch(p, rows * D + begin + at, here)
            of_product += part.to(tl.float64)
            begin += BLOCK
        of_grad = _total(of_product).to(C)
    while k < last:
        base = (k * R + rows) * D
        of_along, of_g = tl.zeros([ROWS, 1], C), tl.zeros([ROWS, 1], C)
        if RESIDENT:
            values, moved = _tangents(g, along, base + at, inside, q, G, ALONG)
            if ALONG:
                of_along = _total(moved * incoming).to(C)
            if G:
                of_g = _total(values * q).to(C)
            v = _softmax_bwd_values(values, moved, q, incoming, of_grad, of_along, of_g, G, ALONG)
            _write(out, base + at, v, inside)
        else:
            by_along = tl.zeros([ROWS, BLOCK], tl.float64)
            by_g = tl.zeros([ROWS, BLOCK], tl.float64)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                of_p, part = _fetch(p, rows * D + begin + at, here), _fetch(grad, rows * D + begin + at, here)
                values, moved = _tangents(g, along, base + begin + at, here, of_p, G, ALONG)
                if ALONG:
                    by_along += (moved * part).to(tl.float64)
                if G:
                    by_g += (values * of_p).to(tl.float64)
                begin += BLOCK
            if ALONG:
                of_along = _total(by_along).to(C)
            if G:
                of_g = _total(by_g).to(C)
            begin = D * 0
            while begin < D:
                here = alive & (begin + at < D)
                of_p, part = _fetch(p, rows * D + begin + at, here), _fetch(grad, rows * D + begin + at, here)
                values, moved = _tangents(g, along, base + begin + at, here, of_p, G, ALONG)
                v = _softmax_bwd_values(values, moved, of_p, part, of_grad, of_along, of_g, G, ALONG)
                _write(out, base + begin + at, v, here)
                begin += BLOCK
        k += 1


def _launch_rows(kernel, k: int, like: torch.Tensor, pointers: tuple, flags: tuple) -> None:
    """`pointers`: tensors of the kernel in its order, None for absent ones, which are never read."""
    (rows, length), halved = like.shape, 2 if like.dtype == torch.float64 else 1
    if k == 0 or like.numel() == 0:
        return
    block = triton.next_power_of_2(length)
    resident = block <= _LONGEST // halved
    # At most 8 elements a thread, 4 of double: more would spill on some architectures.
    warps = max(4, block * halved // 256) if resident else 8
    block = block if resident else 2 * _TILE // halved
    tile_rows = max(1, _TILE // halved // block)
    blocks = triton.cdiv(rows, tile_rows)
    share = triton.cdiv(k, max(1, min(k, triton.cdiv(_ENOUGH, blocks))))
    vector = _launch.vector(like)
    align = vector if length % vector == 0 else 1
    given = [_launch.raw(like if t is None else t) for t in pointers]
    with _launch.on_device(like):
        options = {**OPTIONS, "num_warps": warps}
        numbers = (k, rows, length // align, share, *flags, resident, tile_rows, block, align)
        kernel[(blocks * triton.cdiv(k, share),)](*given, *numbers, **options)


def _count(*tangents: torch.Tensor | None) -> int:
    return next(len(t) for t in tangents if t is not None)


def row_tangents_norm(
    x: torch.Tensor | None,
    normal: torch.Tensor,
    inv: torch.Tensor,
    weight: torch.Tensor | None,
    along_weight: torch.Tensor | None,
    along_bias: torch.Tensor | None,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = _count(x, along_weight, along_bias)
    out = normal.new_empty((k, *normal.shape))
    mean, scale = inv.new_zeros((k, len(normal))), inv.new_zeros((k, len(normal)))
    there = tuple(t is not None for t in (x, weight, along_weight, along_bias))
    pointers = (out, mean, scale, x, normal, inv, weight, along_weight, along_bias)
    _launch_rows(_norm_kernel, k, normal, pointers, (centered, *there))
    return out, mean, scale


def row_tangents_norm_bwd(
    g: torch.Tensor | None,
    x: torch.Tensor | None,
    mean: torch.Tensor | None,
    scale: torch.Tensor | None,
    along_weight: torch.Tensor | None,
    normal: torch.Tensor,
    grad: torch.Tensor,
    inv: torch.Tensor,
    weight: torch.Tensor | None,
    centered: bool,
) -> torch.Tensor:
    k = _count(g, x, mean, scale, along_weight)
    out = normal.new_empty((k, *normal.shape))
    there = tuple(t is not None for t in (g, x, mean, scale, along_weight, weight))
    pointers = (out, g, x, mean, scale, along_weight, normal, grad, inv, weight)
    _launch_rows(_norm_bwd_kernel, k, normal, pointers, (centered, *there))
    return out


def row_tangents_softmax(t: torch.Tensor, p: torch.Tensor, scale: torch.Tensor | None, log: bool) -> torch.Tensor:
    out = torch.empty_like(t)
    _launch_rows(_softmax_kernel, len(t), p, (out, t, p, scale), (log, scale is not None))
    return out


def row_tangents_softmax_bwd(
    g: torch.Tensor | None, along: torch.Tensor | None, p: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    k = _count(g, along)
    out = p.new_empty((k, *p.shape))
    _launch_rows(_softmax_bwd_kernel, k, p, (out, g, along, p, grad), (g is not None, along is not None))
    return out
