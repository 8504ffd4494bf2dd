# SPDX-License-Identifier: Apache-2.0
"""Rows of the general_quantize family: what the fast forms of fake_quantize leave out."""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, like, out_size, scale_shape, size_of


def _fake_general_quantize(
    x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules, dtype=None
):  # fmt: skip
    return like(x, group, dtype)


def _fake_general_quantize_bwd(
    gy, x, scale, zero_point, state, nu, a, delta, qmin, qmax, axis, group, eps, rules, factor, need_scale, need_delta
):  # fmt: skip
    gs = torch.empty_like(scale, memory_format=torch.contiguous_format) if need_scale else scale.new_empty(0)
    gz = torch.empty_like(gs) if need_scale and zero_point is not None else scale.new_empty(0)
    gd = scale.new_empty(()) if need_delta and delta is not None else scale.new_empty(0)
    return like(x, group), gs, gz, gd


def _fake_general_quantize_jvp(
    tx, ts, tz, x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules, factor, dtype=None
):  # fmt: skip
    return like(x, group, dtype)


def _fake_general_quantize_dynamic(
    x, state, nu, a, outer, qmin, qmax, axis, group, eps, rules, dtype=None
):  # fmt: skip
    scale = x.new_empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype))
    return like(x, group, dtype), scale


_DRAWN = "Tensor? state, Tensor? nu, Tensor? a"
_GRID = "int qmin, int qmax, int axis, int group, float eps, int rules"

ROWS = (
    Op(
        "general_quantize",
        "general_quantize",
        f"(Tensor x, Tensor scale, Tensor? zero_point, {_DRAWN}, {_GRID}, ScalarType? dtype=None) -> Tensor",
        _fake_general_quantize,
        lambda x, scale, zero_point, state, nu, a, *grid, dtype=None: (
            size_of(x, scale, zero_point) + out_size(x, dtype)
        ),
        """Fake-quantization by any rule: integer, binary and minifloat grids, rounding to even, away from zero or
        stochastically, with noise. ``state`` is int64[2], the seed and offset of Philox4x32-10; the draw of an element
        depends on them and on its place in the dense storage alone. ``nu`` and ``a`` are scalars in the compute type
        (absent: 1 and 0). Formulas: :class:`fastflat.QuantSpec`. ``qmin`` and ``qmax`` mean nothing to a minifloat
        grid. A map: the same bits on every backend.""",
    ),
    Op(
        "general_quantize_bwd",
        "general_quantize",
        f"(Tensor gy, Tensor x, Tensor scale, Tensor? zero_point, {_DRAWN}, Tensor? delta, {_GRID}, float factor,"
        " bool need_scale, bool need_delta) -> (Tensor gx, Tensor gs, Tensor gz, Tensor gd)",
        _fake_general_quantize_bwd,
        lambda gy, x, scale, zero_point, state, nu, a, delta, *grid: size_of(gy, x, x, scale, zero_point),
        """One pass for all gradients; the draws are made again from ``state``. With y = d s, the mask m and the
        residual frozen, k = 1 + delta sign(gy) (u - d) (``delta`` absent: 1)::

            gx = m k gy                                    x's dtype, the same bits on every backend
            gs = factor sum(gy (d - m k u))                pact: factor sum(gy (1 - m) d)
            gz = -factor s sum(gy (1 - m k))
            gd = sum(m |gy| (u - d) x)                     over all elements; empty without ``need_delta``

        Empty gradients as in ``fake_quantize_bwd``.""",
    ),
    Op(
        "general_quantize_jvp",
        "general_quantize",
        f"(Tensor? tx, Tensor? ts, Tensor? tz, Tensor x, Tensor scale, Tensor? zero_point, {_DRAWN}, {_GRID},"
        " float factor, ScalarType? dtype=None) -> Tensor",
        _fake_general_quantize_jvp,
        lambda tx, ts, tz, x, scale, zero_point, state, nu, a, *grid, dtype=None: (
            size_of(tx, ts, tz, x, scale, zero_point) + out_size(x, dtype)
        ),
        """The tangent of y, the exact transpose of ``general_quantize_bwd`` without ``delta``: EWGS is no gradient of
        anything, so its tangent is that of the straight-through rule. A map.""",
    ),
    Op(
        "general_quantize_dynamic",
        "general_quantize",
        f"(Tensor x, {_DRAWN}, Tensor? outer, {_GRID}, ScalarType? dtype=None) -> (Tensor y, Tensor scale)",
        _fake_general_quantize_dynamic,
        lambda x, state, nu, a, outer, *grid, dtype=None: size_of(x) + out_size(x, dtype),
        """The scale from the largest magnitude of its elements by the rules ``scale_*`` (absent: magnitude / largest
        value), then :func:`general_quantize` without zero-point. ``outer``, a scalar in the compute type, is the second
        level of ``scale_e4m3``. The maximum is exact: y and scale have the same bits on every backend. Formulas:
        csrc/math/block_scale.h.""",
    ),
)
