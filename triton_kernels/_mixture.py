# SPDX-License-Identifier: Apache-2.0
"""A mixture of quantizers, element by element: csrc/math/mixquant.h operation by operation.

A term that is left out is -0 there, the neutral element; Triton's constants have none, so it is made from its bits.
"""

import triton
import triton.language as tl

from ._common import double_from_bits
from ._integer_grid import code, hold


@triton.jit
def negative_zero(dtype: tl.constexpr):
    """-0 as a scalar of `dtype`."""
    if dtype == tl.float64:
        return tl.full([], 0x8000000000000000, tl.uint64).to(tl.float64, bitcast=True)
    else:
        return tl.full([], 0x80000000, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def epsilon(eps_bits, dtype: tl.constexpr):
    """The lower bound of scales in the arithmetic type."""
    return double_from_bits(eps_bits, dtype)


@triton.jit
def weighted(v, factor):
    """The term v * factor of a sum, -0 where the factor is 0."""
    return tl.where(factor == 0.0, negative_zero(v.dtype), v * factor)


@triton.jit
def passed(v, passing):
    """v * passing, +0 where nothing passes."""
    return tl.where(passing == 0.0, 0.0, v * passing)


@triton.jit
def candidate(scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, index, channels, j, candidates, eps):
    """Held scales, grid and weight of candidate j; beyond the last one, the first with weight 0."""
    present = j < candidates
    at = tl.where(present, j, 0)
    s = hold(tl.load(scale_ptr + at.to(index.dtype) * channels + index), eps)
    grid = (tl.load(qmin_ptr + at), tl.load(qmax_ptr + at), eps)
    return s, grid, tl.load(weight_ptr + j, mask=present, other=0.0)


@triton.jit
def term(x, s, grid, RULES: tl.constexpr):
    """Q(x), dQ/ds and the mask."""
    u, d, m = code(x, s, s, grid, RULES, False)
    return d * s, tl.where(m, d - u, d), m


@triton.jit
def scale_gradient(total, w, factor):
    """Gradient of a scale from sum(gy dQ/ds): +0 for a candidate that is left out."""
    return tl.where(w == 0.0, 0.0, total * (w * factor))
