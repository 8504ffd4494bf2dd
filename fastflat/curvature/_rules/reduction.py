# SPDX-License-Identifier: Apache-2.0
"""Sums over axes, what is made of them, softmax, and losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflat.curvature import _tangents
from fastflat.curvature._rules._fallback import by_autodiff
from fastflat.curvature._rules._table import Call, added, rule

aten = torch.ops.aten


def _axes(dims, ndim: int) -> list[int]:
    """Axes of the value as axes of its tangents; None and [] name all of them."""
    dims = range(ndim) if dims is None or (isinstance(dims, (list, tuple)) and not dims) else dims
    return [d % max(ndim, 1) + 1 for d in ([dims] if isinstance(dims, int) else dims)]


@rule(aten.sum.default, aten.mean.default)
def total(c: Call):
    x = c.tangent(0).flatten(1) if c.tangent(0).dim() > 1 else c.tangent(0).unsqueeze(1)
    return x.sum(1) if c.op is aten.sum.default else x.mean(1)


@rule(aten.sum.dim_IntList, aten.mean.dim)
def along(c: Call):
    x = c.tangent(0)
    if x.dim() == 1:
        return x
    take = torch.sum if c.op is aten.sum.dim_IntList else torch.mean
    return take(x, _axes(c.primal(1), x.dim() - 1), c.primal(2))


@rule(aten.cumsum.default)
def cumsum(c: Call):
    x = c.tangent(0)
    return x.cumsum(_axes(c.primal(1), x.dim() - 1)[0])


@rule(aten.logsumexp.default)
def logsumexp(c: Call):
    dims, keep = c.primal(1), c.primal(2)

    def weights():
        return (c.primal(0) - c.primal(0).logsumexp(dims, True)).exp()

    x = c.tangent(0)
    return (x * c.once("p", weights)).sum(_axes(dims, x.dim() - 1), keep)


@rule(aten._softmax.default, aten._safe_softmax.default)
def softmax(c: Call):
    return _tangents.softmax(c.tangent(0), c.operand_out(), c.primal(1))


@rule(aten._softmax_backward_data.default)
def softmax_backward(c: Call):
    # gx = p (g - D), D = sum g p
    return _tangents.softmax_backward(c.tangent(0), c.tangent(1), c.operand(1), c.operand(0), c.primal(2))


class Centred:
    """``z_k - <p, z_k>``, the tangents of a log-softmax, subtracted when somebody needs them: the backward pass of
    cross-entropy takes z itself."""

    def __init__(self, z: Tensor, make: Callable[[], Tensor], axis: int) -> None:
        self.z, self._make, self._axis = z, make, axis

    def product(self) -> Tensor:
        return self.z - (self.z * self._make()).sum(self._axis, True)


@rule(aten._log_softmax.default)
def log_softmax(c: Call):
    axis = _axes(c.primal(1), len(c.out_shape))[0]
    return Centred(c.tangent(0), lambda: c.once("p", lambda: c.out.exp()), axis)


@rule(aten._log_softmax_backward_data.default)
def log_softmax_backward(c: Call):
    # gx = g - p G, G = sum g
    g, y, dim = c.tangent(0), c.passed(1), c.primal(2)
    by_y = by_g = None
    if y is not None:
        total = c.once("-G", lambda: -c.primal(0).sum(dim, True))
        if isinstance(y, Centred):
            by_y = _tangents.softmax(y.z, c.operand(1), dim, total, log=True)
        else:
            by_y = y * c.once("-pG", lambda: c.primal(1).exp() * total)
    if g is not None:
        p = c.once("p", lambda: c.primal(1).exp())
        by_g = g - p * g.sum(_axes(dim, len(c.out_shape)), True)
    return added(by_g, by_y)


@rule(aten.mse_loss.default)
def mse(c: Call):
    x, t, reduction = c.tangent(0), c.tangent(1), c.primal(2)
    moved = added(x, None if t is None else -t)
    return reduced(moved * c.once("slope", lambda: 2 * (c.primal(0) - c.primal(1))), reduction)


def reduced(t, reduction: int):
    """K tangents of single losses, reduced as their loss is: 0 not at all, 1 to the mean, 2 to the sum."""
    return t if reduction == 0 else t.flatten(1).mean(1) if reduction == 1 else t.flatten(1).sum(1)


@rule(aten.binary_cross_entropy_with_logits.default)
def logits(c: Call):
    # l = w (softplus(x) (1 + (v - 1) t) - v t x), v the weight of positives
    if c.moves(1):
        return by_autodiff(c)
    slope = c.once("slope", lambda: weighted(c, lambda s, t, v: s * (1 + (v - 1) * t) - v * t))
    return reduced(c.tangent(0) * slope, c.primal(4))


def weighted(c: Call, make: Callable[[Tensor, Tensor, Tensor | float], Tensor]) -> Tensor:
    """``w make(sigmoid(x), t, v)`` of binary cross-entropy."""
    x, t, w, v = (c.primal(i) for i in range(4))
    found = make(torch.sigmoid(x), t, 1.0 if v is None else v)
    return found if w is None else found * w


@rule(aten.mse_loss_backward.default)
def mse_backward(c: Call):
    # gx = 2 (x - t) g / n
    g, x, t, reduction = c.tangent(0), c.tangent(1), c.tangent(2), c.primal(3)
    scale = 2.0 / c.primal(1).numel() if reduction == 1 else 2.0
    moved = None if x is None and t is None else added(x, None if t is None else -t)
    by_x = None if moved is None else moved * c.once("g", lambda: c.primal(0) * scale)
    if g is None:
        return by_x
    g = g.reshape(c.k, *(1,) * (len(c.out_shape) - g.dim() + 1), *g.shape[1:])
    return added(by_x, g * c.once("x", lambda: (c.primal(1) - c.primal(2)) * scale))
