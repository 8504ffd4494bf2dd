# SPDX-License-Identifier: Apache-2.0
"""Moments and norms of weights, and the saturating nonlinearity, as users call them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.autograd import weight_norms as rule
from fastflat.backends import kernels

__all__ = ["WeightStats", "saturate", "weight_reduce"]


class WeightStats(NamedTuple):
    """Results of :func:`weight_reduce`."""

    mean: Tensor
    var: Tensor
    skew: Tensor
    row_l1: Tensor
    col_l1: Tensor
    absmax: Tensor


def weight_reduce(w: Tensor) -> WeightStats:
    """Moments of each output channel and the norms of a weight, read once, with a backward of one pass::

        mean[o], var[o] = mean_i (w_oi - mean)^2, skew[o] = mean_i (w_oi - mean)^3 / var^(3/2)  (0 where var is 0)
        row_l1[o] = sum_i |w_oi|    col_l1[i] = sum_o |w_oi|    absmax = max |w|

    The largest row_l1 is the matrix norm of linf, the largest col_l1 that of l1. Gradients of all six are added in one
    pass; sign(0) is 0, and elements that share the largest magnitude share its gradient evenly. Higher derivatives are
    in torch's own operations. NaN spreads over its row's and column's results; absmax leaves it out.

    Args:
        w: ``[O, I]`` or ``[O, ...]``, which counts as ``[O, I]``; not empty; float32, bfloat16, float16 or float64.

    Returns:
        A named tuple: mean, var, skew, row_l1 ``[O]``, col_l1 ``[I]``, absmax ``[]``; float32 (float64 for float64 w).

    Raises:
        TypeError, ValueError: w does not fit, in one line that says what was wanted and what came.

    Source: Park et al., "Symmetry Regularization and Saturating Nonlinearity for Robust Quantization",
    arXiv 2208.00338; Tsai et al., "Formalizing Generalization and Robustness of Neural Networks to Weight
    Perturbations", arXiv 2103.02200.
    """
    op = "weight_reduce"
    _checks.dense_data(op, "w", w, None)
    if w.dim() < 2 or w.numel() == 0:
        _checks.fail(op, "w", "have shape [O, I, ...] and an element", list(w.shape))
    found = None if torch.compiler.is_compiling() else kernels(w.device.type)
    moments, row_l1, col_l1, absmax = rule.reduce(w.flatten(1), found)
    return WeightStats(*moments.unbind(-2), row_l1, col_l1, absmax)


def saturate(w: Tensor, alpha: Tensor) -> Tensor:
    """SatNL: a weight bounded by a fixed or learned alpha::

        y = alpha tanh(w / alpha)       dy/dw = 1 - tanh^2      dy/dalpha = tanh - w / alpha (1 - tanh^2)

    Both gradients in one pass; kept for backward are w and alpha. tanh comes from a rational function near 0 and from
    the polynomial exponential beyond: relative error below 2^-21 in fp32, the same bits on every backend. Higher
    derivatives are in torch's own operations. As alpha grows y becomes w; NaN stays; alpha 0 gives NaN.

    Args:
        w: any shape; float32, bfloat16, float16 or float64.
        alpha: ``[]``, positive, in units of w; float32 (float64 for float64 w) or the dtype of w.

    Returns:
        y, shape and dtype of w, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Park et al., arXiv 2208.00338.
    """
    op = "saturate"
    _checks.dense_data(op, "w", w, None)
    if not isinstance(alpha, Tensor):
        hint = f"; write torch.tensor({alpha})" if isinstance(alpha, (int, float)) else ""
        _checks.fail(op, "alpha", "be a tensor", type(alpha), hint)
    if alpha.dim():
        _checks.fail(op, "alpha", "have shape []", list(alpha.shape))
    compute = compute_dtype(w.dtype)
    if alpha.dtype not in (compute, w.dtype):
        _checks.fail(op, "alpha", f"be {compute}" + ("" if w.dtype == compute else f" or {w.dtype}"), alpha.dtype)
    if alpha.device != w.device:
        _checks.fail(op, "alpha", f"be on the device of w ({w.device})", alpha.device)
    if _checks.VALUES_WANTED:
        _checks.scale_values(op, alpha, "alpha")
    found = None if torch.compiler.is_compiling() else kernels(w.device.type)
    return rule.saturate(w, alpha.to(compute), found)
