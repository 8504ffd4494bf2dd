# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the general_quantize family: noise, all formats and estimators.

The rule is that of :mod:`fastflat.autograd.fake_quantize`, with the draws of the forward made again from ``state``::

    Gradient  g -> (gx, gs, gz, gdelta) = (m k g,  f sum g (d - m k u),  -f s sum g (1 - m k),  sum m |g| e x)
    Tangent   (tx, ts, tz) -> ty = m tx + (d - m u) (f ts) - (1 - m) s (f tz)

k = 1 + delta sign(g) e scales what passes (EWGS), e is what rounding took away. EWGS is no gradient of anything:
Tangent and everything of second order use k = 1. nu, a and the state are constants.

Under vmap a call without draws becomes one call with more channels. With draws each sample is a call of its own: its
draws must not depend on how many samples there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.autograd import _batching
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed
from fastflat.autograd.fake_quantize import Plan, constant_scale, held, passes_all


class Value(Function):
    """y, with every derivative."""

    @staticmethod
    def forward(x, scale, zero_point, state, nu, a, delta, plan):
        return plan.kernels.general_quantize(x, scale, zero_point, state, nu, a, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 8
        return _present(ctx, Gradient.apply(gy, *ctx.saved_tensors, ctx.plan))

    @staticmethod
    def jvp(ctx, tx, ts, tz, *_):
        constant_scale(ctx.plan, ts, tz)
        x, scale, zero_point, state, nu, a, _ = ctx.saved_tensors
        return Tangent.apply(tx, ts, tz, x, scale, zero_point, state, nu, a, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, x, scale, zero_point, state, nu, a, delta, plan):
        args = (x, scale, zero_point, state, nu, a, delta, plan)
        if drawn(state, nu, a, delta):
            return _batching.one_by_one(Value, info.batch_size, in_dims, *args)
        batch = _batching.Batch(info.batch_size, plan)
        x, scale, zero_point = batch.inputs(in_dims, x, scale, zero_point)
        return batch.split_data(Value.apply(x, scale, zero_point, None, None, None, None, batch.plan)), 0


class Gradient(Function):
    """(gx, gs, gz, gdelta) of a cotangent gy; empty where a value is a constant."""

    @staticmethod
    def forward(gy, x, scale, zero_point, state, nu, a, delta, plan):
        return backward_op("general_quantize_bwd", plan.kernels, gy)(
            gy, x, scale, zero_point, state, nu, a, delta, *plan.grid, plan.factor, plan.trains_scale, plan.trains_delta
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, cx, cs, cz, _):
        gy, x, scale, zero_point, state, nu, a, _ = ctx.saved_tensors
        plan = ctx.plan
        cs = cs if plan.trains_scale else None
        cz = cz if plan.trains_scale and zero_point is not None else None
        by_gy = None
        if cx is not None or cs is not None or cz is not None:
            by_gy = Tangent.apply(cx, cs, cz, x, scale, zero_point, state, nu, a, plan)
        by_scale, by_zero = _crossed(plan, gy, x, scale, zero_point, state, nu, a, cz, cs)
        return by_gy, None, by_scale, by_zero, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tgy, _x, ts, tz, *_):
        constant_scale(ctx.plan, ts, tz)
        gy, x, scale, zero_point, state, nu, a, delta = ctx.saved_tensors
        tgy = torch.zeros_like(gy) if tgy is None else tgy
        plan = ctx.plan
        gx, gs, gz, gd = Gradient.apply(tgy, x, scale, zero_point, state, nu, a, None, plan)
        by_zero, by_scale = _crossed(plan, gy, x, scale, zero_point, state, nu, a, tz, ts)
        gd = gd if delta is None or not plan.trains_delta else torch.zeros_like(delta)
        return gx, gs if by_zero is None else gs + by_zero, gz if by_scale is None else gz + by_scale, gd

    @staticmethod
    def vmap(info, in_dims, gy, x, scale, zero_point, state, nu, a, delta, plan):
        args = (gy, x, scale, zero_point, state, nu, a, delta, plan)
        s_dim = 0 if plan.trains_scale else None
        dims = (0, s_dim, s_dim if zero_point is not None else None, 0 if plan.trains_delta else None)
        if drawn(state, nu, a, delta):
            results, _ = _batching.one_by_one(Gradient, info.batch_size, in_dims, *args)
            return tuple(r if d == 0 else r[0] for r, d in zip(results, dims, strict=True)), dims
        batch = _batching.Batch(info.batch_size, plan)
        x, scale, zero_point = batch.inputs(in_dims[1:], x, scale, zero_point)
        gy = batch.data(gy, in_dims[0])
        gx, gs, gz, gd = Gradient.apply(gy, x, scale, zero_point, None, None, None, None, batch.plan)
        outputs = (
            batch.split_data(gx),
            gs if dims[1] is None else batch.split_parameter(gs),
            gz if dims[2] is None else batch.split_parameter(gz),
            gd,
        )
        return outputs, dims


