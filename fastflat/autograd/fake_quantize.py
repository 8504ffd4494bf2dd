# SPDX-License-Identifier: Apache-2.0
"""Derivatives of fake-quantization, of every order and in every mode.

One rule, with the in-range mask m and the residual frozen (f is the gradient factor of scale and zero-point)::

    Value     y(x, s, z)
    Gradient  g -> (gx, gs, gz) = (m g,  f sum g t,  -f s sum (1 - m) g)        t = (q - z) - m u
    Tangent   (tx, ts, tz) -> ty = m tx + t (f ts) - (1 - m) s (f tz)

Gradient and Tangent are transposes of each other, so each one's derivative is written with the two of them. With a
zero-point the frozen form has one second derivative, d2y/ds dz = -f^2 (1 - m); without one it is linear.

``PlainValue`` and ``PlainAbsmax`` are the short way for eager reverse mode; the others serve torch.func, forward mode
and higher orders, and cost more per call. ``CompiledValue`` and ``CompiledAbsmax`` are what torch.compile traces: only
dispatcher ops, and no jvp, which Dynamo refuses.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._spec import RULES
from fastflat.autograd import _batching
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    grid: tuple[int, int, int, int, float, int]  # qmin, qmax, axis, group, eps, rules
    factor: float
    trains_scale: bool
    dtype: torch.dtype | None
    kernels: SimpleNamespace
    trains_delta: bool = False

    @property
    def axis(self) -> int:
        return self.grid[2]

    @property
    def group(self) -> int:
        return self.grid[3]

    def along(self, axis: int) -> Plan:
        """The same rule with the channels on another axis."""
        qmin, qmax, _, group, eps, rules = self.grid
        return self._replace(grid=(qmin, qmax, axis, group, eps, rules))


_RULES_OF_PASSING = RULES["mask_none"] | RULES["through_chain"] | RULES["rectified"]


def passes_all(plan: Plan) -> bool:
    """Whether dL/dx is dL/dy as it is and nothing else has a gradient: a backward then has nothing to compute."""
    return not plan.trains_scale and plan.grid[5] & _RULES_OF_PASSING == RULES["mask_none"]


def constant_scale(plan: Plan, *tangents: Tensor | None) -> None:
    """Refuse tangents of a scale and zero-point that count as constants."""
    if not plan.trains_scale and any(t is not None for t in tangents):
        raise ValueError(
            "fastflat::fake_quantize: scale and zero_point must carry no tangent with estimator='ste', which takes"
            " them as constants; use estimator='lsq' or detach them"
        )


class Value(Function):
    """y, with every derivative."""

    @staticmethod
    def forward(x, scale, zero_point, plan):
        return plan.kernels.fake_quantize(x, scale, zero_point, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return None, None, None, None
        x, scale, zero_point = ctx.saved_tensors
        gx, gs, gz = Gradient.apply(gy, x, scale, zero_point, ctx.plan)
        return _present(ctx.plan, zero_point, gx, gs, gz)

    @staticmethod
    def jvp(ctx, tx, ts, tz, _):
        constant_scale(ctx.plan, ts, tz)
        x, scale, zero_point = ctx.saved_tensors
        return Tangent.apply(tx, ts, tz, x, scale, zero_point, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, x, scale, zero_point, plan):
        batch = _batching.Batch(info.batch_size, plan)
        x, scale, zero_point = batch.inputs(in_dims, x, scale, zero_point)
        return batch.split_data(Value.apply(x, scale, zero_point, batch.plan)), 0


class Gradient(Function):
    """(gx, gs, gz) of a cotangent gy; gs and gz are empty where the scale is a constant or no zero-point is."""

    @staticmethod
    def forward(gy, x, scale, zero_point, plan):
        return backward_op("fake_quantize_bwd", plan.kernels, gy)(
            gy, x, scale, zero_point, *plan.grid, plan.factor, plan.trains_scale
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, cx, cs, cz):
        gy, x, scale, zero_point = ctx.saved_tensors
        cs, cz = _trained(ctx.plan, zero_point, cs, cz)
        by_gy = None
        if cx is not None or cs is not None or cz is not None:
            by_gy = Tangent.apply(cx, cs, cz, x, scale, zero_point, ctx.plan)
        return by_gy, None, *_crossed(ctx.plan, gy, x, scale, zero_point, cz, cs), None

    @staticmethod
    def jvp(ctx, tgy, _x, ts, tz, _plan):
        constant_scale(ctx.plan, ts, tz)
        gy, x, scale, zero_point = ctx.saved_tensors
        tgy = torch.zeros_like(gy) if tgy is None else tgy
        gx, gs, gz = Gradient.apply(tgy, x, scale, zero_point, ctx.plan)
        by_zero, by_scale = _crossed(ctx.plan, gy, x, scale, zero_point, tz, ts)
        return gx, gs if by_zero is None else gs + by_zero, gz if by_scale is None else gz + by_scale

    @staticmethod
    def vmap(info, in_dims, gy, x, scale, zero_point, plan):
        batch = _batching.Batch(info.batch_size, plan)
        x, scale, zero_point = batch.inputs(in_dims[1:], x, scale, zero_point)
        gx, gs, gz = Gradient.apply(batch.data(gy, in_dims[0]), x, scale, zero_point, batch.plan)
        s_dim = 0 if plan.trains_scale else None
        z_dim = s_dim if zero_point is not None else None
        outputs = (
            batch.split_data(gx),
            gs if s_dim is None else batch.split_parameter(gs),
            gz if z_dim is None else batch.split_parameter(gz),
        )
        return outputs, (0, s_dim, z_dim)


class Tangent(Function):
    """ty of the tangents (tx, ts, tz), each of which may be None."""

    @staticmethod
    def forward(tx, ts, tz, x, scale, zero_point, plan):
        return plan.kernels.fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, *plan.grid, plan.factor, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gy):
        if gy is None:
            return (None,) * 7
        tx, ts, tz, x, scale, zero_point = ctx.saved_tensors
        gx, gs, gz, _ = _present(ctx.plan, zero_point, *Gradient.apply(gy, x, scale, zero_point, ctx.plan))
        by_scale, by_zero = _crossed(ctx.plan, gy, x, scale, zero_point, tz, ts)
        return (
            None if tx is None else gx.to(tx.dtype),
            None if ts is None else gs,
            None if tz is None else gz,
            None,
            by_scale,
            by_zero,
            None,
        )

    @staticmethod
    def jvp(ctx, ttx, tts, ttz, _x, scale_tangent, zero_tangent, _plan):
        _, ts, tz, x, scale, zero_point = ctx.saved_tensors
        if zero_point is not None:
            # The cross term -(1 - m) f^2 (tz ds + ts dz) is a zero-point tangent of f (tz ds + ts dz) / s.
            pairs = [(tz, scale_tangent), (ts, zero_tangent)]
            crossed = [a * b for a, b in pairs if a is not None and b is not None]
            if crossed:
                cross = sum(crossed) * (ctx.plan.factor / held(scale, ctx.plan))
                ttz = cross if ttz is None else ttz + cross
        return Tangent.apply(ttx, tts, ttz, x, scale, zero_point, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, tx, ts, tz, x, scale, zero_point, plan):
        batch = _batching.Batch(info.batch_size, plan)
        tx = batch.data(tx, in_dims[0])
        ts, tz = (batch.parameter(t, d) for t, d in ((ts, in_dims[1]), (tz, in_dims[2])))
        x, scale, zero_point = batch.inputs(in_dims[3:], x, scale, zero_point)
        return batch.split_data(Tangent.apply(tx, ts, tz, x, scale, zero_point, batch.plan)), 0


class AbsmaxValue(Function):
    """(y, scale) with the scale taken from x and held constant, with every derivative."""

    @staticmethod
    def forward(x, plan):
        return plan.kernels.fake_quantize_absmax(x, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        remember(ctx, inputs[0], output[1], inputs[1])

    @staticmethod
    def backward(ctx, gy, _):
        if gy is None:
            return None, None
        x, scale = ctx.saved_tensors
        return Gradient.apply(gy, x, scale, None, ctx.plan)[0], None

    @staticmethod
    def jvp(ctx, tx, _):
        x, scale = ctx.saved_tensors
        return Tangent.apply(tx, None, None, x, scale, None, ctx.plan), None

    @staticmethod
    def vmap(info, in_dims, x, plan):
        batch = _batching.Batch(info.batch_size, plan)
        y, scale = AbsmaxValue.apply(batch.data(x, in_dims[0]), batch.plan)
        return (batch.split_data(y), batch.split_parameter(scale)), (0, 0)


class PlainValue(Function):
    """y for eager reverse mode: the same rule with the least overhead."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, plan):
        ctx.passes, ctx.plan = passes_all(plan), plan
        if ctx.passes:
            ctx.type = x.dtype
        else:
            ctx.save_for_backward(x, scale, zero_point)
        with below_autograd():
            return plan.kernels.fake_quantize(x, scale, zero_point, *plan.grid, plan.dtype)

    @staticmethod
    def backward(ctx, gy):
        if ctx.passes:
            return gy.to(ctx.type), None, None, None
        x, scale, zero_point = ctx.saved_tensors
        return gradients(gy, x, scale, zero_point, ctx.plan)


