# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation and its backward, in train and eval mode. With x^ = (x - m) i, i = 1/sqrt(var + eps), h = w g::

    y  = w x^ + b                         Rx^ = (Rx - Rm) i + x^ Ri/i
    gx = i (h - A - x^ B)                 A = mean h, B = mean h x^, over what a statistic was taken from
    gw = sum g x^,  gb = sum g            Rm = mean Rx,  Ri = -i^2 mean x^ Rx

Backward sees m and i as inputs with tangents of their own, so that Rx^ needs no second reduction there. What is
constant for a statistic (a channel of batch norm) is gathered into one coefficient, so that each large tensor is
passed over once.

Source: Ioffe and Szegedy, ICML 2015; differentiated here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature._program import Step
from fastflat.curvature._rules._table import PRIMAL, Call, rule

aten = torch.ops.aten


def _channel(v: Tensor, ndim: int) -> Tensor:
    """``[..., C]`` shaped to broadcast over ``[N, C, ...]`` of ``ndim`` axes; leading axes are kept."""
    return v.reshape(*v.shape[:-1], *((1,) if v.dim() > 1 else ()), v.shape[-1], *(1,) * (ndim - 2))


def _sum(t: Tensor) -> Tensor:
    """``[K, N, C, ...]`` summed to ``[K, C]``."""
    return t.sum([d for d in range(1, t.dim()) if d != 2])


def _dot(t: Tensor, p: Tensor) -> Tensor:
    """``sum t_k p`` over all but channels, ``[K, N, C, ...]`` and ``[N, C, ...]`` to ``[K, C]``."""
    axes = [d for d in range(p.dim()) if d != 1]
    # One k at a time: the product of each then comes back from the cache.
    return torch.stack([(t_k * p).sum(axes) for t_k in t])


@rule(aten.native_batch_norm.default)
def batch_norm(c: Call):
    x, w, b = c.tangents()[:3]
    training = c.primal(5)
    shape, ndim = c.out_shape[0], len(c.out_shape[0])
    normal, inv = normal_of_batch(c)
    shift, along = b, w
    m = moved = None
    if x is not None and training:
        count = shape.numel() // shape[1]
        m, s = _sum(x) / count, _dot(x, normal()) / count
        scale = inv if c.primal(1) is None else inv * c.primal(1)
        shift = -m * scale if shift is None else shift - m * scale
        along = -s * scale if along is None else along - s * scale
        moved = -s * inv * inv
    out = None
    if x is not None:
        scale = c.once("scale", lambda: _channel(inv if c.primal(1) is None else inv * c.primal(1), ndim))
        out = x * scale if shift is None else torch.addcmul(_channel(shift, ndim).to(x.dtype), x, scale)
    elif shift is not None:
        out = _channel(shift, ndim).expand(c.k, *shape).clone()
    if along is not None:
        along = _channel(along, ndim).to(normal().dtype)
        out = normal() * along if out is None else out.addcmul_(normal(), along)
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
    shape, ndim = c.out_shape[0], len(c.out_shape[0])

    needs_dots = training or 1 in c.wanted
    g_sum = _sum(g) if g is not None and (training or 2 in c.wanted) else None
    dots = [_dot(g, normal())] if g is not None and needs_dots else []
    if x is not None and needs_dots:
        dots.append(_dot(x, c.operand(0)) * inv)
    m, i = (c.tangent(5), c.tangent(6)) if training else (None, None)
    if training and needs_dots:
        sums = c.once("sums", lambda: torch.stack([_sum(c.primal(0)[None])[0], _dot(c.primal(0)[None], normal())[0]]))
        if m is not None:
            dots.append(-m * inv * sums[0])
        if i is not None:
            dots.append(i / inv * sums[1])
    dot = sum(dots) if dots else None

    out = None
    if 0 in c.wanted:
        terms = [] if g is None else [(g, _channel(scale, ndim))]
        along_g = [] if w is None else [w * inv]
        shift = None
        if training:
            count = shape.numel() // shape[1]
            a, b = sums / count
            weight = 1.0 if c.primal(2) is None else c.primal(2)
            along_g += [] if i is None else [i * weight]
            if x is not None:
                terms.append((x, _channel(-scale * inv * b, ndim)))
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
            if isinstance(along_x, Tensor):
                terms.append((normal(), _channel(along_x, ndim)))
        if along_g:
            terms.append((c.operand(0), _channel(sum(along_g), ndim)))
        shift = _channel(shift, ndim) if isinstance(shift, Tensor) else None
        out = _gathered(shift, terms, (c.k, *shape))
    return out, dot, g_sum


def _gathered(shift: Tensor | None, terms: list[tuple[Tensor, Tensor]], shape: tuple) -> Tensor | None:
    """``shift + sum of products``, one pass for each."""
    if not terms:
        return None if shift is None else shift.expand(shape).clone()
    terms = [(a, b.to(a.dtype)) for a, b in terms]
    (first, factor), *rest = terms
    shift = None if shift is None else shift.to(first.dtype)
    out = first * factor if shift is None else torch.addcmul(shift, first, factor)
    for a, b in rest:
        out = out.addcmul_(a, b) if out.shape == shape else torch.addcmul(out, a, b)
    return out


def _still(step: Step, value: Callable[[int], Any], read: set[int]) -> Any:
    """Batch norm that leaves its running statistics where they are."""
    if not step.args[5]:
        return step.run(value)
    return step._replace(args=(*step.args[:3], None, None, *step.args[5:])).run(value)


PRIMAL[aten.native_batch_norm.default] = _still
