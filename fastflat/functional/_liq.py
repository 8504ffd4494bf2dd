# SPDX-License-Identifier: Apache-2.0
"""The weight-normalising quantizer as users call it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.autograd import liq as rule
from fastflat.backends import kernels

__all__ = ["liq_quantize"]

#: Widths of the grid.
NARROWEST, WIDEST = 1, 16


def liq_quantize(
    w: Tensor,
    clip: Tensor,
    *,
    bits: int,
    axis: int | None = None,
    eps: float = 1e-8,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A weight, normalised and put on ``2^bits`` values between -clip and clip, ends included; clip can be learned::

        v = (w - mean) / max(std, eps)          mean and unbiased std over the tensor, or over each channel of `axis`
        u = v / c                               c = max(clip, eps)
        q = 2 round((clamp(u, -1, 1) + 1) / 2 * L) / L - 1          L = 2^bits - 1, ties to even
        y = c q

    0 is no value of the grid. A constant weight has v = 0, which is half-way between the two values about 0: it goes
    to the one with the even code, -c for 1 bit and +c/L from 2 bits on. NaN or infinity in w makes all of its channel
    NaN. Arithmetic runs in fp32 (fp64 for fp64 w), sums for the moments in fp64; given the moments, all backends give
    the same bits.

    Gradients, with mean, std, the mask ``m = 1{|u| <= 1}`` and the residual q - u frozen, in one pass::

        dL/dw    = m dL/dy / max(std, eps)
        dL/dclip = sum dL/dy (q - u where m, sign(u) elsewhere)

    mean and std count as constants, as published: dL/dw is not orthogonal to 1 and w as it would be through the
    normalisation, so a shift or a stretch of w, which change nothing of y, are not free of gradient. Second
    derivatives are 0, since y is linear in (w, clip) when all that is frozen is. Kept for backward: w, clip and the
    moments.

    Args:
        w: any shape and dense layout; float32, bfloat16, float16 or float64.
        clip: ``[]``, in units of the normalised weight (2 to 3 at the start), positive; float32 (float64 for float64
            w) or the dtype of w.
        bits: 1 to 16.
        axis: the channel axis of the moments; None for one pair.
        eps: the least std and clip that are divided by.
        dtype: storage type of y, to cast an fp32 w to bfloat16 or float16 in the same pass.

    Returns:
        y with the shape of w and the strides of ``torch.empty_like(w)``, in units of the normalised weight.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Liu et al., "Sharpness-aware Quantization for Deep Neural Networks", 2021: the weight quantizer of its
    released code (LIQ with weight normalisation).
    """
    op = "liq_quantize"
    axis, _ = _checks.dense_data(op, "w", w, axis)
    if isinstance(bits, bool) or not isinstance(bits, int):
        _checks.fail(op, "bits", "be an int", type(bits))
    if not NARROWEST <= bits <= WIDEST:
        _checks.fail(op, "bits", f"lie in [{NARROWEST}, {WIDEST}]", bits)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        _checks.fail(op, "eps", "be a number", type(eps))
    if not eps > 0:
        _checks.fail(op, "eps", "be positive", eps)
    if dtype is not None:
        _checks.stored_as(op, w, dtype)
    clip = _clip(op, clip, w)
    found = None if torch.compiler.is_compiling() else kernels(w.device.type)
    return rule.liq(w, clip, rule.Plan(2**bits - 1, axis, float(eps), dtype, found))


def _clip(op: str, clip: object, w: Tensor) -> Tensor:
    """The clip in the compute type."""
    if not isinstance(clip, Tensor):
        hint = f"; write torch.tensor({clip})" if isinstance(clip, (int, float)) else ""
        _checks.fail(op, "clip", "be a tensor", type(clip), hint)
    if clip.dim():
        _checks.fail(op, "clip", "have shape []", list(clip.shape))
    compute = compute_dtype(w.dtype)
    if clip.dtype not in (compute, w.dtype):
        _checks.fail(op, "clip", f"be {compute}" + ("" if w.dtype == compute else f" or {w.dtype}"), clip.dtype)
    if clip.device != w.device:
        _checks.fail(op, "clip", f"be on the device of w ({w.device})", clip.device)
    if _checks.VALUES_WANTED:
        _checks.scale_values(op, clip, "clip")
    return clip.to(compute)
