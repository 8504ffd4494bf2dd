# SPDX-License-Identifier: Apache-2.0
"""Derivatives of binarization, of every order and in every mode.

One rule, with the signs s and the masks m = 1{|x| <= clip} frozen, T = sum h, A(v) = sum(h s v) / T over a scale::

    Value     y = alpha b                    alpha = A(x), which is sum h|x| / T; b = s + m (x - x0), x0 = x frozen
    Gradient  (gy, ga) -> gx = m alpha gy + (sum(gy b) + ga) h s / T
    Tangent   tx -> (ty, ta) = (m alpha tx + b A(tx), A(tx))

Gradient and Tangent are transposes of each other. y is quadratic in x, so its second derivative is the constant form
B(u, v) = m (u A(v) + v A(u)), symmetric; :func:`_second` and :func:`_second_gradient` compose it of PyTorch
operations. With through_alpha off the scale of y is a constant, its terms are absent and B is 0; alpha as a result of
its own keeps its derivative A. h and clip are constants of every derivative.

``PlainValue`` is the short way for eager reverse mode and ``CompiledValue`` what torch.compile traces, as in
:mod:`fastflat.autograd.fake_quantize`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._ops import compute_dtype
from fastflat.autograd._batching import Batch
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed
from fastflat.backends.reference.layout import blocked


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    clip: float
    through_alpha: bool
    axis: int
    group: int
    dtype: torch.dtype | None
    kernels: SimpleNamespace | None

    @property
    def rule(self) -> tuple[float, bool, int, int]:
        return self[:4]

    def along(self, axis: int) -> Plan:
        """The same rule with the channels on another axis."""
        return self._replace(axis=axis)


class Value(Function):
    """y and alpha, with every derivative."""

    @staticmethod
    def forward(x, h, plan):
        return plan.kernels.binarize(x, h, plan.axis, plan.group, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h, plan = inputs
        remember(ctx, x, h, output[1], plan)

    @staticmethod
    def backward(ctx, gy, ga):
        if gy is None and ga is None:
            return None, None, None
        return Gradient.apply(_filled(gy, ctx.saved_tensors[0], ctx.plan), ga, *ctx.saved_tensors, ctx.plan), None, None

    @staticmethod
    def jvp(ctx, tx, th, _plan):
        _constant_importance(th)
        return Tangent.apply(tx, *ctx.saved_tensors, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, x, h, plan):
        batch = Batch(info.batch_size, plan)
        y, alpha = Value.apply(batch.data(x, in_dims[0]), _importance(batch, h, x, *in_dims[:2]), batch.plan)
        return (batch.split_data(y), batch.split_parameter(alpha)), (0, 0)


class Gradient(Function):
    """gx of the cotangents gy and ga, the second of which may be None."""

    @staticmethod
    def forward(gy, ga, x, h, alpha, plan):
        return backward_op("binarize_bwd", plan.kernels, gy, ga)(gy, ga, x, h, alpha, *plan.rule)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, cx):
        if cx is None:
            return (None,) * 6
        gy, ga, x, h, alpha = ctx.saved_tensors
        plan = ctx.plan
        by_gy, by_ga = Tangent.apply(cx, x, h, alpha, plan._replace(dtype=gy.dtype))
        by_x = _second_gradient(gy, cx, x, h, plan) if plan.through_alpha else None
        return by_gy, None if ga is None else by_ga, by_x, None, None, None

    @staticmethod
    def jvp(ctx, tgy, tga, tx, th, _talpha, _plan):
        # The tangent of alpha is that of x once more: _second_gradient has it.
        _constant_importance(th)
        gy, _, x, h, alpha = ctx.saved_tensors
        plan = ctx.plan
        tgx = Gradient.apply(torch.zeros_like(gy) if tgy is None else tgy, tga, x, h, alpha, plan)
        if tx is not None and plan.through_alpha:
            tgx = tgx + _second_gradient(gy, tx, x, h, plan)
        return tgx

    @staticmethod
    def vmap(info, in_dims, gy, ga, x, h, alpha, plan):
        batch = Batch(info.batch_size, plan)
        gx = Gradient.apply(
            batch.data(gy, in_dims[0]),
            batch.parameter(ga, in_dims[1]),
            batch.data(x, in_dims[2]),
            _importance(batch, h, x, in_dims[2], in_dims[3]),
            batch.parameter(alpha, in_dims[4]),
            batch.plan,
        )
        return batch.split_data(gx), 0


class Tangent(Function):
    """ty and ta of a tangent tx."""

    @staticmethod
    def forward(tx, x, h, alpha, plan):
        return plan.kernels.binarize_jvp(tx, x, h, alpha, *plan.rule, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy, ga):
        if gy is None and ga is None:
            return (None,) * 5
        tx, x, h, alpha = ctx.saved_tensors
        plan = ctx.plan
        by_x = None if gy is None or not plan.through_alpha else _second_gradient(gy, tx, x, h, plan)
        return Gradient.apply(_filled(gy, x, plan), ga, x, h, alpha, plan), by_x, None, None, None

    @staticmethod
    def jvp(ctx, ttx, x_tangent, th, _talpha, _plan):
        _constant_importance(th)
        tx, x, h, alpha = ctx.saved_tensors
        plan = ctx.plan
        ty, ta = Tangent.apply(torch.zeros_like(tx) if ttx is None else ttx, x, h, alpha, plan)
        if x_tangent is not None and plan.through_alpha:
            ty = ty + _second(tx, x_tangent, x, h, plan)
        return ty, ta

    @staticmethod
    def vmap(info, in_dims, tx, x, h, alpha, plan):
        batch = Batch(info.batch_size, plan)
        ty, ta = Tangent.apply(
            batch.data(tx, in_dims[0]),
            batch.data(x, in_dims[1]),
            _importance(batch, h, x, in_dims[1], in_dims[2]),
            batch.parameter(alpha, in_dims[3]),
            batch.plan,
        )
        return (batch.split_data(ty), batch.split_parameter(ta)), (0, 0)


class PlainValue(Function):
    """y and alpha for eager reverse mode: the same rule with the least overhead."""

    @staticmethod
    def forward(ctx, x, h, plan):
        with below_autograd():
            y, alpha = plan.kernels.binarize(x, h, plan.axis, plan.group, plan.dtype)
        ctx.save_for_backward(x, h, alpha)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return y, alpha

    @staticmethod
    def backward(ctx, gy, ga):
        x, h, alpha = ctx.saved_tensors
        plan = ctx.plan
        gy = _filled(gy, x, plan)
        if torch.is_grad_enabled() or transformed():
            return Gradient.apply(gy, ga, x, h, alpha, plan), None, None
        with below_autograd():
            return backward_op("binarize_bwd", plan.kernels, gy, ga)(gy, ga, x, h, alpha, *plan.rule), None, None


class CompiledValue(Function):
    """y and alpha as torch.compile traces them, forward and one backward."""

    @staticmethod
    def forward(ctx, x, h, clip, through_alpha, axis, group, dtype):
        y, alpha = torch.ops.fastflat.binarize(x, h, axis, group, dtype)
        ctx.save_for_backward(x, h, alpha)
        ctx.rule = (clip, through_alpha, axis, group)
        return y, alpha

    @staticmethod
    def backward(ctx, gy, ga):
        gx = torch.ops.fastflat.binarize_bwd(gy, ga, *ctx.saved_tensors, *ctx.rule)
        return gx, None, None, None, None, None, None


def binarize(x: Tensor, h: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """y and alpha by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        # by place: the compiler of torch 2.10 reads no property of a named tuple
        return CompiledValue.apply(x, h, *plan[:5])
    function = Value if transformed() else PlainValue
    return function.apply(x, h, plan)


