# SPDX-License-Identifier: Apache-2.0
"""Tangents of rows: ours, and the same in torch's operations over [K, R, D], what is primal formed beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

import fastflat


def ours(data):
    fastflat.choose(data.case.op, data.x.device.type)  # loads the compiled library, which the raw op does not
    op = getattr(torch.ops.fastflat, data.case.op)
    arguments = data.arguments
    return lambda x, scale: op(*arguments)


def stock(data):
    calls = {
        "row_tangents_norm": _norm,
        "row_tangents_norm_bwd": _norm_backward,
        "row_tangents_softmax": _cross_entropy if data.case.log else _softmax,
    }
    call = calls[data.case.op](*data.arguments)
    return lambda x, scale: call()


def _norm(x, normal, inv, weight, along_weight, along_bias, centered):
    inv, along_weight, along_bias = inv[:, None].to(x.dtype), along_weight[:, None], along_bias[:, None]

    def call() -> tuple[Tensor, Tensor, Tensor]:
        m, s = x.mean(2, True), (x * normal).mean(2, True)
        i = -s * inv * inv
        out = torch.addcmul(x - m, normal, s, value=-1).mul_(inv).mul_(weight)
        return out.addcmul_(normal, along_weight).add_(along_bias), m.squeeze(2), i.squeeze(2)

    return call


def _norm_backward(g, x, mean, scale, along_weight, normal, grad, inv, weight, centered):
    inv, along_weight = inv[:, None].to(x.dtype), along_weight[:, None]
    mean, scale = (t[..., None].to(x.dtype) for t in (mean, scale))
    h = grad * weight
    a, b = h.mean(1, True), (h * normal).mean(1, True)
    rest = h - a - normal * b

    def call() -> Tensor:
        moved = ((x - mean) * inv).addcmul_(normal, scale / inv)
        rh = (g * weight).addcmul_(grad, along_weight)
        sums = (rh * normal).mean(2, True) + (moved * h).mean(2, True)
        out = (-(normal * sums)).add_(rh).sub_(rh.mean(2, True))
        return out.addcmul_(moved, b, value=-1).mul_(inv).addcmul_(rest, scale)

    return call


def _softmax(t, p, scale, log):
    def call() -> Tensor:
        u = t * p
        return u.addcmul_(p, u.sum(2, True), value=-1)

    return call


def _cross_entropy(t, p, scale, log):
    """The tangent of log-softmax, then that of its backward, as the formulas of the two operations have them."""
    scale = scale[:, None].to(t.dtype)

    def call() -> Tensor:
        q = p.exp()
        along = t - (t * q).sum(2, True)
        return along * (q * scale)

    return call
