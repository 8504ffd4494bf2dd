# SPDX-License-Identifier: Apache-2.0
"""Layer and group normalisation with their backwards. With x^ = (x - m) i, i = 1/sqrt(var + eps), h = w g::

    y  = w x^ + b                         Rx^ = (Rx - Rm) i + x^ Ri/i
    gx = i (h - A - x^ B)                 A = mean h, B = mean h x^, over what a statistic was taken from
    gw = sum g x^,  gb = sum g            Rm = mean Rx,  Ri = -i^2 mean x^ Rx

Backward sees m and i as inputs with tangents of their own.

Source: Ba et al., arXiv 1607.06450; Wu and He, ECCV 2018; differentiated here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastflat.curvature import _tangents
from fastflat.curvature._rules._table import Call, rule

aten = torch.ops.aten


class Rows(NamedTuple):
    """How layer and group norm see their tensors: a shape in which statistics are over whole axes."""

    shape: tuple[int, ...]
    over: tuple[int, ...]  # axes of a statistic
    weight: tuple[int, ...]  # shape of the weight against it
    samples: tuple[int, ...]  # axes over which the weight's gradient is a sum

    def see(self, t: Tensor) -> Tensor:
        return t.reshape(self.shape)

    def see_k(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(t.shape[0], *self.shape)

    def statistic(self, t: Tensor) -> Tensor:
        return t.reshape(tuple(1 if d in self.over else s for d, s in enumerate(self.shape)))

    def statistic_k(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t.reshape(t.shape[0], *(1 if d in self.over else s for d, s in enumerate(self.shape)))

    def weight_k(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(t.shape[0], *self.weight)

    def mean(self, t: Tensor, k: int = 0) -> Tensor:
        return t.mean([d + k for d in self.over], True)

    def to_weight(self, t: Tensor, shape: torch.Size) -> Tensor:
        return t.sum([d + 1 for d in self.samples]).reshape(t.shape[0], *shape)


def _layer_rows(shape: torch.Size, normalized: list[int]) -> Rows:
    inner = torch.Size(normalized).numel()
    return Rows((torch.Size(shape).numel() // max(inner, 1), inner), (1,), (1, inner), (0,))


def _group_rows(shape: torch.Size, groups: int) -> Rows:
    n, channels = shape[:2]
    per = channels // groups
    space = torch.Size(shape[2:]).numel()
    return Rows((n, groups, per, space), (2, 3), (1, groups, per, 1), (0, 3))


@rule(aten.native_layer_norm.default)
def layer_norm(c: Call):
    rows = _layer_rows(c.out_shape[0], c.primal(1))
    x, w, b = rows.see_k(c.tangent(0)), c.tangent(2), c.tangent(3)
    w, b = (None if t is None else t.flatten(1) for t in (w, b))
    normal, inv = row_normal(c, rows, 0, c.out[1], c.out[2], (c.place(1), c.place(2)))
    weight = None if c.primal(2) is None else c.operand(2).flatten()
    out, m, i = _tangents.norm(x, normal, inv.flatten(), weight, w, b)
    out = out.view(c.k, *c.out_shape[0])
    return (out, None, None) if x is None else (out, m.reshape(c.k, *c.out[1].shape), i.reshape(c.k, *c.out[2].shape))


@rule(aten.native_group_norm.default)
def group_norm(c: Call):
    rows = _group_rows(c.out_shape[0], c.primal(6))
    x, w, b = rows.see_k(c.tangent(0)), rows.weight_k(c.tangent(1)), rows.weight_k(c.tangent(2))
    normal, inv = row_normal(c, rows, 0, c.out[1], c.out[2], (c.place(1), c.place(2)))
    out = m = i = None
    if x is not None:
        m, s = rows.mean(x, 1), rows.mean(x * normal, 1)
        i = -s * inv * inv
        out = torch.addcmul(x - m, normal, s, value=-1).mul_(inv)
        if c.primal(1) is not None:
            out.mul_(c.operand(1).reshape(rows.weight))
        m, i = m.reshape(c.k, *c.out[1].shape), i.reshape(c.k, *c.out[2].shape)
    if w is not None:
        out = normal * w if out is None else out.addcmul_(normal, w)
    if b is not None:
        out = b.expand(c.k, *rows.shape) if out is None else out.add_(b)
    return out.reshape(c.k, *c.out_shape[0]), m, i


def row_normal(c: Call, rows: Rows, index: int, mean: Tensor, inv: Tensor, key: tuple) -> tuple[Tensor, Tensor]:
    """x^ and i, in the shape of the rows; ``key`` says which statistics."""

    def make():
        return (rows.see(c.primal(index)) - rows.statistic(mean)) * rows.statistic(inv)

    return c.shared(("normal", c.origin(index), *key), make), c.once("inv", lambda: rows.statistic(inv))


@rule(aten.native_layer_norm_backward.default)
def layer_norm_backward(c: Call):
    rows = _layer_rows(c.shape(1), c.primal(2))
    g, x, w = rows.see_k(c.tangent(0)), rows.see_k(c.tangent(1)), c.tangent(5)
    m, i = (None if t is None else t.flatten(1) for t in (c.tangent(3), c.tangent(4)))
    statistics = (c.origin(3), c.origin(4))
    normal, inv = row_normal(c, rows, 1, c.primal(3), c.primal(4), statistics)
    grad, weighted = rows.see(c.operand(0)), c.primal(5) is not None
    out = by_weight = by_bias = None
    if 0 in c.wanted:
        weight = c.operand(5).flatten() if weighted else None
        along = None if w is None else w.flatten(1)
        out = _tangents.norm_backward(g, x, m, i, along, normal, grad, inv.flatten(), weight)
        out = out.view(c.k, *c.shape(1))
    if weighted and (1 in c.wanted or 2 in c.wanted):
        terms = []
        if g is not None:
            dots, by_bias = _tangents.sums(g, normal, True, axis=1)
            terms.append(dots)
        # Of Rx^ = (Rx - Rm) i + x^ Ri/i the parts that belong to rows are products of matrices.
        if x is not None:
            terms.append(_tangents.sums(x, c.once("g i", lambda: grad * inv), False, axis=1)[0])
        if m is not None:
            terms.append(-m.to(grad.dtype) @ c.once("g i", lambda: grad * inv))
        if i is not None:
            terms.append((i / inv.flatten()).to(grad.dtype) @ c.once("g x^", lambda: grad * normal))
        by_weight = sum(terms).reshape(c.k, *c.shape(5)).to(grad.dtype) if terms else None
        by_bias = None if by_bias is None else by_bias.reshape(c.k, *c.shape(5)).to(grad.dtype)
    return out, by_weight, by_bias


@rule(aten.native_group_norm_backward.default)
def group_norm_backward(c: Call):
    rows = _group_rows(c.shape(1), c.primal(8))
    g, x = rows.see_k(c.tangent(0)), rows.see_k(c.tangent(1))
    m, i = rows.statistic_k(c.tangent(2)), rows.statistic_k(c.tangent(3))
    w = rows.weight_k(c.tangent(4))
    statistics = (c.origin(2), c.origin(3))
    normal, inv = row_normal(c, rows, 1, c.primal(2), c.primal(3), statistics)
    weighted = c.primal(4) is not None

    moved = None  # Rx^
    if x is not None:
        moved = (x if m is None else x - m) * inv
    if i is not None:
        moved = normal * (i / inv) if moved is None else moved.addcmul_(normal, i / inv)

    by_weight = by_bias = None
    if 1 in c.wanted and weighted:
        terms = [] if g is None else [g * normal]
        terms += [] if moved is None else [moved * rows.see(c.operand(0))]
        by_weight = rows.to_weight(sum(terms), c.shape(4)) if terms else None
    if 2 in c.wanted and weighted and g is not None:
        by_bias = rows.to_weight(g, c.shape(4))

    out = None
    if 0 in c.wanted:
        h = c.once("h", lambda: _weighted(c, rows))
        a, b = c.once("a", lambda: rows.mean(h)), c.once("b", lambda: rows.mean(h * normal))
        rh = None
        if g is not None:
            rh = g * c.operand(4).reshape(rows.weight) if weighted else g
        if w is not None:
            by_w = rows.see(c.operand(0)) * w
            rh = by_w if rh is None else rh + by_w
        terms = [] if rh is None else [rows.mean(rh * normal, 1)]
        terms += [] if moved is None else [rows.mean(moved * h, 1)]
        if terms:
            out = -(normal * sum(terms))
            out = out if rh is None else out.add_(rh).sub_(rows.mean(rh, 1))
            out = out if moved is None else out.addcmul_(moved, b, value=-1)
            out.mul_(inv)
        if i is not None:
            out = out.addcmul_(c.once("g-A-xB", lambda: h - a - normal * b), i)
        out = None if out is None else out.reshape(c.k, *c.shape(1))
    return out, by_weight, by_bias


def _weighted(c: Call, rows: Rows) -> Tensor:
    g = rows.see(c.primal(0))
    return g if c.primal(4) is None else g * c.primal(4).reshape(rows.weight)
