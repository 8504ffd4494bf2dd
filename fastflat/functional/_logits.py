# SPDX-License-Identifier: Apache-2.0
"""Losses and statistics over logits as users call them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat.autograd import logits as rule
from fastflat.backends import kernels

__all__ = ["SoftmaxStats", "affine_logit_scan", "rebalanced_ce", "softmax_js", "softmax_kl", "softmax_stats"]

_REDUCTIONS = ("none", "mean", "sum")


class SoftmaxStats(NamedTuple):
    """Results of :func:`softmax_stats`, ``[N]`` each."""

    ce: Tensor
    p_y: Tensor
    gap: Tensor
    curvature: Tensor


def softmax_kl(z0: Tensor, z: Tensor, weight: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of each sample's distribution from those of K other sets of logits, averaged::

        P = softmax(z0[b])    Q_k = softmax(z[k, b])
        kl[b] = weight[b] / K sum_k sum_c P_c (log P_c - log Q_kc)

    Gradients flow to both sides, and to the weight::

        dkl/dz[k] = weight / K (Q_k - P)
        dkl/dz0   = weight / K sum_k P (log P - log Q_k - KL_k)

    Each logit is read once forward and once backward, and what is kept for backward is z0, z and three numbers for
    each of their rows. Logits of any size do not overflow. A logit of -inf is a class that cannot be: it adds nothing,
    and its gradient is that of a class with probability 0; a class that P has and a Q has not makes kl infinite and
    the gradient to z0 NaN. NaN, +inf and rows of -inf alone give NaN.

    Args:
        z0: ``[B, C]``, float32, bfloat16, float16 or float64.
        z: ``[K, B, C]``, or ``[B, C]`` for one; K >= 1; dtype and device of z0.
        weight: ``[B]``, one factor a sample; None for 1.

    Returns:
        kl ``[B]``, float32 (float64 for float64 logits), in nats.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Tsiligkaridis and Tsiligkaridis, "Diverse Gaussian Noise Consistency Regularization", arXiv 2104.01231.
    """
    return _divergence("softmax_kl", z0, z, weight, False)


