# SPDX-License-Identifier: Apache-2.0
"""Matrix products: each term has one operand with K tangents, which K joins as rows of one product or as a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.curvature._rules._table import Call, added, aligned, rule

aten = torch.ops.aten


def _left(a: Tensor, b: Tensor) -> Tensor:
    """``a_k b`` for ``a [K, n, m]``: one product of K n rows where they lie one after another."""
    if a.is_contiguous():
        return (a.reshape(-1, a.shape[2]) @ b).view(a.shape[0], a.shape[1], b.shape[1])
    return torch.matmul(a, b)


def _matrix_product(a: Tensor, b: Tensor, ta: Tensor | None, tb: Tensor | None) -> Tensor:
    """``a_k b + a b_k``, ``[K, n, p]``."""
    out = None if ta is None else _left(ta, b)
    if tb is None:
        return out
    a = a.expand(tb.shape[0], *a.shape)
    return torch.bmm(a, tb) if out is None else out.baddbmm_(a, tb)


@rule(aten.mm.default)
def mm(c: Call):
    return _matrix_product(c.operand(0), c.operand(1), c.tangent(0), c.tangent(1))


@rule(aten.addmm.default)
def addmm(c: Call):
    bias, a, b = c.tangents()[:3]
    alpha, beta = c.primal(4), c.primal(3)
    out = None
    if a is not None or b is not None:
        out = _matrix_product(c.operand(1), c.operand(2), a, b)
        out = out if alpha == 1 else out * alpha
    if bias is None:
        return out
    bias = aligned(bias, 2) if beta == 1 else aligned(bias, 2) * beta
    return bias.expand(c.k, *c.out_shape) if out is None else out.add_(bias)


@rule(aten.bmm.default)
def bmm(c: Call):
    a, b = c.tangent(0), c.tangent(1)
    by_a = None if a is None else torch.matmul(a, c.operand(1))
    by_b = None if b is None else torch.matmul(c.operand(0), b)
    return added(by_a, by_b)


@rule(aten.dot.default)
def dot(c: Call):
    a, b = c.tangent(0), c.tangent(1)
    return added(None if a is None else a @ c.operand(1), None if b is None else b @ c.operand(0))


@rule(aten.mv.default)
def mv(c: Call):
    a, b = c.tangent(0), c.tangent(1)
    by_a = None if a is None else torch.matmul(a, c.operand(1))
    return added(by_a, None if b is None else b @ c.operand(0).t())
