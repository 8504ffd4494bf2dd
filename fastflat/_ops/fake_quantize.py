# SPDX-License-Identifier: Apache-2.0
"""Rows of the fake_quantize family."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, like, out_size, scale_shape, size_of


def _fake_fake_quantize(x, scale, zero_point, qmin, qmax, axis, group, eps, rules, dtype=None):
    return like(x, group, dtype)


def _fake_fake_quantize_bwd(gy, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor, need_scale):
    gs = torch.empty_like(scale, memory_format=torch.contiguous_format) if need_scale else scale.new_empty(0)
    gz = torch.empty_like(gs) if need_scale and zero_point is not None else scale.new_empty(0)
    return like(x, group), gs, gz


def _fake_fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor, dtype=None):
    return like(x, group, dtype)


def _fake_fake_quantize_absmax(x, qmin, qmax, axis, group, eps, rules, dtype=None):
    scale = x.new_empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype))
    return like(x, group, dtype), scale


_GRID = "int qmin, int qmax, int axis, int group, float eps, int rules"

ROWS = (
    Op(
        "fake_quantize",
        "fake_quantize",
        f"(Tensor x, Tensor scale, Tensor? zero_point, {_GRID}, ScalarType? dtype=None) -> Tensor",
        _fake_fake_quantize,
        lambda x, scale, zero_point, *grid, dtype=None: size_of(x, scale, zero_point) + out_size(x, dtype),
        """``y = (clamp(round(x/s) + z, qmin, qmax) - z) s`` with ``s = max(scale, eps)``; ties to even; the order
        of rounding and zero-point, division or reciprocal, NaN, overflow and -0 by ``rules``. A map: the same
        bits on every backend.""",
    ),
    Op(
        "fake_quantize_bwd",
        "fake_quantize",
        f"(Tensor gy, Tensor x, Tensor scale, Tensor? zero_point, {_GRID}, float factor, bool need_scale)"
        " -> (Tensor gx, Tensor gs, Tensor gz)",
        _fake_fake_quantize_bwd,
        lambda gy, x, scale, zero_point, *grid: size_of(gy, x, x, scale, zero_point),
        """One pass for all gradients, with the mask m and the residual frozen::

            gx = m gy                                  x's dtype, the same bits on every backend
            gs = factor sum(gy ((q - z) - m u))        over the elements of a scale, compute type
            gz = -factor s sum(gy (1 - m))

        Sums run in an order that depends on shape and dtype only. Without ``need_scale`` gs and gz are empty
        ``[0]``; without a zero-point gz is.""",
    ),
    Op(
        "fake_quantize_jvp",
        "fake_quantize",
        f"(Tensor? tx, Tensor? ts, Tensor? tz, Tensor x, Tensor scale, Tensor? zero_point, {_GRID}, float factor,"
        " ScalarType? dtype=None) -> Tensor",
        _fake_fake_quantize_jvp,
        lambda tx, ts, tz, x, scale, zero_point, *grid, dtype=None: (
            size_of(tx, ts, tz, x, scale, zero_point) + out_size(x, dtype)
        ),
        """The tangent of y, the exact transpose of ``fake_quantize_bwd``::

            ty = m tx + ((q - z) - m u) (factor ts) - (1 - m) s (factor tz)

        Absent tangents count as 0. ``tx`` is in the storage type of x or of the result. A map: the same bits on
        every backend.""",
    ),
    Op(
        "fake_quantize_absmax",
        "fake_quantize",
        f"(Tensor x, {_GRID}, ScalarType? dtype=None) -> (Tensor y, Tensor scale)",
        _fake_fake_quantize_absmax,
        lambda x, *grid, dtype=None: size_of(x) + out_size(x, dtype),
        """Dynamic scale and quantization together: ``scale = max|x| / max(qmax, 1)`` over the elements of a
        scale, then :func:`fake_quantize` without zero-point. The maximum is exact, so y and scale have the same
        bits on every backend. NaN in the data makes its scale NaN; no data gives scale 0.""",
    ),
)
