# SPDX-License-Identifier: Apache-2.0
"""Rows of the tangents family: element-wise and channel-wise work on K tangents at once.

Tangents are contiguous ``[K, O, C, I]`` (outer, channels, inner), element-wise primals ``[O, C, I]``, all of one dtype
(fp32, bf16, fp16, fp64); numbers of channels ``[C]`` and ``[K, C]`` are fp32 (fp64 beside fp64). Channels-last data
arrives as ``[K, N H W, C, 1]``, data without channels with C = 1. Primals are read once for all tangents.
"""

from __future__ import annotations

from fastflat._ops._row import Op, compute_dtype, size_of


def _fake_combine(t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, kind):
    tangent = t0 if t0 is not None else t1
    return f0.new_empty((r0.shape[0], *f0.shape)) if tangent is None else tangent.new_empty(tangent.shape)


def _bytes_of_combine(t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, kind):
    out = size_of(f0) * r0.shape[0] if t0 is None and t1 is None else size_of(t1 if t0 is None else t0)
    return size_of(t0, p0, t1, p1, f0, r0, f1, r1, shift, mask) + out


def _fake_sums(t0, p0, t1, p1, mask, total):
    numbers, wide = (t0.shape[0], t0.shape[2]), compute_dtype(t0.dtype)
    return (
        t0.new_empty(t0.shape if mask is not None else 0),
        t0.new_empty(numbers if p0 is not None else 0, dtype=wide),
        t0.new_empty(numbers if total else 0, dtype=wide),
    )


def _bytes_of_sums(t0, p0, t1, p1, mask, total):
    numbers = t0.shape[0] * t0.shape[2] * compute_dtype(t0.dtype).itemsize
    mapped = size_of(t0) if mask is not None else 0
    return size_of(t0, p0, t1, p1, mask) + mapped + numbers * ((p0 is not None) + bool(total))


ROWS = (
    Op(
        "tangents_combine",
        "tangents",
        "(Tensor? t0, Tensor? p0, Tensor? t1, Tensor? p1, Tensor? f0, Tensor? r0, Tensor? f1, Tensor? r1,"
        " Tensor? shift, Tensor? mask, int kind) -> Tensor",
        _fake_combine,
        _bytes_of_combine,
        """``out[k] = ((((a0 t0[k] + a1 t1[k]) + f0 r0[k]) + f1 r1[k]) + shift[k]) mask``, ``[K, O, C, I]``, of tangents
        ``t0``, ``t1``; primals ``f0``, ``f1``, ``mask`` ``[O, C, I]``; ``r0``, ``r1``, ``shift`` ``[K, C]``. Absent
        terms are left out; at least t0, t1 or f0 with r0. A map, the same bits on every backend: products and sums
        rounded one by one in fp32 (fp64), the result once.

        ``kind`` 0: a0 = ``p0``, a1 = ``p1``, each absent (1), ``[O, C, I]`` or ``[C]``. Others are activations phi with
        p = ``p0`` as their backward sees it and g = ``p1`` the gradient at their output, both ``[O, C, I]``: a0 =
        phi'(p), a1 = phi''(p) g, so that t0 along g and t1 along p give the tangent of phi'(p) g.

        1 sigmoid, y = phi: ``y (1 - y)``, ``g (1 - (y + y))``
        2 tanh, y = phi: ``1 - y y``, ``(-2 g) y``
        3 silu, s = sigmoid(z), w = 1 - s: ``s (1 + z w)``, ``((s w) (2 + z (1 - (s + s)))) g``
        4 gelu, Phi and n the normal distribution and density: ``Phi + z n``, ``(n (2 - z z)) g``
        5 gelu by tanh, t = tanh(u), u = c (z + 0.044715 z^3), c = sqrt(2 / pi), q = 1 - t t, h = z / 2: ``(1 + t) / 2 +
        (h q) u'``, ``(q u' + h (q u'' - ((2 t) q) (u' u'))) g``
        6 relu: ``p <= 0 ? 0 : 1`` (NaN passes); no t1

        3, 4 and 5 take z held within +-1000, where all is at its limit, so that infinity gives the limit, too. Phi and
        tanh err by less than 2^-21.9 (fp64: 2^-51) absolutely.

        Source: R-operator, Pearlmutter 1994.""",
    ),
    Op(
        "tangents_sums",
        "tangents",
        "(Tensor t0, Tensor? p0, Tensor? t1, Tensor? p1, Tensor? mask, bool total) -> (Tensor, Tensor, Tensor)",
        _fake_sums,
        _bytes_of_sums,
        """One pass over tangents ``t0``, ``t1`` ``[K, O, C, I]`` beside primals ``[O, C, I]``: ``mapped = t0[k] mask``
        (a map, the same bits on every backend), ``dots[k, c] = sum_oi t0[k] p0 + t1[k] p1``, ``totals[k, c] = sum_oi
        t0[k]``, fp32 (fp64) ``[K, C]``; what is not asked for, by ``mask``, ``p0`` or ``total``, is empty ``[0]``. t1
        and p1 come together, and with p0. Products and short sums are formed in fp32 (fp64), long ones in fp64, in an
        order that depends on shape and dtype alone; backends agree to a relative 1e-5 (fp64: 1e-13) of the sum of the
        magnitudes of their terms.""",
    ),
)
