# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization by every rule, element by element: csrc/math/general_quantize.h and minifloat.h operation by
operation. ``RULES`` is the bit set of the raw ops, :mod:`_rules`; ``PRESENT`` says which optional tensors there are.

Absent terms are left out, where the header adds a neutral -0, multiplies or divides by 1. ``STORAGE`` is the storage
type of x, to which rules may round what is between.
"""

import triton
import triton.language as tl

from . import _rules
from ._common import copy_sign, divide, narrow, round_even, widen
from ._integer_grid import hold, limits, zero_code
from ._noise import load_state, normal_at, normal_run, uniform_at, uniform_run

#: Bits of PRESENT.
ZERO = tl.constexpr(1)
NU = tl.constexpr(2)
A = tl.constexpr(4)
DELTA = tl.constexpr(8)


@triton.jit
def stored(v, dtype: tl.constexpr):
    """v rounded to the storage type of x, where that has 16 bits."""
    if dtype == tl.int16 or dtype == tl.float16:
        return widen(narrow(v, dtype))
    else:
        return v


@triton.jit
def _precise(v, RULES: tl.constexpr, STORAGE: tl.constexpr):
    """v, rounded to the storage type of x by COMPUTE_INPUT."""
    if _rules.COMPUTE_INPUT & RULES:
        return stored(v, STORAGE)
    else:
        return v


@triton.jit
def general_limits(qmin, qmax, eps_bits, dtype: tl.constexpr, RULES: tl.constexpr):
    """The grid as the functions below take it: (lowest value, highest value, eps) in the arithmetic type."""
    grid = limits(qmin, qmax, eps_bits, dtype)
    if (_rules.MINIFLOATS | _rules.BINARY) & RULES:
        largest, _, _ = format_of(grid[1], RULES)
        grid = (-largest, largest, grid[2])
    return grid


@triton.jit
def format_of(like, RULES: tl.constexpr):
    """Largest value, smallest normal value and 2^-mantissa bits of the grid's format, in the type of `like`."""
    if _rules.E4M3 & RULES:
        largest, smallest, unit = 448.0, 0.015625, 0.125
    elif _rules.E5M2 & RULES:
        largest, smallest, unit = 57344.0, 6.103515625e-05, 0.25
    elif _rules.E3M2 & RULES:
        largest, smallest, unit = 28.0, 0.25, 0.25
    elif _rules.E2M3 & RULES:
        largest, smallest, unit = 7.5, 1.0, 0.125
    elif _rules.E2M1 & RULES:
        largest, smallest, unit = 6.0, 1.0, 0.5
    else:
        largest, smallest, unit = 1.0, 1.0, 1.0
    return (
        tl.full(like.shape, largest, like.dtype),
        tl.full(like.shape, smallest, like.dtype),
        tl.full(like.shape, unit, like.dtype),
    )


@triton.jit
def load_group(
    scale_ptr, zero_ptr, index, grid, RULES: tl.constexpr, PRESENT: tl.constexpr, STORAGE: tl.constexpr
):  # fmt: skip
    """What scale number `index` shares: (s, by, out, z, reach). With RECIPROCAL u = x by; with INVERSE that, too, and
    y = d / out. Without a zero-point z is never read; `reach` is the magnitude up to which MASK_ABSMAX passes."""
    reach = tl.load(scale_ptr + index)
    s = hold(reach, grid[2])
    by, out = s, s
    if _rules.INVERSE & RULES:
        # At or below eps all codes are 0.
        k = divide(grid[1], reach)
        by, out = tl.where(reach <= grid[2], 0.0, k), tl.where(reach <= grid[2], 1.0, k)
    elif _rules.RECIPROCAL & RULES:
        by = _precise(divide(1.0, s), RULES, STORAGE)
    z = s
    if ZERO & PRESENT:
        z = zero_code(tl.load(zero_ptr + index), grid[0], grid[1], RULES)
    return s, by, out, z, reach


@triton.jit
def load_scalars(nu_ptr, a_ptr, dtype: tl.constexpr, PRESENT: tl.constexpr):
    """The device scalars (nu, a); 1 and 0 where absent."""
    nu = tl.full([], 1.0, dtype)
    a = tl.full([], 0.0, dtype)
    if NU & PRESENT:
        nu = tl.load(nu_ptr).to(dtype)
    if A & PRESENT:
        a = tl.load(a_ptr).to(dtype)
    return nu, a


