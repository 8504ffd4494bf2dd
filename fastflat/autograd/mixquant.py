# SPDX-License-Identifier: Apache-2.0
"""Derivatives of a mixture of quantizers, of every order and in every mode.

One rule, with the masks m_j and the residuals frozen, t_j = d_j - m_j u_j, and f_j the gradient factor of a scale::

    Value     y(x, s, w) = sum w_j Q_j(x, s_j)
    Gradient  g -> (gx, gs_j, gw_j) = (g sum w_j m_j,  f_j w_j sum g t_j,  sum g Q_j)
    Tangent   (tx, ts, tw) -> ty = tx sum w_j m_j + sum w_j t_j (f_j ts_j) + sum tw_j Q_j

Gradient and Tangent are transposes of each other. The frozen form is linear in (x, s) and in w, so its second
derivatives are those of both kinds together, d2y/dx dw_j = m_j and d2y/ds_j dw_j = f_j t_j: Gradient and Tangent
themselves with another weight, and :func:`_by_weight`.

``PlainValue`` is the short way for eager reverse mode and ``CompiledValue`` what torch.compile traces, as in
:mod:`fastflat.autograd.fake_quantize`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.autograd._batching import one_by_one
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    grid: tuple[int, int, float, int]  # axis, group, eps, rules
    trains_scale: bool
    dtype: torch.dtype | None
    kernels: SimpleNamespace


class Candidates(NamedTuple):
    """What describes the candidates and has no derivative: the limits of their grids, the factors of their scales'
    gradients; ``[n]`` each."""

    qmin: Tensor
    qmax: Tensor
    factor: Tensor


def _constant_scale(plan: Plan, tangent: Tensor | None) -> None:
    if not plan.trains_scale and tangent is not None:
        raise ValueError(
            "fastflat::mixquant: scales must carry no tangent with estimator='ste', which takes them as constants;"
            " use estimator='lsq' or detach them"
        )


class Value(Function):
    """y, with every derivative."""

    @staticmethod
    def forward(x, scale, weight, qmin, qmax, factor, plan):
        return plan.kernels.mixquant(x, scale, qmin, qmax, weight, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 7
        point = ctx.saved_tensors
        gx, gs, gw = Gradient.apply(gy, *point, ctx.plan)
        return gx, gs if ctx.plan.trains_scale else None, gw, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, ts, tw, *_):
        _constant_scale(ctx.plan, ts)
        return Tangent.apply(tx, ts, tw, *ctx.saved_tensors, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _batched(Value, info.batch_size, in_dims, inputs, _FORWARD)


class Gradient(Function):
    """(gx, gs, gw) of a cotangent gy."""

    @staticmethod
    def forward(gy, x, scale, weight, qmin, qmax, factor, plan):
        return backward_op("mixquant_bwd", plan.kernels, gy)(gy, x, scale, qmin, qmax, weight, factor, *plan.grid)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, cx, cs, cw):
        plan = ctx.plan
        gy, *point = ctx.saved_tensors
        cs = cs if plan.trains_scale else None
        by_gy = by_x = by_scale = None
        if cx is not None or cs is not None or cw is not None:
            by_gy = Tangent.apply(cx, cs, cw, *point, plan)
        if cw is not None:
            by_x, by_scale, _ = Gradient.apply(gy, *_with_weight(point, cw), plan)
        by_weight = _by_weight(gy, cx, cs, point, plan)
        return by_gy, by_x, by_scale if plan.trains_scale else None, by_weight, None, None, None, None

    @staticmethod
    def jvp(ctx, tgy, tx, ts, tw, *_):
        plan = ctx.plan
        _constant_scale(plan, ts)
        gy, *point = ctx.saved_tensors
        gx, gs, gw = Gradient.apply(torch.zeros_like(gy) if tgy is None else tgy, *point, plan)
        if tw is not None:
            more_x, more_s, _ = Gradient.apply(gy, *_with_weight(point, tw), plan)
            gx, gs = gx + more_x, gs + more_s
        more_w = _by_weight(gy, tx, ts, point, plan)
        return gx, gs, gw if more_w is None else gw + more_w

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _batched(Gradient, info.batch_size, in_dims, inputs, None)


class Tangent(Function):
    """ty of the tangents (tx, ts, tw), each of which may be None."""

    @staticmethod
    def forward(tx, ts, tw, x, scale, weight, qmin, qmax, factor, plan):
        return plan.kernels.mixquant_jvp(tx, ts, tw, x, scale, qmin, qmax, weight, factor, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 10
        plan = ctx.plan
        tx, ts, tw, *point = ctx.saved_tensors
        gx, gs, gw = Gradient.apply(gy, *point, plan)
        by_x = by_scale = None
        if tw is not None:
            by_x, by_scale, _ = Gradient.apply(gy, *_with_weight(point, tw), plan)
        return (
            None if tx is None else gx.to(tx.dtype),
            None if ts is None else gs,
            None if tw is None else gw,
            by_x,
            by_scale if plan.trains_scale else None,
            _by_weight(gy, tx, ts, point, plan),
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, ttx, tts, ttw, x_tangent, scale_tangent, weight_tangent, *_):
        plan = ctx.plan
        tx, ts, tw, *point = ctx.saved_tensors
        ty = Tangent.apply(ttx, tts, ttw, *point, plan)
        if weight_tangent is not None and (tx is not None or ts is not None):
            ty = ty + Tangent.apply(tx, ts, None, *_with_weight(point, weight_tangent), plan)
        if tw is not None and (x_tangent is not None or scale_tangent is not None):
            ty = ty + Tangent.apply(x_tangent, scale_tangent, None, *_with_weight(point, tw), plan)
        return ty

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _batched(Tangent, info.batch_size, in_dims, inputs, _TANGENT)


class PlainValue(Function):
    """y for eager reverse mode: the same rule with the least overhead."""

    @staticmethod
    def forward(ctx, x, scale, weight, qmin, qmax, factor, plan):
        ctx.save_for_backward(x, scale, weight, qmin, qmax, factor)
        ctx.plan = plan
        with below_autograd():
            return plan.kernels.mixquant(x, scale, qmin, qmax, weight, *plan.grid, plan.dtype)

    @staticmethod
    def backward(ctx, gy):
        plan = ctx.plan
        point = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            gx, gs, gw = Gradient.apply(gy, *point, plan)
        else:
            with below_autograd():
                gx, gs, gw = Gradient.forward(gy, *point, plan)
        return gx, gs if plan.trains_scale else None, gw, None, None, None, None


class CompiledValue(Function):
    """y as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, x, scale, weight, qmin, qmax, factor, grid, trains_scale, dtype):
        ctx.save_for_backward(x, scale, weight, qmin, qmax, factor)
        ctx.rest = (grid, trains_scale)
        return torch.ops.fastflat.mixquant(x, scale, qmin, qmax, weight, *grid, dtype)

    @staticmethod
    def backward(ctx, gy):
        x, scale, weight, qmin, qmax, factor = ctx.saved_tensors
        grid, trains_scale = ctx.rest
        gx, gs, gw = torch.ops.fastflat.mixquant_bwd(gy, x, scale, qmin, qmax, weight, factor, *grid)
        return gx, gs if trains_scale else None, gw, None, None, None, None, None, None


