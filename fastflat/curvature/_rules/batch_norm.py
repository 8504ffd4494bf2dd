# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation and its backward, in train and eval mode. With x^ = (x - m) i, i = 1/sqrt(var + eps), h = w g::

    y  = w x^ + b                         Rx^ = (Rx - Rm) i + x^ Ri/i
    gx = i (h - A - x^ B)                 A = mean h, B = mean h x^, over what a statistic was taken from
    gw = sum g x^,  gb = sum g            Rm = mean Rx,  Ri = -i^2 mean x^ Rx

Backward sees m and i as inputs with tangents of their own, so that Rx^ needs no second reduction there. What is
constant for a statistic (a channel of batch norm) is gathered into one coefficient: a pass for the sums over each
tangent, and one for the result.

Source: Ioffe and Szegedy, ICML 2015; differentiated here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature import _tangents
from fastflat.curvature._program import Step
from fastflat.curvature._rules._table import PRIMAL, Call, rule

aten = torch.ops.aten


def _channel(v: Tensor, ndim: int) -> Tensor:
    """``[..., C]`` shaped to broadcast over ``[N, C, ...]`` of ``ndim`` axes; leading axes are kept."""
    return v.reshape(*v.shape[:-1], *((1,) if v.dim() > 1 else ()), v.shape[-1], *(1,) * (ndim - 2))


@rule(aten.native_batch_norm.default)
def batch_norm(c: Call):
    x, w, b = c.tangents()[:3]
    training = c.primal(5)
    shape = c.out_shape[0]
    normal, inv = normal_of_batch(c)
    shift, along = b, w
    m = moved = None
    scale = c.once("scale", lambda: inv if c.primal(1) is None else inv * c.primal(1))
    if x is not None and training:
        count = shape.numel() // shape[1]
        s, m = (t / count for t in _tangents.sums(x, normal(), True, axis=1))
        shift = -m * scale if shift is None else shift - m * scale
        along = -s * scale if along is None else along - s * scale
        moved = -s * inv * inv
    if x is None and along is None:
        return _channel(shift, len(shape)).expand(c.k, *shape), m, moved
    f0 = None if along is None else normal()
    out = _tangents.combine(shape, t0=x, p0=None if x is None else scale, f0=f0, r0=along, shift=shift, axis=1)
    return out, m, moved


def normal_of_batch(c: Call) -> tuple[Callable[[], Tensor], Tensor]:
    """What gives x^, and i ``[C]``, of a batch norm in its forward pass."""
    training, eps = c.primal(5), c.primal(7)
    mean, inv = _statistics(c, training, eps, (c.out[1], c.out[2]) if training else (None, None), 3)
    key = (c.place(1), c.place(2)) if training else (c.origin(3), c.origin(4), eps)
    return _normal(c, 0, mean, inv, key), inv


def _statistics(c: Call, training: bool, eps: float, saved: tuple, running: int) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation ``[C]`` that the layer used."""
    if training:
        return saved
    return c.primal(running), c.once("inv", lambda: (c.primal(running + 1) + eps).rsqrt())


def _normal(c: Call, index: int, mean: Tensor, inv: Tensor, key: tuple):
    """Gives x^, made when it is first asked for; ``key`` says which statistics."""

    def make():
        x = c.primal(index)
        return (x - _channel(mean, x.dim())).mul_(_channel(inv, x.dim()))

    return lambda: c.shared(("normal", c.origin(index), *key), make)


@rule(aten.native_batch_norm_backward.default)
def batch_norm_backward(c: Call):
    g, x, w = c.tangents()[:3]
    training, eps = c.primal(7), c.primal(8)
    mean, inv = _statistics(c, training, eps, (c.primal(5), c.primal(6)) if training else (None, None), 3)
    scale = inv if c.primal(2) is None else inv * c.primal(2)
    normal = _normal(
        c, 1, mean, inv, tuple(map(c.origin, (5, 6) if training else (3, 4))) + (() if training else (eps,))
    )
    shape = c.out_shape[0]

    needs_dots, needs_sum = training or 1 in c.wanted, training or 2 in c.wanted
    dots, g_sum = [], None
    if g is not None and (needs_dots or needs_sum):
        dot, g_sum = _tangents.sums(g, normal() if needs_dots else None, needs_sum, axis=1)
        dots += [dot] if needs_dots else []
    if x is not None and needs_dots:
        dots.append(_tangents.sums(x, c.operand(0), False, axis=1)[0] * inv)
    m, i = (c.tangent(5), c.tangent(6)) if training else (None, None)
    if training and needs_dots:
        sums = c.once("sums", lambda: _both_sums(c.primal(0), normal()))
        if m is not None:
            dots.append(-m * inv * sums[0])
        if i is not None:
            dots.append(i / inv * sums[1])
    dot = sum(dots) if dots else None

    out = None
    if 0 in c.wanted:
        along_g = [] if w is None else [w * inv]
        by_x = shift = along_x = None
        if training:
            count = shape.numel() // shape[1]
            a, b = sums / count
            weight = 1.0 if c.primal(2) is None else c.primal(2)
            along_g += [] if i is None else [i * weight]
            by_x = -scale * inv * b
            by_g = sum(along_g) if along_g else 0.0
            shift = -by_g * a
            along_x = -by_g * b
            if g_sum is not None:
                shift = shift - scale * g_sum / count
            if dot is not None:
                along_x = along_x - scale * dot / count
            if m is not None:
                shift = shift + scale * b * m * inv
            if i is not None:
                along_x = along_x - i * weight * b
        terms = [(c.operand(0), sum(along_g))] if along_g else []
        terms += [(normal(), along_x)] if isinstance(along_x, Tensor) else []
        (f0, r0), (f1, r1) = (*terms, (None, None), (None, None))[:2]
        shift = shift.expand(c.k, -1) if isinstance(shift, Tensor) else None
        x = x if training else None
        if g is not None or x is not None or f0 is not None:
            moving = {"t0": g, "p0": scale} if g is not None else {}
            moving |= {"t1": x, "p1": by_x} if x is not None else {}
            out = _tangents.combine(shape, **moving, f0=f0, r0=r0, f1=f1, r1=r1, shift=shift, axis=1)
    return out, dot, g_sum


def _both_sums(g: Tensor, normal: Tensor) -> Tensor:
    """``sum g`` and ``sum g x^`` of each channel."""
    axes = [d for d in range(g.dim()) if d != 1]
    return torch.stack([g.sum(axes), (g * normal).sum(axes)])


def _still(step: Step, value: Callable[[int], Any], read: set[int]) -> Any:
    """Batch norm that leaves its running statistics where they are."""
    if not step.args[5]:
        return step.run(value)
    return step._replace(args=(*step.args[:3], None, None, *step.args[5:])).run(value)


PRIMAL[aten.native_batch_norm.default] = _still
