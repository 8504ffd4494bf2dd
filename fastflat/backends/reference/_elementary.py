# SPDX-License-Identifier: Apache-2.0
"""The elementary functions of ``csrc/math/elementary.h``, operation by operation: the same bits on any device.

fp32 and fp64. torch's own exp and log differ between devices and vector widths, hence these.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class _Format:
    """The constants of one type; csrc/math/elementary.h says what they are."""

    integer: torch.dtype
    mantissa: int
    bias: int
    sqrt_half: int
    magic: float
    magic_bits: int
    smallest_normal: float
    lift: float
    lift_exponent: float
    lowest: float
    highest: float
    log2_e: float
    ln2_high: float
    ln2_low: float
    right_angle: float
    right_angle_low: float
    exp_tail: tuple[float, ...]
    log_tail: tuple[float, ...]
    sine_tail: tuple[float, ...]
    cosine_tail: tuple[float, ...]
    normal_tail: tuple[float, ...]
    peak_density: float


_FORMATS = {
    torch.float32: _Format(
        integer=torch.int32,
        mantissa=23,
        bias=127,
        sqrt_half=0x3F3504F3,
        magic=12582912.0,
        magic_bits=0x4B400000,
        smallest_normal=2.0**-126,
        lift=2.0**24,
        lift_exponent=24.0,
        lowest=-105.0,
        highest=89.0,
        log2_e=1.442695,
        ln2_high=0.693145751953125,
        ln2_low=1.4286068e-06,
        right_angle=1.5707964,
        right_angle_low=-4.371139e-08,
        exp_tail=(4.9999994e-01, 1.6666517e-01, 4.1668102e-02, 8.369193e-03, 1.3838927e-03),
        log_tail=(6.666666e-01, 4.0000972e-01, 2.8498793e-01, 2.4278857e-01),
        sine_tail=(-6.4596367e-01, 7.9681866e-02, -4.6060635e-03),
        cosine_tail=(-1.2337005e00, 2.5366852e-01, -2.0855254e-02, 8.935723e-04),
        normal_tail=(0.10056086, 0.0994751, 0.06323166, 0.21965346, -0.21192595, 0.3154557, -0.08645083),
        peak_density=0.3989423,
    ),
    torch.float64: _Format(
        integer=torch.int64,
        mantissa=52,
        bias=1023,
        sqrt_half=0x3FE6A09E667F3BCD,
        magic=6755399441055744.0,
        magic_bits=0x4338000000000000,
        smallest_normal=2.0**-1022,
        lift=2.0**54,
        lift_exponent=54.0,
        lowest=-746.0,
        highest=710.0,
        log2_e=1.4426950408889634,
        ln2_high=0.6931471805592082,
        ln2_low=7.371002565167799e-13,
        right_angle=1.5707963267948966,
        right_angle_low=6.123233995736766e-17,
        exp_tail=(
            0.5,
            0.16666666666666682,
            0.041666666666666095,
            0.008333333333317035,
            0.0013888888889115427,
            0.0001984126989638054,
            2.4801586926951727e-05,
            2.755723486442574e-06,
            2.75575816191314e-07,
            2.5112036170890887e-08,
            2.082668869221173e-09,
        ),
        log_tail=(
            0.6666666666666734,
            0.3999999999941642,
            0.2857142874211116,
            0.22222198593865336,
            0.18183563548947843,
            0.15314064393661334,
            0.1479586134887594,
        ),
        sine_tail=(
            -0.6459640975062463,
            0.07969262624616921,
            -0.0046817541353737025,
            0.0001604411854244899,
            -3.5988469028847546e-06,
            5.693163721616766e-08,
            -6.770366509454037e-10,
        ),
        cosine_tail=(
            -1.2337005501361697,
            0.25366950790104154,
            -0.020863480763173275,
            0.000919260272508224,
            -2.5202026537920282e-05,
            4.7103031607185294e-07,
            -6.285421083052827e-09,
        ),
        normal_tail=(
            0.09974405444180474,
            0.09957072420951622,
            0.0949458459803783,
            0.07361115764169901,
            0.0876362105855102,
            -0.004199652280908166,
            0.057521102147695714,
            0.11124049021178187,
            -0.4202553085646161,
            0.7809656074110198,
            -0.9610002298701803,
            0.7791985074278353,
            -0.413742840754715,
            0.13993655631293495,
            -0.027609556502353798,
            0.002437331602597286,
        ),
        peak_density=0.3989422804014327,
    ),
}


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    sum_ = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        sum_ = c + x * sum_
    return sum_


def _power_of_two(n: Tensor, f: _Format, dtype: torch.dtype) -> Tensor:
    return ((n + f.bias) << f.mantissa).view(dtype)


def exp(x: Tensor) -> Tensor:
    """e^x for fp32 or fp64 x of any shape; overflow gives infinity, NaN stays."""
    f = _FORMATS[x.dtype]
    x = x.contiguous()
    raised = torch.where(x < f.lowest, torch.full_like(x, f.lowest), x)
    held = torch.where(raised > f.highest, torch.full_like(x, f.highest), raised)
    shifted = held * f.log2_e + f.magic
    whole = shifted - f.magic
    r = (held - whole * f.ln2_high) - whole * f.ln2_low
    p = 1.0 + (r + (r * r) * _horner(r, f.exp_tail))
    n = shifted.view(f.integer) - f.magic_bits
    half = ((n + (4 * f.bias + 4)) >> 1) - (2 * f.bias + 2)
    return (p * _power_of_two(half, f, x.dtype)) * _power_of_two(n - half, f, x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) for fp32 or fp64 x of any shape; NaN stays."""
    e = exp(-x.abs())
    return torch.where(x < 0, e, torch.ones_like(e)) / (1.0 + e)