class PlainAbsmax(Function):
    """(y, scale) for eager reverse mode."""

    @staticmethod
    def forward(ctx, x, plan):
        with below_autograd():
            y, scale = plan.kernels.fake_quantize_absmax(x, *plan.grid, plan.dtype)
        ctx.save_for_backward(x, scale)
        ctx.mark_non_differentiable(scale)
        ctx.plan = plan
        return y, scale

    @staticmethod
    def backward(ctx, gy, _):
        x, scale = ctx.saved_tensors
        return _gradient(gy, x, scale, None, ctx.plan)[0], None


class CompiledValue(Function):
    """y as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, grid, factor, trains_scale, dtype):
        ctx.save_for_backward(x, scale, zero_point)
        ctx.rest = (grid, factor, trains_scale)
        return torch.ops.fastflat.fake_quantize(x, scale, zero_point, *grid, dtype)

    @staticmethod
    def backward(ctx, gy):
        x, scale, zero_point = ctx.saved_tensors
        grid, factor, trains_scale = ctx.rest
        gx, gs, gz = torch.ops.fastflat.fake_quantize_bwd(gy, x, scale, zero_point, *grid, factor, trains_scale)
        if not trains_scale:
            return gx, None, None, None, None, None, None
        return gx, gs, gz if zero_point is not None else None, None, None, None, None


class CompiledAbsmax(Function):
    """(y, scale) as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, x, grid, dtype):
        y, scale = torch.ops.fastflat.fake_quantize_absmax(x, *grid, dtype)
        ctx.save_for_backward(x, scale)
        ctx.mark_non_differentiable(scale)
        ctx.grid = grid
        return y, scale

    @staticmethod
    def backward(ctx, gy, _):
        x, scale = ctx.saved_tensors
        return torch.ops.fastflat.fake_quantize_bwd(gy, x, scale, None, *ctx.grid, 1.0, False)[0], None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, plan: Plan) -> Tensor:
    """y by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledValue.apply(x, scale, zero_point, plan.grid, plan.factor, plan.trains_scale, plan.dtype)
    function = Value if transformed() else PlainValue
    return function.apply(x, scale, zero_point, plan)


def fake_quantize_absmax(x: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(y, scale) by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledAbsmax.apply(x, plan.grid, plan.dtype)
    function = AbsmaxValue if transformed() else PlainAbsmax
    return function.apply(x, plan)


def gradients(gy, x, scale, zero_point, plan):
    """The gradients as a backward returns them, differentiable where they must be."""
    return _present(plan, zero_point, *_gradient(gy, x, scale, zero_point, plan))


def _gradient(gy, x, scale, zero_point, plan):
    """The gradients, through a second Function only where they must be differentiable themselves."""
    if torch.is_grad_enabled() or transformed():
        return Gradient.apply(gy, x, scale, zero_point, plan)
    with below_autograd():
        return backward_op("fake_quantize_bwd", plan.kernels, gy)(
            gy, x, scale, zero_point, *plan.grid, plan.factor, plan.trains_scale
        )


def _present(plan, zero_point, gx, gs, gz):
    """The gradients as a backward returns them: None for what has none."""
    gs, gz = _trained(plan, zero_point, gs, gz)
    return gx, gs, gz, None


def _trained(plan, zero_point, of_scale, of_zero):
    """None in place of the empty gradients of constants."""
    if not plan.trains_scale:
        return None, None
    return of_scale, of_zero if zero_point is not None else None


def held(scale, plan):
    """The scale as kernels use it."""
    return scale.clamp(min=plan.grid[4])


def _crossed(plan, gy, x, scale, zero_point, with_scale, with_zero):
    """The second derivative d2y/ds dz = -f^2 (1 - m), summed against gy: the terms for s and for z."""
    if zero_point is None or not plan.trains_scale or (with_scale is None and with_zero is None):
        return None, None
    _, _, gz = Gradient.apply(gy, x, scale, zero_point, plan._replace(factor=1.0))
    second = gz * (plan.factor**2 / held(scale, plan))
    return (None if with_scale is None else second * with_scale), (None if with_zero is None else second * with_zero)