def _filled(gy: Tensor | None, x: Tensor, plan: Plan) -> Tensor:
    return torch.zeros_like(x, dtype=plan.dtype) if gy is None else gy


def _constant_importance(tangent: Tensor | None) -> None:
    if tangent is not None:
        raise ValueError("fastflat::binarize: importance must carry no tangent, got one; detach it")


def _importance(batch: Batch, h: Tensor | None, x: Tensor, x_dim: int | None, h_dim: int | None) -> Tensor | None:
    """h of a call whose batch has moved into the channels: along those it has the size of x."""
    if h is None:
        return None
    if batch.axis >= 0:
        h = h if h_dim is None else h.movedim(h_dim, 0)
        channels = x.shape[batch.axis + (0 if x_dim is None else int(x_dim <= batch.axis))]
        where = batch.axis + int(h_dim is not None)
        h = h.expand([channels if d == where else s for d, s in enumerate(h.shape)])
        h_dim = None if h_dim is None else 0
    return batch.data(h, h_dim)


# The second derivative in PyTorch operations, differentiable to any order in all but x, which it depends on by signs.


def _sum(t: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """Sum of a blocked t over the elements of each scale, shaped to broadcast."""
    if group:
        return t.sum(-1, keepdim=True)
    along = [d for d in range(x.dim()) if d != axis]
    return t.sum(along, keepdim=True) if along else t


class _Frozen:
    """m and h s / T, blocked and in the compute type."""

    def __init__(self, x: Tensor, h: Tensor | None, plan: Plan) -> None:
        compute = compute_dtype(x.dtype)
        data = blocked(x.detach(), plan.group).to(compute)
        one = torch.ones_like(data)
        weight = one if h is None else blocked(h.expand_as(x), plan.group)
        total = _sum(weight * one, x, plan.axis, plan.group)
        self.mask = (data.abs() <= plan.clip).to(compute)
        sign = torch.where(data < 0, -one, one)
        self.share = torch.where(total == 0, torch.zeros_like(data), weight * sign / total)


def _second(u: Tensor, v: Tensor, x: Tensor, h: Tensor | None, plan: Plan) -> Tensor:
    """B(u, v), in the storage type of y."""
    frozen = _Frozen(x, h, plan)
    u, v = (blocked(t, plan.group).to(frozen.mask.dtype) for t in (u, v))
    along_u, along_v = (_sum(frozen.share * t, x, plan.axis, plan.group) for t in (u, v))
    return (frozen.mask * (u * along_v + v * along_u)).reshape(x.shape).to(plan.dtype or x.dtype)


def _second_gradient(gy: Tensor, u: Tensor, x: Tensor, h: Tensor | None, plan: Plan) -> Tensor:
    """The transpose of v -> B(u, v), applied to gy: the derivative of sum(gy y) by x, along u."""
    frozen = _Frozen(x, h, plan)
    gy, u = (blocked(t, plan.group).to(frozen.mask.dtype) for t in (gy, u))
    passed = frozen.mask * gy
    along_u, met = (_sum(t, x, plan.axis, plan.group) for t in (frozen.share * u, passed * u))
    return (passed * along_u + frozen.share * met).reshape(x.shape).to(x.dtype)
