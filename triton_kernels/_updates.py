# SPDX-License-Identifier: Apache-2.0
"""The updates of ``csrc/math/descent.h``, element by element. A row is the tuple that :func:`load_row` makes."""

import triton
import triton.language as tl

from ._common import divide, square_root
from ._elementary import exp, log

#: Columns of a row.
C1, C2, RATE, BETA1 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GAIN1, BETA2, GAIN2, ROOT = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
UNBIAS, EPS, DECAY, SHRINK = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
POWER, GAIN, AVERAGE, FLAGS = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14), tl.constexpr(15)
COLUMNS = tl.constexpr(16)
#: Bits of the flags.
SKIP, FIRST, NESTEROV = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)


@triton.jit
def load_row(rows, t, C: tl.constexpr):
    """The numbers of tensor t in the type C, its flags as an integer."""
    row = rows + COLUMNS * t
    return (
        tl.load(row + C1).to(C), tl.load(row + C2).to(C), tl.load(row + RATE).to(C), tl.load(row + BETA1).to(C),
        tl.load(row + GAIN1).to(C), tl.load(row + BETA2).to(C), tl.load(row + GAIN2).to(C), tl.load(row + ROOT).to(C),
        tl.load(row + UNBIAS).to(C), tl.load(row + EPS).to(C), tl.load(row + DECAY).to(C), tl.load(row + SHRINK).to(C),
        tl.load(row + POWER).to(C), tl.load(row + GAIN).to(C), tl.load(row + AVERAGE).to(C),
        tl.load(row + FLAGS).to(tl.int32),
    )  # fmt: skip


@triton.jit
def lamb_rate(rows, sums, t, C: tl.constexpr):
    """The rate times |w| / |q|; the ratio is 1 where a norm is 0 or not finite, or the gain is 0."""
    rate = tl.load(rows + COLUMNS * t + RATE)
    gain = tl.load(rows + COLUMNS * t + GAIN)
    ratio = square_root(tl.load(sums + 3 * t + 2)) / square_root(tl.load(sums + 3 * t))
    ratio = tl.where((ratio > 0.0) & (ratio < float("inf")), ratio, 1.0)
    return tl.where(gain != 0.0, rate * ratio, rate).to(C)


@triton.jit
def decayed(row, u, w):
    return tl.where(row[DECAY] != 0.0, u + row[DECAY] * w, u)


@triton.jit
def moments(row, u, m, v):
    """Mean and square after u."""
    return row[BETA1] * m + row[GAIN1] * u, row[BETA2] * v + row[GAIN2] * (u * u)


@triton.jit
def adam(row, m, x):
    return divide(m, divide(square_root(x), row[ROOT]) + row[EPS])


@triton.jit
def padam(row, m, x):
    """m / (sqrt(x) + eps)^power"""
    return divide(m, exp(row[POWER] * log(square_root(x) + row[EPS])))


@triton.jit
def lamb(row, w, m, v):
    """The update before the ratio of norms."""
    q = divide(m * row[UNBIAS], divide(square_root(v), row[ROOT]) + row[EPS])
    return decayed(row, q, w)