def softmax_js(z0: Tensor, z: Tensor, weight: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence of the K + 1 distributions of each sample::

        P_0 = softmax(z0[b])    P_k = softmax(z[k-1, b])    M = mean of P_0 .. P_K
        js[b] = weight[b] / (K + 1) sum_i sum_c P_ic (log P_ic - log M_c)              in [0, log(K + 1)]

        djs/dz_i = weight / (K + 1) P_i (log P_i - log M - KL(P_i, M))

    Always finite: M is 0 only where all are. Arguments, results, special values and errors are those of
    :func:`softmax_kl`. Source: Lin, "Divergence measures based on the Shannon entropy", 1991; Hendrycks et al.,
    "AugMix", arXiv 1912.02781.
    """
    return _divergence("softmax_js", z0, z, weight, True)


def rebalanced_ce(
    z: Tensor,
    y: Tensor,
    *,
    mult: Tensor | None = None,
    add: Tensor | None = None,
    margin: Tensor | None = None,
    s: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with the corrections for imbalanced classes, in one kernel::

        a_c  = s (mult_c z_c + add_c - margin_c 1{c = y})
        loss = class_weight_y (log sum_c exp(a_c) - a_y)

    LDAM: `margin`, `s`. Logit adjustment: ``add = tau log prior``. VS: `mult` and `add`. Deferred re-weighting:
    `class_weight`. With none of them this is ``torch.nn.functional.cross_entropy``, whose meaning `ignore_index`,
    `class_weight` and `reduction` have: the mean is divided by the weights of the rows that count. Gradient to z, with
    p = softmax(a)::

        dloss/dz_c = class_weight_y s mult_c (p_c - 1{c = y})

    Gradients to mult, add, margin and class_weight exist too, in torch's own operations. Logits of any size do not
    overflow, -inf is a class that cannot be, NaN and +inf give NaN for their row, and so does a label outside of
    [0, C) that is not `ignore_index` (labels are not looked at before the call, which would wait for the device).
    The reduction over rows is torch's.

    Args:
        z: ``[N, C]`` logits, float32, bfloat16, float16 or float64.
        y: ``[N]`` labels, int64, on the device of z.
        mult, add, margin, class_weight: ``[C]``, float32 (float64 for float64 z) or the dtype of z; None for 1, 0, 0
            and 1.
        s: scale of the logits, a finite number.
        reduction: ``mean``, ``sum`` or ``none``.

    Returns:
        ``[]``, or ``[N]`` without reduction; float32 (float64 for float64 z), in nats. The mean over no row is NaN.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Cao et al., arXiv 1906.07413 (LDAM, DRW); Menon et al., arXiv 2007.07314 (logit adjustment); Kini et al.,
    arXiv 2103.01550 (VS).
    """
    op = "rebalanced_ce"
    _labelled(op, "z", z, y, ignore_index)
    if isinstance(s, bool) or not isinstance(s, (int, float)):
        _checks.fail(op, "s", "be a number", type(s))
    if not abs(s) < float("inf"):
        _checks.fail(op, "s", "be finite", s)
    if reduction not in _REDUCTIONS:
        _checks.fail(op, "reduction", f"be one of {', '.join(_REDUCTIONS)}", repr(reduction))
    given = {"mult": mult, "add": add, "margin": margin, "class_weight": class_weight}
    classes = rule.Classes(*(_values(op, name, t, z, z.shape[1], "C") for name, t in given.items()))
    loss, weight = rule.loss(z, y, classes, float(s), ignore_index, _kernels(z))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / weight.sum()


def softmax_stats(z: Tensor, y: Tensor, *, ignore_index: int = -100) -> SoftmaxStats:
    """What a curriculum over adversarial examples asks of logits, reading them once::

        ce        = -log p_y
        p_y       = softmax(z)_y
        gap       = max_{c != y} p_c - p_y            in [-1, 1]; above 0 the label is not the likeliest class
        curvature = 2 max_c p_c (1 - p_c)             no less than the largest eigenvalue of diag(p) - p p^T

    ce and p_y can be differentiated; gap and curvature are for decisions and count as constants. Rows whose label is
    `ignore_index` have 0 in all but the curvature. With one class the gap is -p_y. Special values as in
    :func:`rebalanced_ce`.

    Args:
        z: ``[N, C]`` logits, float32, bfloat16, float16 or float64; C >= 1.
        y: ``[N]`` labels, int64.

    Returns:
        A named tuple of four ``[N]``, float32 (float64 for float64 z).

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Sitawarin et al., "SAT: Improving Adversarial Training via Curriculum-Based Loss Smoothing",
    arXiv 2003.09347; the bound is Gershgorin's.
    """
    _labelled("softmax_stats", "z", z, y, ignore_index)
    return SoftmaxStats(*rule.stats(z, y, ignore_index, _kernels(z)))


def affine_logit_scan(a: Tensor, b: Tensor, y: Tensor, t: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of the logits ``a - t_k b`` for K step sizes, reading a and b once::

        loss[k] = 1/N sum_n (log sum_c exp(a_nc - t_k b_nc) - (a_ny - t_k b_ny))

    With fixed features F, a linear head W and its gradient G, ``a = F W^T`` and ``b = F G^T`` give the losses along
    the step. The sum over rows runs in fp64, in an order that shape and dtype fix. Rows whose label is `ignore_index`
    are left out. Derivatives exist, in torch's own operations. Special values as in :func:`rebalanced_ce`.

    Args:
        a, b: ``[N, C]``, the same of float32, bfloat16, float16 and float64; C >= 1.
        y: ``[N]`` labels, int64.
        t: ``[K]`` steps, float32 (float64 for float64 a) or the dtype of a.

    Returns:
        loss ``[K]``, float32 (float64 for float64 a), in nats; NaN where no row counts.

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Sato et al., "PoF: Post-Training of Feature Extractor for Improving Generalization", arXiv 2207.01847.
    """
    op = "affine_logit_scan"
    _labelled(op, "a", a, y, ignore_index)
    _like(op, "b", b, a, "a")
    if b.shape != a.shape:
        _checks.fail(op, "b", f"have the shape of a, {list(a.shape)}", list(b.shape))
    if isinstance(t, Tensor) and t.dim() != 1:
        _checks.fail(op, "t", "have shape [K]", list(t.shape))
    if t is None:
        _checks.fail(op, "t", "be a tensor", type(t))
    t = _values(op, "t", t, a, t.shape[0] if isinstance(t, Tensor) else 0, "K")
    return rule.scan(a, b, y, t, ignore_index, _kernels(a))


def _divergence(op: str, z0: Tensor, z: Tensor, weight: Tensor | None, js: bool) -> Tensor:
    _checks.dense_data(op, "z0", z0, None)
    if z0.dim() != 2:
        _checks.fail(op, "z0", "have shape [B, C]", list(z0.shape))
    _like(op, "z", z, z0, "z0")
    if z.dim() == 2:
        z = z.unsqueeze(0)
    if z.dim() != 3 or z.shape[1:] != z0.shape or z.shape[0] == 0:
        want = f"have shape [K, B={z0.shape[0]}, C={z0.shape[1]}] with K >= 1, or that of z0"
        _checks.fail(op, "z", want, list(z.shape))
    weight = _values(op, "weight", weight, z0, z0.shape[0], "B")
    found = rule.divergence(z0, z, js, _kernels(z0))
    return found if weight is None else found * weight


def _kernels(z: Tensor) -> SimpleNamespace | None:
    return None if torch.compiler.is_compiling() else kernels(z.device.type)


def _labelled(op: str, name: str, z: object, y: object, ignore_index: object) -> None:
    _checks.dense_data(op, name, z, None)
    if z.dim() != 2 or z.shape[1] == 0:
        _checks.fail(op, name, "have shape [N, C] with C >= 1", list(z.shape))
    if not isinstance(y, Tensor):
        _checks.fail(op, "y", "be a tensor", type(y))
    if y.dtype != torch.int64:
        _checks.fail(op, "y", "be int64", y.dtype, "; write y.long()")
    if tuple(y.shape) != (z.shape[0],):
        _checks.fail(op, "y", f"have shape [N={z.shape[0]}]", list(y.shape))
    if y.device != z.device:
        _checks.fail(op, "y", f"be on the device of {name} ({z.device})", y.device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        _checks.fail(op, "ignore_index", "be an int", type(ignore_index))
    if _checks.VALUES_WANTED:
        wrong = y[((y < 0) | (y >= z.shape[1])) & (y != ignore_index)]
        if len(wrong):
            _checks.fail(op, "y", f"lie in [0, {z.shape[1] - 1}]", int(wrong[0]))


def _like(op: str, name: str, t: object, z: Tensor, other: str) -> None:
    _checks.dense_data(op, name, t, None)
    if t.dtype != z.dtype:
        _checks.fail(op, name, f"have the dtype of {other} ({z.dtype})", t.dtype)
    if t.device != z.device:
        _checks.fail(op, name, f"be on the device of {other} ({z.device})", t.device)


def _values(op: str, name: str, t: object, z: Tensor, count: int, letter: str) -> Tensor | None:
    """A tensor of `count` values in the compute type."""
    if t is None:
        return None
    if not isinstance(t, Tensor):
        _checks.fail(op, name, "be a tensor", type(t))
    compute = compute_dtype(z.dtype)
    if t.dtype not in (compute, z.dtype):
        _checks.fail(op, name, f"be {compute}" + ("" if z.dtype == compute else f" or {z.dtype}"), t.dtype)
    if tuple(t.shape) != (count,):
        _checks.fail(op, name, f"have shape [{letter}={count}]", list(t.shape))
    if t.device != z.device:
        _checks.fail(op, name, f"be on the device of the logits ({z.device})", t.device)
    return t.to(compute)