def mixquant(x: Tensor, scale: Tensor, weight: Tensor, candidates: Candidates, plan: Plan) -> Tensor:
    """y by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledValue.apply(x, scale, weight, *candidates, plan.grid, plan.trains_scale, plan.dtype)
    function = Value if transformed() else PlainValue
    return function.apply(x, scale, weight, *candidates, plan)


def _with_weight(point, weight):
    """The point of a call with another weight."""
    x, scale, _, *rest = point
    return x, scale, weight, *rest


def _by_weight(gy, tx, ts, point, plan):
    """The second derivatives by the weights, sum gy (m_j tx + t_j f_j ts_j): a one-hot Tangent for each candidate."""
    if tx is None and ts is None:
        return None
    x, scale, weight, *_ = point
    # In the compute type: the products are summed, not stored.
    wide = plan._replace(dtype=None)
    gy, x = gy.to(scale.dtype), x.to(scale.dtype)
    tx = None if tx is None else tx.to(scale.dtype)
    unit = torch.eye(weight.shape[0], dtype=scale.dtype, device=scale.device)
    one_hot = (Tangent.apply(tx, ts, None, *_with_weight((x, *point[1:]), w), wide) for w in unit)
    return torch.stack([(gy * t).sum() for t in one_hot])


#: Roles of the tensor inputs: shaped like x, like the scales, or [n].
_POINT = ("data", "scale", "plain", "plain", "plain", "plain")
_FORWARD = _POINT
_TANGENT = ("data", "scale", "plain", *_POINT)


def _batched(function, size, in_dims, inputs, roles):
    """vmap: one call with the batch among the channels where only data and scales are batched, else a call a sample."""
    *tensors, plan = inputs
    dims = in_dims[:-1]
    if roles is not None and not any(d is not None and role == "plain" for d, role in zip(dims, roles, strict=True)):
        axis, group, *rest = plan.grid
        folded = [_fold(t, d, role, size, axis) for t, d, role in zip(tensors, dims, roles, strict=True)]
        along = plan._replace(grid=(axis if group else 0, group, *rest))
        y = function.apply(*folded, along)
        return (y if axis < 0 else y.unflatten(0, (size, -1)).movedim(1, axis + 1)), 0
    return one_by_one(function, size, in_dims, *inputs)


def _fold(t, dim, role, size, axis):
    """A tensor of a call with the batch moved into the channel axis, or in front of the groups."""
    if t is None or role == "plain":
        return t
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    if role == "data":
        return t if axis < 0 else t.movedim(axis + 1, 1).flatten(0, 1)
    t = t.movedim(0, 1)
    return t if axis < 0 else t.flatten(1, 2)
