# SPDX-License-Identifier: Apache-2.0
"""Soft and hard bits: csrc/math/bitplane.h operation by operation."""

import triton
import triton.language as tl

from ._common import divide
from ._elementary import _as_bits, _as_number, _exp_tail


@triton.jit
def hard_bit(t):
    """1{t > 0}; NaN stays."""
    return tl.where(t > 0.0, 1.0, tl.where(t <= 0.0, 0.0, t)).to(t.dtype)


@triton.jit
def rate_of(beta):
    """Factor of a latent in the exponent of :func:`odds`."""
    log2_e: tl.constexpr = 1.4426950408889634 if beta.dtype == tl.float64 else 1.442695
    return (beta * log2_e) * -1.0


@triton.jit
def odds(rate, t):
    """exp(-x) of the bit sigmoid(x), as 2^u with u = rate t held within bounds."""
    wide: tl.constexpr = t.dtype == tl.float64
    most: tl.constexpr = 510.0 if wide else 62.0
    ln2: tl.constexpr = 0.6931471805599453 if wide else 0.6931472
    magic: tl.constexpr = 6755399441055744.0 if wide else 12582912.0
    magic_bits: tl.constexpr = 0x4338000000000000 if wide else 0x4B400000
    mantissa: tl.constexpr = 52 if wide else 23
    bias: tl.constexpr = 1023 if wide else 127
    u = rate * t
    raised = tl.where(u < -most, -most, u)
    held = tl.where(raised > most, most, raised)
    shifted = held + magic
    r = (held - (shifted - magic)) * ln2
    e = 1.0 + (r + (r * r) * _exp_tail(r))
    return e * _as_number(((_as_bits(shifted) - magic_bits) + bias) << mantissa)


@triton.jit
def difference_of(p, q, rate, HARD: tl.constexpr):
    """bit(p) - bit(q)."""
    if HARD:
        return hard_bit(p) - hard_bit(q)
    else:
        a, b = odds(rate, p), odds(rate, q)
        return (b - a) * divide(1.0, (1.0 + a) * (1.0 + b))


@triton.jit
def bits(p, q, rate):
    """bit(p) - bit(q) of soft bits, and their derivatives by beta p and beta q."""
    a, b = odds(rate, p), odds(rate, q)
    ua, ub = 1.0 + a, 1.0 + b
    inverse = divide(1.0, ua * ub)
    first, second = inverse * ub, inverse * ua
    return (b - a) * inverse, (a * first) * first, (b * second) * second


@triton.jit
def plane_of(m, step, beta, power, HARD: tl.constexpr):
    """Weight of a plane in units of the step, factor of its bits' slopes, and derivative by its mask latent."""
    if HARD:
        weight = power * hard_bit(m)
        by_mask = step * (power * 0.0)
    else:
        a = odds(rate_of(beta), m)
        soft = divide(1.0, 1.0 + a)
        weight = power * soft
        by_mask = step * (power * (beta * ((a * soft) * soft)))
    return weight, (step * weight) * beta, by_mask
