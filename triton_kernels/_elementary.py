# SPDX-License-Identifier: Apache-2.0
"""The elementary functions of ``csrc/math/elementary.h``, operation by operation, for fp32 and fp64.

Triton's own ``exp`` and ``log`` compile to approximations; these give the same bits on every device and in the
interpreter. The header explains the constants.
"""

import triton
import triton.language as tl

from ._common import divide


@triton.jit
def _as_bits(v):
    if v.dtype == tl.float64:
        return v.to(tl.int64, bitcast=True)
    else:
        return v.to(tl.int32, bitcast=True)


@triton.jit
def _as_number(bits):
    if bits.dtype == tl.int64:
        return bits.to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(n):
    mantissa: tl.constexpr = 52 if n.dtype == tl.int64 else 23
    bias: tl.constexpr = 1023 if n.dtype == tl.int64 else 127
    return _as_number((n + bias) << mantissa)


@triton.jit
def _exp_tail(r):
    if r.dtype == tl.float64:
        t = 2.5112036170890887e-08 + r * 2.082668869221173e-09
        t = 2.75575816191314e-07 + r * t
        t = 2.755723486442574e-06 + r * t
        t = 2.4801586926951727e-05 + r * t
        t = 0.0001984126989638054 + r * t
        t = 0.0013888888889115427 + r * t
        t = 0.008333333333317035 + r * t
        t = 0.041666666666666095 + r * t
        t = 0.16666666666666682 + r * t
        return 0.5 + r * t
    else:
        t = 8.369193e-03 + r * 1.3838927e-03
        t = 4.1668102e-02 + r * t
        t = 1.6666517e-01 + r * t
        return 4.9999994e-01 + r * t


@triton.jit
def _log_tail(z):
    if z.dtype == tl.float64:
        t = 0.15314064393661334 + z * 0.1479586134887594
        t = 0.18183563548947843 + z * t
        t = 0.22222198593865336 + z * t
        t = 0.2857142874211116 + z * t
        t = 0.3999999999941642 + z * t
        return 0.6666666666666734 + z * t
    else:
        t = 2.8498793e-01 + z * 2.4278857e-01
        t = 4.0000972e-01 + z * t
        return 6.666666e-01 + z * t