def tanh(x: Tensor) -> Tensor:
    """For fp32 or fp64 x of any shape, to a few units in the last place of 1; NaN stays."""
    low = -x.abs()
    e = exp(low + low)
    return torch.where(x < 0, -torch.ones_like(e), torch.ones_like(e)) * ((1.0 - e) / (1.0 + e))


def normal(z: Tensor) -> tuple[Tensor, Tensor]:
    """The standard normal distribution and its density, the former to a few units in the last place of 1."""
    f = _FORMATS[z.dtype]
    e = exp(-0.5 * (z * z))
    t = 1.0 / (1.0 + 0.25 * z.abs())
    beyond = e * (t * _horner(t, f.normal_tail))
    return torch.where(z < 0, beyond, 1.0 - beyond), e * f.peak_density


def log_of_normal(x: Tensor, exponent: Tensor | float = 0.0) -> Tensor:
    """Natural logarithm of positive, finite, normal numbers times 2^exponent."""
    f = _FORMATS[x.dtype]
    one = f.bias << f.mantissa
    above = x.contiguous().view(f.integer) + (one - f.sqrt_half)
    fraction = (above & ((1 << f.mantissa) - 1)) + f.sqrt_half
    k = ((above >> f.mantissa) - f.bias).to(x.dtype) + exponent
    m = fraction.view(x.dtype) - 1.0
    s = m / (2.0 + m)
    z = s * s
    h = 0.5 * (m * m)
    t = s * (h + z * _horner(z, f.log_tail)) + k * f.ln2_low
    return k * f.ln2_high - ((h - t) - m)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of fp32 or fp64 x of any shape: -infinity at +-0, NaN below."""
    f = _FORMATS[x.dtype]
    small = x < f.smallest_normal
    nothing = torch.zeros_like(x)
    finite = log_of_normal(
        torch.where(small, x * f.lift, x), torch.where(small, torch.full_like(x, -f.lift_exponent), nothing)
    )
    beyond = torch.where(x < 0, torch.full_like(x, float("nan")), x)
    special = torch.where(x == 0, torch.full_like(x, float("-inf")), beyond)
    return torch.where((x > 0) & (x < float("inf")), finite, special)


def sine_cosine(f: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of f right angles, |f| <= 1/2, fp32 or fp64."""
    c = _FORMATS[f.dtype]
    z = f * f
    sine = f * c.right_angle + f * (c.right_angle_low + z * _horner(z, c.sine_tail))
    return sine, 1.0 + z * _horner(z, c.cosine_tail)


def sqrt(x: Tensor) -> Tensor:
    """The IEEE square root: torch's own is not, on CPU. fp32 goes through fp64, fp64 through a correction."""
    return _corrected_sqrt(x) if x.dtype == torch.float64 else x.double().sqrt().to(x.dtype)


def _corrected_sqrt(x: Tensor) -> Tensor:
    """fp64: one step of Newton with the exact residual, of the fraction of x so that no product leaves its range."""
    fraction, exponent = torch.frexp(x)
    odd = (exponent & 1) == 1
    a = torch.where(odd, fraction * 0.5, fraction)  # in [1/4, 1); the exponent that is left is even
    exponent = torch.where(odd, exponent + 1, exponent)
    r = a.sqrt()
    # r = high + low of 26 bits each: their products are exact (Dekker).
    split = r * 134217729.0
    high = split - (split - r)
    low = r - high
    residual = ((a - high * high) - 2.0 * (high * low)) - low * low
    exact = torch.ldexp(r + residual / (2.0 * r), exponent // 2)
    return torch.where((x > 0) & (x < float("inf")), exact, x.sqrt())
