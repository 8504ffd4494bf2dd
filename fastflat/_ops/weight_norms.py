# SPDX-License-Identifier: Apache-2.0
"""Rows of the weight_norms family: moments and norms of a weight matrix, and a saturating nonlinearity.

Weights are contiguous ``[O, I]`` (any shape for the nonlinearity), fp32, bf16, fp16 or fp64; results of rows, columns
and the matrix are in the compute dtype (fp32; fp64 for fp64 weights). Sums have an order that shape and dtype fix and
agree across backends to 1e-5 (fp64: 1e-13) of the sum of the magnitudes of their terms; given them, gradients and the
nonlinearity are maps: the same bits everywhere.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, size_of


def _fake_reduce(w):
    (rows, columns), dtype = w.shape, compute_dtype(w.dtype)
    return tuple(w.new_empty(shape, dtype=dtype) for shape in ((3, rows), (rows,), (columns,), (2,)))


def _fake_saturate(w, alpha):
    return torch.empty_like(w, memory_format=torch.contiguous_format)


ROWS = (
    Op(
        "weight_norms_reduce",
        "weight_norms",
        "(Tensor w) -> (Tensor moments, Tensor row_l1, Tensor col_l1, Tensor absmax)",
        _fake_reduce,
        lambda w: size_of(w, *_fake_reduce(w.to("meta"))),
        """Of a matrix ``[O, I]`` in one read of memory::

            moments[:, o] = mean, variance m2 (of the population), skewness m3 / m2^(3/2) of row o (0 if constant)
            row_l1[o] = sum_i |w_oi|,  col_l1[i] = sum_o |w_oi|
            absmax = the largest magnitude, and how many elements have it

        NaN spreads over what its element is part of; the largest magnitude leaves it out.""",
    ),
    Op(
        "weight_norms_reduce_bwd",
        "weight_norms",
        "(Tensor g_moments, Tensor g_row, Tensor g_col, Tensor g_absmax, Tensor w, Tensor moments, Tensor absmax)"
        " -> Tensor",
        lambda g_moments, g_row, g_col, g_absmax, w, moments, absmax: _fake_saturate(w, None),
        lambda *arguments: size_of(*arguments, arguments[4]),
        """``gw = a + d (b + c d) + sign(w) (g_row[o] + g_col[i] + g_absmax / count where |w| is largest)`` with
        ``d = w - mean``, sign(0) = 0 and, from the gradients of mean, variance and skewness s of the row::

            a = (g_mean - 3 g_skew m2^(-1/2)) / I,  b = (2 g_var - 3 g_skew s / m2) / I,  c = 3 g_skew m2^(-3/2) / I

        without the terms of the skewness where m2 = 0. ``g_absmax`` is ``[]``.""",
    ),
    Op(
        "weight_norms_saturate",
        "weight_norms",
        "(Tensor w, Tensor alpha) -> Tensor",
        _fake_saturate,
        lambda w, alpha: size_of(w, w, alpha),
        """``y = alpha tanh(w / alpha)``, alpha ``[]`` in the compute dtype.""",
    ),
    Op(
        "weight_norms_saturate_bwd",
        "weight_norms",
        "(Tensor gy, Tensor w, Tensor alpha) -> (Tensor gw, Tensor galpha)",
        lambda gy, w, alpha: (_fake_saturate(w, alpha), torch.empty_like(alpha)),
        lambda gy, w, alpha: size_of(gy, w, w, alpha, alpha),
        """With ``x = w / alpha``, ``t = tanh(x)``: ``gw = gy (1 - t^2)``, ``galpha = sum gy (t - x (1 - t^2))``.""",
    ),
)