@triton.jit
def exp(x):
    """e^x; overflow gives infinity, NaN stays."""
    wide: tl.constexpr = x.dtype == tl.float64
    lowest: tl.constexpr = -746.0 if wide else -105.0
    highest: tl.constexpr = 710.0 if wide else 89.0
    magic: tl.constexpr = 6755399441055744.0 if wide else 12582912.0
    magic_bits: tl.constexpr = 0x4338000000000000 if wide else 0x4B400000
    log2_e: tl.constexpr = 1.4426950408889634 if wide else 1.442695
    ln2_high: tl.constexpr = 0.6931471805592082 if wide else 0.693145751953125
    ln2_low: tl.constexpr = 7.371002565167799e-13 if wide else 1.4286068e-06
    bias: tl.constexpr = 1023 if wide else 127
    raised = tl.where(x < lowest, lowest, x)
    held = tl.where(raised > highest, highest, raised)
    shifted = held * log2_e + magic
    whole = shifted - magic
    r = (held - whole * ln2_high) - whole * ln2_low
    p = 1.0 + (r + (r * r) * _exp_tail(r))
    n = _as_bits(shifted) - magic_bits
    half = ((n + (4 * bias + 4)) >> 1) - (2 * bias + 2)
    return (p * _power_of_two(half)) * _power_of_two(n - half)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); NaN stays."""
    least: tl.constexpr = -0x8000000000000000 if x.dtype == tl.float64 else -0x80000000
    e = exp(_as_number(_as_bits(x) | least))
    return divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def tanh(x):
    """To a few units in the last place of 1; NaN stays."""
    least: tl.constexpr = -0x8000000000000000 if x.dtype == tl.float64 else -0x80000000
    low = _as_number(_as_bits(x) | least)
    e = exp(low + low)
    return tl.where(x < 0.0, -1.0, 1.0).to(x.dtype) * divide(1.0 - e, 1.0 + e)


@triton.jit
def _normal_tail(t):
    if t.dtype == tl.float64:
        s = -0.027609556502353798 + t * 0.002437331602597286
        s = 0.13993655631293495 + t * s
        s = -0.413742840754715 + t * s
        s = 0.7791985074278353 + t * s
        s = -0.9610002298701803 + t * s
        s = 0.7809656074110198 + t * s
        s = -0.4202553085646161 + t * s
        s = 0.11124049021178187 + t * s
        s = 0.057521102147695714 + t * s
        s = -0.004199652280908166 + t * s
        s = 0.0876362105855102 + t * s
        s = 0.07361115764169901 + t * s
        s = 0.0949458459803783 + t * s
        s = 0.09957072420951622 + t * s
        return 0.09974405444180474 + t * s
    else:
        s = 0.3154557 + t * -0.08645083
        s = -0.21192595 + t * s
        s = 0.21965346 + t * s
        s = 0.06323166 + t * s
        s = 0.0994751 + t * s
        return 0.10056086 + t * s


@triton.jit
def normal(z):
    """The standard normal distribution, to a few units in the last place of 1, and its density."""
    peak: tl.constexpr = 0.3989422804014327 if z.dtype == tl.float64 else 0.3989423
    e = exp(-0.5 * (z * z))
    t = divide(tl.full(z.shape, 1.0, z.dtype), 1.0 + 0.25 * tl.abs(z))
    beyond = e * (t * _normal_tail(t))
    return tl.where(z < 0.0, beyond, 1.0 - beyond), e * peak


@triton.jit
def log_of_normal(x, exponent):
    """Natural logarithm of positive, finite, normal numbers times 2^exponent."""
    wide: tl.constexpr = x.dtype == tl.float64
    mantissa: tl.constexpr = 52 if wide else 23
    bias: tl.constexpr = 1023 if wide else 127
    one: tl.constexpr = 0x3FF0000000000000 if wide else 0x3F800000
    sqrt_half: tl.constexpr = 0x3FE6A09E667F3BCD if wide else 0x3F3504F3
    fraction_bits: tl.constexpr = 0xFFFFFFFFFFFFF if wide else 0x7FFFFF
    ln2_high: tl.constexpr = 0.6931471805592082 if wide else 0.693145751953125
    ln2_low: tl.constexpr = 7.371002565167799e-13 if wide else 1.4286068e-06
    above = _as_bits(x) + (one - sqrt_half)
    k = ((above >> mantissa) - bias).to(x.dtype) + exponent
    f = _as_number((above & fraction_bits) + sqrt_half) - 1.0
    s = divide(f, 2.0 + f)
    z = s * s
    h = 0.5 * (f * f)
    t = s * (h + z * _log_tail(z)) + k * ln2_low
    return k * ln2_high - ((h - t) - f)


@triton.jit
def log(x):
    """Natural logarithm: -infinity at +-0, NaN below."""
    wide: tl.constexpr = x.dtype == tl.float64
    smallest_normal: tl.constexpr = 2.2250738585072014e-308 if wide else 1.1754943508222875e-38
    lift: tl.constexpr = 18014398509481984.0 if wide else 16777216.0
    lift_exponent: tl.constexpr = -54.0 if wide else -24.0
    small = x < smallest_normal
    finite = log_of_normal(tl.where(small, x * lift, x), tl.where(small, lift_exponent, 0.0).to(x.dtype))
    beyond = tl.where(x < 0.0, float("nan"), x)
    special = tl.where(x == 0.0, float("-inf"), beyond)
    return tl.where((x > 0.0) & (x < float("inf")), finite, special)


@triton.jit
def sine_of_right_angles(f):
    """Sine of f right angles, |f| <= 1/2."""
    z = f * f
    if f.dtype == tl.float64:
        t = 5.693163721616766e-08 + z * -6.770366509454037e-10
        t = -3.5988469028847546e-06 + z * t
        t = 0.0001604411854244899 + z * t
        t = -0.0046817541353737025 + z * t
        t = 0.07969262624616921 + z * t
        t = -0.6459640975062463 + z * t
        return f * 1.5707963267948966 + f * (6.123233995736766e-17 + z * t)
    else:
        t = 7.9681866e-02 + z * -4.6060635e-03
        t = -6.4596367e-01 + z * t
        return f * 1.5707964 + f * (-4.371139e-08 + z * t)


@triton.jit
def cosine_of_right_angles(f):
    """Cosine of f right angles, |f| <= 1/2."""
    z = f * f
    if f.dtype == tl.float64:
        t = 4.7103031607185294e-07 + z * -6.285421083052827e-09
        t = -2.5202026537920282e-05 + z * t
        t = 0.000919260272508224 + z * t
        t = -0.020863480763173275 + z * t
        t = 0.25366950790104154 + z * t
        return 1.0 + z * (-1.2337005501361697 + z * t)
    else:
        t = -2.0855254e-02 + z * 8.935723e-04
        t = 2.5366852e-01 + z * t
        return 1.0 + z * (-1.2337005e00 + z * t)
