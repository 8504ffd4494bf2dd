# SPDX-License-Identifier: Apache-2.0
"""Gradients and tangent of fake-quantization by every rule, element by element: ``backward`` and ``tangent`` of
csrc/math/general_quantize.h. The mask and the residual of the forward pass are frozen."""

import triton
import triton.language as tl

from . import _rules
from ._common import divide
from ._general_grid import DELTA, stored


@triton.jit
def inner(u, d, m, RULES: tl.constexpr):
    """What the share of the scale has less than d."""
    if _rules.PACT & RULES:
        return tl.where(m, d, 0.0)
    else:
        return tl.where(m, u, 0.0)


@triton.jit
def passed(gy, m, group, RULES: tl.constexpr, STORAGE: tl.constexpr):
    """The cotangent that passes by the straight-through rule."""
    if _rules.THROUGH_CHAIN & RULES:
        s, by, _, _, _ = group
        if _rules.INVERSE & RULES:
            gy = stored(gy, STORAGE) * by
        elif _rules.RECIPROCAL & RULES:
            gy = stored(gy * s, STORAGE) * by
        else:
            gy = divide(stored(gy * s, STORAGE), s)
    return tl.where(m, gy, 0.0)


@triton.jit
def scaled_by_error(straight, e, m, delta, PRESENT: tl.constexpr):
    """gx, and what EWGS adds to it: |straight| delta e, whose sign is that of the cotangent times that of e. delta = 0
    is the straight-through rule in every bit."""
    if DELTA & PRESENT:
        some = delta != 0.0
        extra = tl.where(some, tl.abs(straight) * (delta * tl.where(m, e, 0.0)), 0.0)
        return tl.where(some, straight + extra, straight), extra
    else:
        return straight, tl.zeros_like(straight)


@triton.jit
def shares(gy, x, straight, extra, u, d, e, m, RULES: tl.constexpr, PRESENT: tl.constexpr):
    """This element's shares of three sums: of the scale's gradient, of the cotangents that do not pass, and of
    delta's gradient."""
    of_scale = gy * (d - inner(u, d, m, RULES))
    outside = tl.where(m, 0.0, gy)
    of_delta = outside
    if DELTA & PRESENT:
        of_scale = of_scale - extra * tl.where(m, u, 0.0)
        outside = outside - extra
        of_delta = (tl.abs(straight) * tl.where(m, e, 0.0)) * x
    return of_scale, outside, of_delta


@triton.jit
def tangent(tx, ts, tz, u, d, m, group, RULES: tl.constexpr):
    """The tangent of y, the transpose of the straight-through rule."""
    by_scale = (d - inner(u, d, m, RULES)) * ts
    if _rules.INVERSE & RULES:
        by_zero = tl.where(m, 0.0, tz)
    else:
        by_zero = tl.where(m, 0.0, group[0] * tz)
    return (tl.where(m, tx, 0.0) + by_scale) - by_zero