@triton.jit
def draws(
    state_ptr, first, offsets, dtype: tl.constexpr, RULES: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """One draw for each element `offsets`. RUN: the offsets are runs of RUN, in order, from `first` ([R, 1] for a tile
    [R, RUN]) on, and these are multiples of 8; with RUN = 0 they may be any."""
    if _rules.DRAWS & RULES:
        state = load_state(state_ptr)
        if _rules.NOISE_NORMAL & RULES:
            xi = normal_run(state, first, RUN) if RUN else normal_at(state, offsets)
        else:
            xi = uniform_run(state, first, RUN) if RUN else uniform_at(state, offsets)
        if _rules.CENTRED & RULES:
            xi = xi - 0.5
        return tl.reshape(xi, offsets.shape).to(dtype)
    else:
        return tl.zeros(offsets.shape, dtype)


@triton.jit
def _whole(v, xi, RULES: tl.constexpr):
    """An integer beside v by the rounding of the rules."""
    even = round_even(v)
    if _rules.ROUND_STOCHASTIC & RULES:
        floor = tl.where(even > v, even - 1.0, even)
        return tl.where(xi < v - floor, floor + 1.0, floor)
    elif _rules.ROUND_AWAY & RULES:
        # A tie that went towards zero goes the other way.
        unit = copy_sign(tl.full(v.shape, 1.0, v.dtype), v)
        return tl.where((v - even) * unit == 0.5, even + unit, even)
    else:
        return even


@triton.jit
def _sign(v, xi, RULES: tl.constexpr):
    """The grid {-1, 1}: sign(v), with +1 at both zeros; stochastically with the mean v."""
    one = tl.full(v.shape, 1.0, v.dtype)
    if _rules.ROUND_STOCHASTIC & RULES:
        return tl.where(xi < (v + 1.0) * 0.5, one, -one)
    else:
        return tl.where(v < 0.0, -one, one)


@triton.jit
def on_floats(v, xi, RULES: tl.constexpr):
    """v on the grid of a minifloat format: an integer between two exact scalings by powers of two."""
    largest, smallest, unit = format_of(v, RULES)
    bound = largest + largest
    lifted = tl.where(v > -bound, v, -bound)
    near = tl.where(lifted < bound, lifted, bound)
    bits: tl.constexpr = tl.uint64 if v.dtype == tl.float64 else tl.uint32
    exponent: tl.constexpr = 0x7FF0000000000000 if v.dtype == tl.float64 else 0x7F800000
    inverse: tl.constexpr = 0x7FE0000000000000 if v.dtype == tl.float64 else 0x7F000000
    binade = (near.to(bits, bitcast=True) & exponent).to(v.dtype, bitcast=True)
    step = tl.where(binade < smallest, smallest, binade) * unit
    upscaled = near * (inverse - step.to(bits, bitcast=True)).to(v.dtype, bitcast=True)
    return _whole(upscaled, xi, RULES) * step


@triton.jit
def _clamped(t, qmin, qmax):
    lifted = tl.where(t > qmin, t, qmin)
    return tl.where(lifted < qmax, lifted, qmax)


@triton.jit
def code(
    x, xi, group, scalars, grid, RULES: tl.constexpr, PRESENT: tl.constexpr, STORAGE: tl.constexpr
):  # fmt: skip
    """u = x in units of the scale, d = y in units of the scale, e = what rounding took away, the mask m, and which
    elements BYPASS kept (without it: none)."""
    s, by, _, z, reach = group
    nu, a = scalars
    qmin, qmax = grid[0], grid[1]
    if _rules.RECTIFIED & RULES:
        x = tl.where(x <= 0.0, 0.0, x)
    if (_rules.INVERSE | _rules.RECIPROCAL) & RULES:
        u = _precise(x * by, RULES, STORAGE)
    else:
        u = _precise(divide(x, s), RULES, STORAGE)
    inside: tl.constexpr = (ZERO & PRESENT) and (_rules.ZERO_INSIDE & RULES)
    outside: tl.constexpr = (ZERO & PRESENT) and not (_rules.ZERO_INSIDE & RULES)
    v = u
    if inside:
        v = _precise(u + z, RULES, STORAGE)
    if _rules.ADDITIVE & RULES:
        v = v + nu * xi
    w = v
    if outside:
        w = v + z
    w = _precise(w, RULES, STORAGE)
    if _rules.ADDITIVE & RULES:
        r = w
    elif _rules.MINIFLOATS & RULES:
        r = on_floats(v, xi, RULES)
    elif _rules.BINARY & RULES:
        r = _sign(v, xi, RULES)
    else:
        r = _whole(v, xi, RULES)
        if outside:
            r = r + z
        r = _precise(r, RULES, STORAGE)
    overflow = qmin if _rules.INF_QMIN & RULES else qmax
    if _rules.NAN_QMIN & RULES:
        beyond = tl.where(w == w, overflow, qmin)
    else:
        beyond = tl.where(w == w, overflow, w)
    d = tl.where((r < 9223372036854775808.0) & (w == w), _clamped(r, qmin, qmax), beyond)
    if ZERO & PRESENT:
        d = d - z
    d = _precise(d, RULES, STORAGE)
    if _rules.POSITIVE_ZERO & RULES:
        d = d + 0.0
    e = u - d
    if _rules.MASK_NONE & RULES:
        m = tl.full(d.shape, True, tl.int1)
    else:
        if _rules.MASK_ABSMAX & RULES:
            m = tl.abs(x) <= reach
        elif _rules.MASK_AFTER & RULES:
            m = (r >= qmin) & (r <= qmax) & (w == w)
        else:
            m = (w >= qmin) & (w <= qmax)
        if _rules.NAN_PASSES & RULES:
            m = m | (w != w)
    if _rules.RECTIFIED & RULES:
        m = m & (x != 0.0)
    if _rules.NOISE_TEMPER & RULES:
        clip = _clamped(w, qmin, qmax)
        if ZERO & PRESENT:
            clip = clip - z
        d = (d + a * (clip - d)) + nu * xi
    kept = m
    if _rules.NOISE_BYPASS & RULES:
        # A kept element has no share in the scale: u = d = 0 say so, whatever u was.
        kept = xi < nu
        u, d, e = tl.where(kept, 0.0, u), tl.where(kept, 0.0, d), tl.where(kept, 0.0, e)
        m = m | kept
    return u, d, e, m, kept


@triton.jit
def value(x, d, kept, group, RULES: tl.constexpr):
    """y of what :func:`code` gives."""
    s, _, out, _, _ = group
    if _rules.INVERSE & RULES:
        return divide(d, out)
    elif _rules.NOISE_BYPASS & RULES:
        return tl.where(kept, x, d * s)
    else:
        return d * s
