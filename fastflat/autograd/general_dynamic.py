# SPDX-License-Identifier: Apache-2.0
"""Derivatives of general_quantize_dynamic: those of general_quantize with the scale, taken from x, held constant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.autograd import _batching
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed
from fastflat.autograd.fake_quantize import Plan, passes_all
from fastflat.autograd.general_quantize import Gradient, Tangent, drawn


class Value(Function):
    """(y, scale), with every derivative."""

    @staticmethod
    def forward(x, state, nu, a, outer, plan):
        return plan.kernels.general_quantize_dynamic(x, state, nu, a, outer, *plan.grid, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, state, nu, a, _, plan = inputs
        ctx.mark_non_differentiable(output[1])
        remember(ctx, x, output[1], state, nu, a, _constant(plan))

    @staticmethod
    def backward(ctx, gy, _):
        if gy is None:
            return (None,) * 6
        x, scale, state, nu, a = ctx.saved_tensors
        gx = Gradient.apply(gy, x, scale, None, state, nu, a, None, ctx.plan)[0]
        return gx, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tx, *_):
        x, scale, state, nu, a = ctx.saved_tensors
        return Tangent.apply(tx, None, None, x, scale, None, state, nu, a, ctx.plan), None

    @staticmethod
    def vmap(info, in_dims, x, state, nu, a, outer, plan):
        if drawn(state, nu, a, outer):
            return _batching.one_by_one(Value, info.batch_size, in_dims, x, state, nu, a, outer, plan)
        batch = _batching.Batch(info.batch_size, plan)
        y, scale = Value.apply(batch.data(x, in_dims[0]), None, None, None, None, batch.plan)
        return (batch.split_data(y), batch.split_parameter(scale)), (0, 0)


class PlainValue(Function):
    """(y, scale) for eager reverse mode."""

    @staticmethod
    def forward(ctx, x, state, nu, a, outer, plan):
        with below_autograd():
            y, scale = plan.kernels.general_quantize_dynamic(x, state, nu, a, outer, *plan.grid, plan.dtype)
        ctx.save_for_backward(x, scale, state, nu, a)
        ctx.mark_non_differentiable(scale)
        ctx.plan = _constant(plan)
        return y, scale

    @staticmethod
    def backward(ctx, gy, _):
        x, scale, state, nu, a = ctx.saved_tensors
        plan = ctx.plan
        if passes_all(plan):
            return gy.to(x.dtype), None, None, None, None, None  # all of it passes: nothing to compute
        if torch.is_grad_enabled() or transformed():
            gx = Gradient.apply(gy, x, scale, None, state, nu, a, None, plan)[0]
        else:
            with below_autograd():
                kernel = backward_op("general_quantize_bwd", plan.kernels, gy)
                gx = kernel(gy, x, scale, None, state, nu, a, None, *plan.grid, 1.0, False, False)[0]
        return gx, None, None, None, None, None


class CompiledValue(Function):
    """(y, scale) as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, x, state, nu, a, outer, grid, dtype):
        y, scale = torch.ops.fastflat.general_quantize_dynamic(x, state, nu, a, outer, *grid, dtype)
        ctx.save_for_backward(x, scale, state, nu, a)
        ctx.mark_non_differentiable(scale)
        ctx.grid = grid
        return y, scale

    @staticmethod
    def backward(ctx, gy, _):
        x, scale, state, nu, a = ctx.saved_tensors
        gradients = torch.ops.fastflat.general_quantize_bwd(
            gy, x, scale, None, state, nu, a, None, *ctx.grid, 1.0, False, False
        )
        return gradients[0], None, None, None, None, None, None


def general_quantize_dynamic(
    x: Tensor, state: Tensor | None, nu: Tensor | None, a: Tensor | None, outer: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    """(y, scale) by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledValue.apply(x, state, nu, a, outer, plan.grid, plan.dtype)
    return (Value if transformed() else PlainValue).apply(x, state, nu, a, outer, plan)


def _constant(plan: Plan) -> Plan:
    return plan._replace(factor=1.0, trains_scale=False, trains_delta=False)
