# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the weight-normalising quantizer, of every order and in every mode.

One rule, with mean, std, the mask m and the residual q - u frozen, d = q - m u::

    Value     y(w, c) = m (w - mean) / std + d c
    Gradient  gy -> (gw, gc) = (m gy / std, sum gy d)
    Tangent   (tw, tc) -> ty = m tw / std + d tc

Gradient and Tangent are transposes of each other; y is linear in (w, c), so all second derivatives are 0. ``Moments``
has no derivative: mean and std count as constants of every order.

``PlainValue`` is the short way for eager reverse mode and ``CompiledValue`` what torch.compile traces, as in
:mod:`fastflat.autograd.fake_quantize`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.autograd._batching import Batch, one_by_one
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    levels: int
    axis: int
    eps: float
    dtype: torch.dtype | None
    kernels: SimpleNamespace | None

    #: The family has no groups.
    group = 0

    @property
    def grid(self) -> tuple[int, int, float]:
        return self[:3]

    def along(self, axis: int) -> Plan:
        """The same rule with the channels on another axis."""
        return self._replace(axis=axis)


class Moments(Function):
    """Mean and standard deviation, constants of every derivative."""

    @staticmethod
    def forward(w, plan):
        return plan.kernels.liq_moments(w, plan.axis)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx, *_):
        return None, None

    @staticmethod
    def jvp(ctx, *_):
        return None, None

    @staticmethod
    def vmap(info, in_dims, w, plan):
        batch = Batch(info.batch_size, plan)
        mean, std = Moments.apply(batch.data(w, in_dims[0]), batch.plan)
        return (batch.split_parameter(mean), batch.split_parameter(std)), (0, 0)


class Value(Function):
    """y, with every derivative."""

    @staticmethod
    def forward(w, clip, mean, std, plan):
        return plan.kernels.liq(w, mean, std, clip, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 5
        return *Gradient.apply(gy, *ctx.saved_tensors, ctx.plan), None, None, None

    @staticmethod
    def jvp(ctx, tw, tclip, *_):
        return Tangent.apply(tw, tclip, *ctx.saved_tensors, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, w, clip, mean, std, plan):
        if in_dims[1] is not None:
            return one_by_one(Value, info.batch_size, in_dims, w, clip, mean, std, plan)
        batch = Batch(info.batch_size, plan)
        y = Value.apply(
            batch.data(w, in_dims[0]),
            clip,
            batch.parameter(mean, in_dims[2]),
            batch.parameter(std, in_dims[3]),
            batch.plan,
        )
        return batch.split_data(y), 0


class Gradient(Function):
    """(gw, gclip) of a cotangent gy."""

    @staticmethod
    def forward(gy, w, clip, mean, std, plan):
        return backward_op("liq_bwd", plan.kernels, gy)(gy, w, mean, std, clip, *plan.grid)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, cw, cclip):
        if cw is None and cclip is None:
            return (None,) * 6
        gy, *point = ctx.saved_tensors
        return Tangent.apply(cw, cclip, *point, ctx.plan._replace(dtype=gy.dtype)), None, None, None, None, None

    @staticmethod
    def jvp(ctx, tgy, *_):
        gy, *point = ctx.saved_tensors
        return Gradient.apply(torch.zeros_like(gy) if tgy is None else tgy, *point, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return one_by_one(Gradient, info.batch_size, in_dims, *inputs)


class Tangent(Function):
    """ty of the tangents (tw, tclip), each of which may be None."""

    @staticmethod
    def forward(tw, tclip, w, clip, mean, std, plan):
        return plan.kernels.liq_jvp(tw, tclip, w, mean, std, clip, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 7
        tw, tclip, *point = ctx.saved_tensors
        gw, gclip = Gradient.apply(gy, *point, ctx.plan)
        return None if tw is None else gw, None if tclip is None else gclip, None, None, None, None, None

    @staticmethod
    def jvp(ctx, ttw, ttclip, *_):
        _, _, *point = ctx.saved_tensors
        if ttw is None and ttclip is None:
            return torch.zeros_like(point[0], dtype=ctx.plan.dtype)
        return Tangent.apply(ttw, ttclip, *point, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return one_by_one(Tangent, info.batch_size, in_dims, *inputs)


class PlainValue(Function):
    """y for eager reverse mode: the same rule with the least overhead."""

    @staticmethod
    def forward(ctx, w, clip, plan):
        with below_autograd():
            mean, std = plan.kernels.liq_moments(w, plan.axis)
            y = plan.kernels.liq(w, mean, std, clip, *plan.grid, plan.dtype)
        ctx.save_for_backward(w, clip, mean, std)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx, gy):
        w, clip, mean, std = ctx.saved_tensors
        plan = ctx.plan
        if torch.is_grad_enabled() or transformed():
            return *Gradient.apply(gy, w, clip, mean, std, plan), None
        with below_autograd():
            return *backward_op("liq_bwd", plan.kernels, gy)(gy, w, mean, std, clip, *plan.grid), None


class CompiledValue(Function):
    """y as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, w, clip, levels, axis, eps, dtype):
        mean, std = torch.ops.fastflat.liq_moments(w, axis)
        ctx.save_for_backward(w, mean, std, clip)
        ctx.grid = (levels, axis, eps)
        return torch.ops.fastflat.liq(w, mean, std, clip, levels, axis, eps, dtype)

    @staticmethod
    def backward(ctx, gy):
        gw, gclip = torch.ops.fastflat.liq_bwd(gy, *ctx.saved_tensors, *ctx.grid)
        return gw, gclip, None, None, None, None


def liq(w: Tensor, clip: Tensor, plan: Plan) -> Tensor:
    """y by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        # by place: the compiler of torch 2.10 reads no property of a named tuple
        return CompiledValue.apply(w, clip, *plan[:4])
    if not transformed():
        return PlainValue.apply(w, clip, plan)
    return Value.apply(w, clip, *Moments.apply(w.detach(), plan), plan)
