# SPDX-License-Identifier: Apache-2.0
"""Binarization as users call it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.autograd import binarize as rule
from fastflat.backends import kernels

__all__ = ["binarize"]


def binarize(
    x: Tensor,
    importance: Tensor | None = None,
    *,
    axis: int | None = None,
    group: int | None = None,
    clip: float = 1.0,
    through_alpha: bool = True,
    dtype: torch.dtype | None = None,
    return_scale: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One bit an element and one scale a channel, the scale that loses least where importance says that it matters::

        alpha = sum h|x| / sum h          over the elements of a channel, a group or the tensor
        y     = alpha sign(x)             sign(+-0) = +1

    h is `importance`, and 1 without it: then alpha is mean|x|, the scale of XNOR-Net. alpha minimises
    ``sum h (x - alpha sign(x))^2``. A scale whose importances sum to 0, or that has no elements, is 0. A NaN makes
    its whole scale NaN, and so does an infinity of importance 0.

    Gradient, straight through the sign with the mask ``m = 1{|x| <= clip}``, exact through alpha::

        dL/dx = alpha m dL/dy + sum(dL/dy sign(x)) h sign(x) / sum h          0 for the last term where sum h is 0

    Without `through_alpha` alpha counts as a constant of y and the last term is absent. Forward mode is the
    transpose. Higher orders freeze signs, masks and the residual ``sign(x) - m x``: y is then quadratic in x, with
    the symmetric second derivative ``y''(u, v) = m (u A(v) + v A(u))``, ``A(v) = sum(h sign(x) v) / sum h``, without
    `through_alpha` 0. importance is a constant and has no gradient. Kept for backward: x, importance and alpha.

    alpha is a quotient of sums whose order depends on shape and dtype only; backends agree on it to 4e-6 of its value
    (fp64: 1e-14), and y follows from alpha bit for bit.

    Args:
        x: any shape and dense layout; float32, bfloat16, float16 or float64.
        importance: h >= 0, say a diagonal of a Hessian or of a Fisher matrix: of the shape of x; or of as many axes,
            each of the size that x has or of size 1; or of the shape of x without `axis`, shared by all channels.
            float32 (float64 for float64 x) or the dtype of x.
        axis: the channel axis; None for one scale.
        group: size of the blocks along the last axis that have a scale each; not together with axis.
        clip: magnitude in units of x up to which the gradient passes the sign; ``math.inf`` lets all pass.
        through_alpha: whether the gradient of y passes through alpha, too.
        dtype: storage type of y, to cast an fp32 x to bfloat16 or float16 in the same pass.
        return_scale: return alpha as well.

    Returns:
        y with the shape of x and the strides of ``torch.empty_like(x)`` (contiguous with groups). With `return_scale`
        (y, alpha): alpha ``[]``, ``[C]`` or ``[..., K/group]`` in the compute type, differentiable by x.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016, eq. 6 (h = 1); Park et al., "BiTAT", 2022 (h by importance).
    """
    op = "binarize"
    axis, group = _checks.dense_data(op, "x", x, axis, group)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        _checks.fail(op, "clip", "be a number", type(clip))
    if not clip > 0:
        _checks.fail(op, "clip", "be positive", clip, "; math.inf lets all gradients pass")
    if dtype is not None:
        _checks.stored_as(op, x, dtype)
    h = None if importance is None else _importance(op, importance, x, axis)
    found = None if torch.compiler.is_compiling() else kernels(x.device.type)
    plan = rule.Plan(float(clip), bool(through_alpha), axis, group, dtype, found)
    y, alpha = rule.binarize(x, h, plan)
    return (y, alpha) if return_scale else y


def _importance(op: str, h: object, x: Tensor, axis: int) -> Tensor:
    """The importance with the axes of x, in the compute type."""
    name = "importance"
    if not isinstance(h, Tensor):
        _checks.fail(op, name, "be a tensor", type(h))
    if h.device != x.device:
        _checks.fail(op, name, f"be on the device of x ({x.device})", h.device)
    compute = compute_dtype(x.dtype)
    if h.dtype not in (compute, x.dtype):
        _checks.fail(op, name, f"be {compute}" + ("" if x.dtype == compute else f" or {x.dtype}"), h.dtype)
    if h.requires_grad:
        _checks.fail(op, name, "need no gradient", "requires_grad=True", "; detach it")
    shape = list(h.shape)
    if axis >= 0 and h.dim() == x.dim() - 1:
        h = h.unsqueeze(axis)
    if h.dim() != x.dim() or any(a not in (1, b) for a, b in zip(h.shape, x.shape, strict=True)):
        without = f", or {[*x.shape[:axis], *x.shape[axis + 1 :]]}" if axis >= 0 else ""
        _checks.fail(op, name, f"have shape {list(x.shape)}, with 1 for any size{without}", shape)
    if _checks.VALUES_WANTED and not bool(((h >= 0) & torch.isfinite(h)).all()):
        _checks.fail(op, name, "be finite and not negative", "other values")
    return h.to(compute)
