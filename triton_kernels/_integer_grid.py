# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization on an integer grid, element by element: csrc/math/fake_quantize.h operation by operation.

``RULES`` is the bit set of the raw ops, :mod:`_rules`.
"""

import triton
import triton.language as tl

from . import _rules
from ._common import divide, double_from_bits, round_even


@triton.jit
def hold(scale, eps):
    """The scale, held at eps from below; NaN stays."""
    return tl.where(scale < eps, eps, scale)


@triton.jit
def zero_code(zero, qmin, qmax, RULES: tl.constexpr):
    """The zero-point as the code of 0."""
    if _rules.ZERO_FLOAT & RULES:
        return zero + 0.0
    else:
        rounded = round_even(zero)
        lifted = tl.where(rounded < qmin, qmin, rounded)
        return tl.where(lifted > qmax, qmax, lifted) + 0.0


@triton.jit
def limits(qmin, qmax, eps_bits, dtype: tl.constexpr):
    """The grid as the functions below take it: (qmin, qmax, eps) in the arithmetic type."""
    return qmin.to(dtype), qmax.to(dtype), double_from_bits(eps_bits, dtype)


@triton.jit
def load_group(scale_ptr, zero_ptr, index, grid, RULES: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Held scale and zero-point of scale number `index`; without a zero-point the second is never read."""
    s = hold(tl.load(scale_ptr + index), grid[2])
    z = s
    if HAS_ZERO:
        z = zero_code(tl.load(zero_ptr + index), grid[0], grid[1], RULES)
    return s, z


@triton.jit
def code(x, s, z, grid, RULES: tl.constexpr, HAS_ZERO: tl.constexpr):
    """u = x in units of the scale, d = q - z, and the mask m. An absent zero-point adds nothing, not even +0."""
    qmin, qmax = grid[0], grid[1]
    if _rules.RECIPROCAL & RULES:
        u = x * divide(1.0, s)
    else:
        u = divide(x, s)
    v = u
    if HAS_ZERO and (_rules.ZERO_INSIDE & RULES):
        v = u + z
    r = round_even(v)
    tested = v
    if HAS_ZERO and not (_rules.ZERO_INSIDE & RULES):
        r = r + z
        tested = v + z
    lifted = tl.where(r > qmin, r, qmin)
    clamped = tl.where(lifted < qmax, lifted, qmax)
    overflow = qmin if _rules.INF_QMIN & RULES else qmax
    if _rules.NAN_QMIN & RULES:
        beyond = tl.where(r == r, overflow, qmin)
    else:
        beyond = tl.where(r == r, overflow, r)
    d = tl.where(r < 9223372036854775808.0, clamped, beyond)
    if HAS_ZERO:
        d = d - z
    if _rules.POSITIVE_ZERO & RULES:
        d = d + 0.0
    if _rules.MASK_AFTER & RULES:
        tested = r
    m = (tested >= qmin) & (tested <= qmax)
    if _rules.MASK_NONE & RULES:
        m = tl.full(m.shape, True, tl.int1)
    return u, d, m


@triton.jit
def scale_share(gy, u, d, m):
    """This element's share of the gradient of the scale."""
    return gy * tl.where(m, d - u, d)