class Tangent(Function):
    """ty of the tangents (tx, ts, tz), each of which may be None."""

    @staticmethod
    def forward(tx, ts, tz, x, scale, zero_point, state, nu, a, plan):
        return plan.kernels.general_quantize_jvp(
            tx, ts, tz, x, scale, zero_point, state, nu, a, *plan.grid, plan.factor, plan.dtype
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 10
        tx, ts, tz, x, scale, zero_point, state, nu, a = ctx.saved_tensors
        gx, gs, gz, _ = Gradient.apply(gy, x, scale, zero_point, state, nu, a, None, ctx.plan)
        by_scale, by_zero = _crossed(ctx.plan, gy, x, scale, zero_point, state, nu, a, tz, ts)
        return (
            None if tx is None else gx.to(tx.dtype),
            None if ts is None else gs,
            None if tz is None else gz,
            None,
            by_scale,
            by_zero,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, ttx, tts, ttz, _x, scale_tangent, zero_tangent, *_):
        _, ts, tz, x, scale, zero_point, state, nu, a = ctx.saved_tensors
        if zero_point is not None:
            # The cross term -(1 - m) f^2 (tz ds + ts dz) is a zero-point tangent of f (tz ds + ts dz) / s.
            pairs = [(tz, scale_tangent), (ts, zero_tangent)]
            crossed = [p * q for p, q in pairs if p is not None and q is not None]
            if crossed:
                cross = sum(crossed) * (ctx.plan.factor / held(scale, ctx.plan))
                ttz = cross if ttz is None else ttz + cross
        return Tangent.apply(ttx, tts, ttz, x, scale, zero_point, state, nu, a, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, tx, ts, tz, x, scale, zero_point, state, nu, a, plan):
        args = (tx, ts, tz, x, scale, zero_point, state, nu, a, plan)
        if drawn(state, nu, a):
            return _batching.one_by_one(Tangent, info.batch_size, in_dims, *args)
        batch = _batching.Batch(info.batch_size, plan)
        tx = batch.data(tx, in_dims[0])
        ts, tz = (batch.parameter(t, d) for t, d in ((ts, in_dims[1]), (tz, in_dims[2])))
        x, scale, zero_point = batch.inputs(in_dims[3:], x, scale, zero_point)
        return batch.split_data(Tangent.apply(tx, ts, tz, x, scale, zero_point, None, None, None, batch.plan)), 0


class PlainValue(Function):
    """y for eager reverse mode: the same rule with the least overhead."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, state, nu, a, delta, plan):
        ctx.passes, ctx.plan = passes_all(plan), plan
        if ctx.passes:
            ctx.type = x.dtype
        else:
            ctx.save_for_backward(x, scale, zero_point, state, nu, a, delta)
        with below_autograd():
            return plan.kernels.general_quantize(x, scale, zero_point, state, nu, a, *plan.grid, plan.dtype)

    @staticmethod
    def backward(ctx, gy):
        if ctx.passes:
            return gy.to(ctx.type), *(None,) * 7
        plan, saved = ctx.plan, ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            return _present(ctx, Gradient.apply(gy, *saved, plan))
        with below_autograd():
            gradients = backward_op("general_quantize_bwd", plan.kernels, gy)(
                gy, *saved, *plan.grid, plan.factor, plan.trains_scale, plan.trains_delta
            )
        return _present(ctx, gradients)


class CompiledValue(Function):
    """y as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, state, nu, a, delta, grid, factor, trains_scale, trains_delta, dtype):
        ctx.save_for_backward(x, scale, zero_point, state, nu, a, delta)
        ctx.rest = (grid, factor, trains_scale, trains_delta)
        return torch.ops.fastflat.general_quantize(x, scale, zero_point, state, nu, a, *grid, dtype)

    @staticmethod
    def backward(ctx, gy):
        x, scale, zero_point, state, nu, a, delta = ctx.saved_tensors
        grid, factor, trains_scale, trains_delta = ctx.rest
        gx, gs, gz, gd = torch.ops.fastflat.general_quantize_bwd(
            gy, x, scale, zero_point, state, nu, a, delta, *grid, factor, trains_scale, trains_delta
        )
        of_scale = gs if trains_scale else None
        of_zero = gz if trains_scale and zero_point is not None else None
        return gx, of_scale, of_zero, None, None, None, gd if trains_delta else None, None, None, None, None, None


def general_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    state: Tensor | None,
    nu: Tensor | None,
    a: Tensor | None,
    delta: Tensor | None,
    plan: Plan,
) -> Tensor:
    """y by the Function that the mode in force needs."""
    tensors = (x, scale, zero_point, state, nu, a, delta)
    if torch.compiler.is_compiling():
        return CompiledValue.apply(*tensors, plan.grid, plan.factor, plan.trains_scale, plan.trains_delta, plan.dtype)
    return (Value if transformed() else PlainValue).apply(*tensors, plan)


def _present(ctx, gradients):
    """The gradients as a backward returns them: None for what has none."""
    gx, gs, gz, gd = gradients
    plan, zero_point = ctx.plan, ctx.saved_tensors[2]
    if not plan.trains_scale:
        gs = gz = None
    return gx, gs, gz if zero_point is not None else None, None, None, None, gd if plan.trains_delta else None, None


def _crossed(plan, gy, x, scale, zero_point, state, nu, a, with_scale, with_zero):
    """The second derivative d2y/ds dz = -f^2 (1 - m), summed against gy: the terms for s and for z."""
    if zero_point is None or not plan.trains_scale or (with_scale is None and with_zero is None):
        return None, None
    once = plan._replace(factor=1.0)
    gz = Gradient.apply(gy, x, scale, zero_point, state, nu, a, None, once)[2]
    second = gz * (plan.factor**2 / held(scale, plan))
    return (None if with_scale is None else second * with_scale), (None if with_zero is None else second * with_zero)


def drawn(*draws: Tensor | None) -> bool:
    """Whether vmap must call once a sample: there are draws, or scalars that may differ."""
    return any(t is not None for t in draws)
