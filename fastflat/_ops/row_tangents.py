# SPDX-License-Identifier: Apache-2.0
"""Rows of the row_tangents family: K tangents at once of layer norm, RMS norm, softmax and cross-entropy.

Tangents are contiguous ``[K, R, D]``, element-wise primals ``[R, D]``, all in one dtype T of fp32, bf16, fp16 or fp64;
``weight`` is ``[D]``, its tangents and those of the bias ``[K, D]``, in T, too. ``inv`` and what else belongs to a row
is ``[R]`` or ``[K, R]`` in the compute dtype (fp32; fp64 for fp64 data). Sums over a row have an order that shape and
dtype fix; results agree across backends to 1e-6 (fp64: 1e-14) of the sum of the magnitudes of their terms, and are
rounded once to T. Primals are read once for all K. NaN spreads over its row of its tangent, as the sums have it.
"""

from __future__ import annotations

import torch

from fastflat._ops._row import Op, compute_dtype, size_of


def count_of(op: str, **tangents: torch.Tensor | None) -> int:
    """K, of the tangents that are there.

    Raises:
        ValueError: none is.
    """
    for tangent in tangents.values():
        if tangent is not None:
            return tangent.shape[0]
    raise ValueError(f"fastflat::{op}: {', '.join(tangents)} must not all be None")


def _fake_norm(x, normal, inv, weight, along_weight, along_bias, centered):
    k = count_of("row_tangents_norm", x=x, along_weight=along_weight, along_bias=along_bias)
    out = normal.new_empty((k, *normal.shape))
    mean, scale = (normal.new_empty(out.shape[:2], dtype=compute_dtype(normal.dtype)) for _ in range(2))
    return out, mean, scale


def _fake_norm_bwd(g, x, mean, scale, along_weight, normal, grad, inv, weight, centered):
    k = count_of("row_tangents_norm_bwd", g=g, x=x, mean=mean, scale=scale, along_weight=along_weight)
    return normal.new_empty((k, *normal.shape))


def _fake_softmax(t, p, scale, log):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _fake_softmax_bwd(g, along, p, grad):
    return p.new_empty((count_of("row_tangents_softmax_bwd", g=g, along=along), *p.shape))


def _bytes_of_norm(x, normal, inv, weight, along_weight, along_bias, centered):
    results = _fake_norm(x, normal.to("meta"), inv, weight, along_weight, along_bias, centered)
    return size_of(x, normal, inv, weight, along_weight, along_bias, *results)


def _bytes_of_norm_bwd(g, x, mean, scale, along_weight, normal, grad, inv, weight, centered):
    k = count_of("row_tangents_norm_bwd", g=g, x=x, mean=mean, scale=scale, along_weight=along_weight)
    return size_of(g, x, mean, scale, along_weight, normal, grad, inv, weight) + k * size_of(normal)


def _bytes_of_softmax_bwd(g, along, p, grad):
    return size_of(g, along, p, grad) + count_of("row_tangents_softmax_bwd", g=g, along=along) * size_of(p)


ROWS = (
    Op(
        "row_tangents_norm",
        "row_tangents",
        "(Tensor? x, Tensor normal, Tensor inv, Tensor? weight, Tensor? along_weight, Tensor? along_bias,"
        " bool centered) -> (Tensor out, Tensor mean, Tensor scale)",
        _fake_norm,
        _bytes_of_norm,
        """K tangents of ``y = w x^ + b``, ``x^ = (x - mean) inv`` the ``normal`` and ``inv = 1 / sqrt(var + eps)``::

            m = mean_d x    (0 where not `centered`: RMS norm)        s = mean_d x x^
            out = ((x - m) - x^ s) inv w + x^ along_weight + along_bias

        and the tangents of the saved statistics, ``mean = m`` and ``scale = -s inv^2``, ``[K, R]``. Absent terms are
        left out, an absent weight is 1; without x both statistics are 0. One of x, along_weight, along_bias is there.
        Source: Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467; differentiated here.""",
    ),
    Op(
        "row_tangents_norm_bwd",
        "row_tangents",
        "(Tensor? g, Tensor? x, Tensor? mean, Tensor? scale, Tensor? along_weight, Tensor normal, Tensor grad,"
        " Tensor inv, Tensor? weight, bool centered) -> Tensor",
        _fake_norm_bwd,
        _bytes_of_norm_bwd,
        """K tangents of the input's gradient ``inv (h - A - x^ B)``, ``h = w grad``, ``A = mean_d h`` (0 where not
        `centered`), ``B = mean_d h x^``, along tangents g of grad, x of the input, mean and scale of the saved mean and
        of inv, and those of the weight::

            moved = (x - mean) inv + x^ scale / inv        rh = g w + grad along_weight
            out = inv (rh - mean_d rh - x^ mean_d (rh x^ + moved h) - moved B) + (h - A - x^ B) scale

        (``mean_d rh`` is 0 where not `centered`). An absent tangent is 0, an absent weight 1; one tangent is there.
        h, A and B are formed once a row for all K.""",
    ),
    Op(
        "row_tangents_softmax",
        "row_tangents",
        "(Tensor t, Tensor p, Tensor? scale, bool log) -> Tensor",
        _fake_softmax,
        lambda t, p, scale, log: size_of(t, t, p, scale),
        """``out[k] = (scale[r] q) (t[k] - <q, t[k]>)``, ``q = exp(p)`` with `log`, else p; an absent scale is 1. With p
        the softmax it is its tangent. With p the log-softmax and scale minus the sum of the incoming gradient it is the
        tangent of the gradient of cross-entropy, ``diag(q) - q q^T`` times t. exp is that of csrc/math/elementary.h,
        formed once for all K; -inf in p makes q and, where t is finite, the result 0.""",
    ),
    Op(
        "row_tangents_softmax_bwd",
        "row_tangents",
        "(Tensor? g, Tensor? along, Tensor p, Tensor grad) -> Tensor",
        _fake_softmax_bwd,
        _bytes_of_softmax_bwd,
        """K tangents of the gradient behind a softmax, ``p (grad - D)``, ``D = <grad, p>``, along tangents g of grad
        and `along` of p::

            out = along (grad - D) - p <along, grad> + p (g - <g, p>)

        Absent terms are left out; one of them is there.""",
    ),
)
