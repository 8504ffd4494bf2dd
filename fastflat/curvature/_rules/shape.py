# SPDX-License-Identifier: Apache-2.0
"""Ops that move elements about: linear, applied to all K at once with their axes counted from the second on."""

from __future__ import annotations

import operator

import torch

from fastflat.curvature._rules._table import Call, aligned, rule

aten = torch.ops.aten


def _axis(dim: int, ndim: int) -> int:
    """An axis of the value as an axis of its K tangents."""
    return dim % max(ndim, 1) + 1


@rule(operator.getitem)
def getitem(c: Call):
    several = c.passed(0)
    return None if several is None else several[c.primal(1)]


@rule(
    aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default, aten.lift_fresh.default
)
def same(c: Call):
    # detach stands here for what autograd saved; what the user detached is marked by detach_copy.
    return c.passed(0)


@rule(aten._to_copy.default)
def to_copy(c: Call):
    dtype = c.primal(1)
    t = c.tangent(0)
    if dtype is not None and not dtype.is_floating_point:
        return None
    return t if dtype is None else t.to(c.type_of(dtype))


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(c: Call):
    t = c.tangent(0)
    return t.reshape(t.shape[0], *c.out_shape)


@rule(aten.t.default)
def t(c: Call):
    x = c.tangent(0)
    return x.transpose(1, 2) if x.dim() == 3 else x


@rule(aten.transpose.int)
def transpose(c: Call):
    x = c.tangent(0)
    n = x.dim() - 1
    return x.transpose(_axis(c.primal(1), n), _axis(c.primal(2), n))


@rule(aten.permute.default)
def permute(c: Call):
    x = c.tangent(0)
    return x.permute(0, *(_axis(d, x.dim() - 1) for d in c.primal(1)))


@rule(aten.expand.default)
def expand(c: Call):
    shape = c.out_shape
    x = aligned(c.tangent(0), len(shape))
    return x.expand(x.shape[0], *shape)


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
def squeezed(c: Call):
    x = c.tangent(0)
    return x.reshape(x.shape[0], *c.out_shape)


@rule(aten.select.int)
def select(c: Call):
    x = c.tangent(0)
    return x.select(_axis(c.primal(1), x.dim() - 1), c.primal(2))


@rule(aten.slice.Tensor)
def slice_(c: Call):
    x = c.tangent(0)
    return aten.slice.Tensor(x, _axis(c.primal(1), x.dim() - 1), *(c.primal(i) for i in (2, 3, 4)))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unbind.int)
def parts(c: Call):
    x = c.tangent(0)
    if c.op is aten.unbind.int:
        return x.unbind(_axis(c.primal(1), x.dim() - 1))
    return x.split(c.primal(1), _axis(c.primal(2), x.dim() - 1))


def _filled(c: Call):
    """The tangents of a list of tensors, zeros where there are none."""
    tangents = c.tangent(0)
    there = next(t for t in tangents if t is not None)
    shapes = [c.item_shape(0, i) for i in range(len(tangents))]
    return [there.new_zeros(c.k, *s) if t is None else t for t, s in zip(tangents, shapes, strict=True)]


@rule(aten.cat.default)
def cat(c: Call):
    return torch.cat(_filled(c), _axis(c.primal(1), len(c.out_shape)))


@rule(aten.stack.default)
def stack(c: Call):
    return torch.stack(_filled(c), _axis(c.primal(1), len(c.out_shape)))


@rule(aten.copy.default)
def copy(c: Call):
    source = c.tangent(1)
    if source is None:
        return None
    return aligned(source, len(c.out_shape)).expand(c.k, *c.out_shape)


@rule(aten.flip.default)
def flip(c: Call):
    x = c.tangent(0)
    return x.flip([_axis(d, x.dim() - 1) for d in c.primal(1)])


@rule(aten.constant_pad_nd.default)
def pad(c: Call):
    return aten.constant_pad_nd(c.tangent(0), c.primal(1), 0)


@rule(aten.select_backward.default)
def select_backward(c: Call):
    g = c.tangent(0)
    out = g.new_zeros(c.k, *c.primal(1))
    out.select(_axis(c.primal(2), out.dim() - 1), c.primal(3)).copy_(g)
    return out


@rule(aten.slice_backward.default)
def slice_backward(c: Call):
    g = c.tangent(0)
    out = g.new_zeros(c.k, *c.primal(1))
    aten.slice.Tensor(out, _axis(c.primal(2), out.dim() - 1), *(c.primal(i) for i in (3, 4, 5))).copy_(g)
    return out
