# SPDX-License-Identifier: Apache-2.0
"""Gather, scatter, embedding, pooling, resampling: linear, with indices that are constants."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.curvature._rules._table import Call, Scaled, rule

aten = torch.ops.aten


def mapped(c: Call, index: int) -> Tensor | None:
    """A linear op applied to the K tangents of one argument by vmap."""
    t = c.tangent(index)
    if t is None:
        return None
    args = [c.primal(i) if i != index else None for i in range(len(c.step.args))]
    cut = len(args) - len(c.step.keywords)
    keywords = dict(zip(c.step.keywords, args[cut:], strict=True))

    def one(x):
        return c.op(*args[:index], x, *args[index + 1 : cut], **keywords)

    return torch.vmap(one)(t)


@rule(
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.roll.default, aten.repeat.default),
    *(aten.tril.default, aten.triu.default, aten.diagonal.default, aten.unfold.default, aten.im2col.default),
    *(aten.col2im.default, aten.trace.default, aten.as_strided.default),
)
def first(c: Call):
    return mapped(c, 0)


@rule(aten.embedding.default)
def embedding(c: Call):
    w = c.tangent(0)
    return w[:, c.primal(1)]


@rule(aten.embedding_dense_backward.default)
def embedding_backward(c: Call):
    g, where, rows, padding = c.tangent(0), c.primal(1), c.primal(2), c.primal(3)
    scale = _frequency(where, rows) if c.primal(4) else None
    g = g.reshape(c.k, where.numel(), -1)
    where = where.flatten()
    if scale is not None:
        g = g / scale[where].unsqueeze(1)
    if padding >= 0:
        g = g.masked_fill((where == padding).unsqueeze(1), 0)
    return g.new_zeros(c.k, rows, g.shape[2]).index_add_(1, where, g)


def _frequency(where: Tensor, rows: int) -> Tensor:
    return torch.bincount(where.flatten(), minlength=rows)


@rule(aten.scatter_add.default, aten.index_add.default)
def scatter_add(c: Call):
    x, source = c.tangent(0), c.tangent(3)
    x = source.new_zeros(c.k, *c.out_shape) if x is None else x
    if source is None:
        return x
    where = c.primal(2)
    dim = c.primal(1) % len(c.out_shape) + 1
    if c.op is aten.index_add.default:
        return x.index_add(dim, where, source)
    return x.scatter_add(dim, where.expand(c.k, *where.shape), source)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(c: Call):
    x, values = c.tangent(0), c.tangent(2)
    indices, accumulate = c.primal(1), c.primal(3)

    def one(a, b):
        return aten.index_put(a, indices, b, accumulate)

    if x is None:
        x = values.new_zeros(c.k, *c.out_shape)
    if values is None:
        values = x.new_zeros(c.k, *c.shape(2))
    return torch.vmap(one)(x, values)


@rule(aten.max_pool2d_with_indices.default)
def max_pool(c: Call):
    where = c.out[1]

    def picked(t: Tensor) -> Tensor:
        return (
            t.flatten(-2)
            .gather(-1, where.flatten(-2).expand(*t.shape[:-2], -1))
            .reshape(*t.shape[:-2], *where.shape[-2:])
        )

    x = c.passed(0)
    return (x.mapped(f"picked {c.place()}", picked) if isinstance(x, Scaled) else picked(x)), None


@rule(aten.max_pool2d_with_indices_backward.default, unmoved=(1,))
def max_pool_backward(c: Call):
    g = c.tangent(0)
    where, shape = c.primal(7), c.out_shape
    out = g.new_zeros(c.k, *shape[:-2], shape[-2] * shape[-1])
    out.scatter_add_(-1, where.flatten(-2).expand(c.k, *where.shape[:-2], -1), g.flatten(-2))
    return out.reshape(c.k, *shape)


@rule(
    *(aten._adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.upsample_nearest2d.default),
    *(aten.upsample_bilinear2d.default, aten.avg_pool3d.default, aten._adaptive_avg_pool3d.default),
    *(aten.reflection_pad2d.default, aten.replication_pad2d.default, aten.pixel_shuffle.default),
    aten.pixel_unshuffle.default,
)
def per_image(c: Call):
    x = c.tangent(0)
    args = [c.primal(i) for i in range(1, len(c.step.args))]
    return c.op(x.flatten(0, 1), *args).unflatten(0, x.shape[:2])


@rule(
    *(aten.avg_pool2d_backward.default, aten._adaptive_avg_pool2d_backward.default, aten.avg_pool3d_backward.default),
    unmoved=(1,),
)
def per_image_backward(c: Call):
    g = c.tangent(0)
    shape = c.shape(1)
    like = g.new_empty(1).expand(c.k * shape[0], *shape[1:])
    args = [c.primal(i) for i in range(2, len(c.step.args))]
    return c.op(g.flatten(0, 1), like, *args).unflatten(0, (c.k, shape[0]))


@rule(aten.upsample_nearest2d_backward.default, aten.upsample_bilinear2d_backward.default)
def resampled_backward(c: Call):
    return mapped(c, 0)


@rule(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default, unmoved=(1,))
def nll_backward(c: Call):
    # Linear in the gradient of the loss, whatever the scores.
    return mapped(c, 0)


@rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll(c: Call):
    x = c.tangent(0)
    target, weight, reduction, ignored = (c.primal(i) for i in (1, 2, 3, 4))
    picked = _picked(x, target, ignored)
    if weight is not None:
        picked = picked * weight[target.clamp(0, weight.shape[0] - 1)]
    if reduction == 0:
        return -picked, None
    total = -picked.flatten(1).sum(1)
    return (total / c.out[1] if reduction == 1 else total), None


def _picked(x: Tensor, target: Tensor, ignored: int) -> Tensor:
    """The score of each row's class, 0 where the row is ignored: ``[K, N, C, ...]`` to ``[K, N, ...]``."""
    valid = target != ignored
    axis = min(x.dim() - 1, 2)
    index = torch.where(valid, target, 0).unsqueeze(axis - 1)
    return x.gather(axis, index.expand(x.shape[0], *index.shape)).squeeze(axis) * valid
