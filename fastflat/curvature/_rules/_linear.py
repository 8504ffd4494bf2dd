# SPDX-License-Identifier: Apache-2.0
"""Ops that have no second derivative."""

from __future__ import annotations

import operator

import torch

import fastflat.backends  # noqa: F401  (registers the ops of torch.ops.fastflat)

aten = torch.ops.aten

#: Linear or piecewise linear in all tensors together; positions of those that must not move (indices, conditions) are
#: not looked at, since integers and booleans have no derivative.
LINEAR = {
    operator.getitem,
    torch.ops.fastflat.fake_quantize_absmax.default,
    *(aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh_copy.default, aten._to_copy.default),
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.transpose.int),
    *(aten.permute.default, aten.expand.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.cat.default, aten.stack.default, aten.flip.default, aten.constant_pad_nd.default),
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.roll.default, aten.repeat.default),
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.neg.default, aten.where.self),
    *(aten.mul.Scalar, aten.div.Scalar, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim),
    *(aten.relu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.abs.default, aten.clamp.default),
    *(aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default, aten.amax.default),
    *(aten.max_pool2d_with_indices.default, aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default),
    *(aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default, aten.masked_fill.Scalar),
    *(aten.embedding.default, aten.reflection_pad1d.default, aten.reflection_pad2d.default),
}
