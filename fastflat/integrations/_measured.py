# SPDX-License-Identifier: Apache-2.0
"""Quantization by a scale that is a function of a number, in one Function::

    s = |v| / threshold                        Brevitas: |v| held at a least value; v a parameter, or max |x|
    s = (v - v f) + v f,  ds/dv = f            LSQ as projects write it
    y = (clamp(round(x / s + z)) - z) s

Separate Functions, :class:`Size` and :func:`fastflat.fake_quantize`, give the same bits and every derivative; the one
here costs a third of their calls and gives the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._spec import QuantSpec
from fastflat.autograd._modes import backward_op, below_autograd
from fastflat.functional import fake_quantize
from fastflat.functional._fake_quantize import plan_of
from fastflat.integrations._grid import flat as flat_shape


class Measure(NamedTuple):
    """How a scale follows from v."""

    least: float  # of |v|, or with `late` of the scale; 0 without one
    threshold: Tensor
    negative: Tensor  # -threshold
    late: bool

    def of(self, v: Tensor) -> Tensor:
        size = v.abs()
        if self.least and not self.late:
            size = size.clamp_min(self.least)
        size = size / self.threshold
        return size.clamp_min(self.least) if self.least and self.late else size

    def back(self, g: Tensor, v: Tensor) -> Tensor:
        """The gradient of v: holding passes all of it, and the derivative of |v| at 0 is 1."""
        return g / torch.where(v >= 0, self.threshold, self.negative)


class Damped(NamedTuple):
    """The scale is v, with a factor f on its gradient, written as a sum that rounds it."""

    f: float

    def of(self, v: Tensor) -> Tensor:
        part = v * self.f
        return (v - part).add_(part)

    def back(self, g: Tensor, _: Tensor) -> Tensor:
        return g * self.f


class Size(Function):
    """The scale, with every derivative."""

    @staticmethod
    def forward(ctx, v, measure):
        ctx.save_for_backward(v)
        ctx.measure = measure
        return measure.of(v)

    @staticmethod
    def backward(ctx, g):
        return ctx.measure.back(g, *ctx.saved_tensors), None


class Quantized(Function):
    """(y, s) of x and v, or without v by the largest magnitude of x."""

    @staticmethod
    def forward(ctx, x, v, zero_point, spec, measure):
        ctx.set_materialize_grads(False)
        with below_autograd():
            size = x.abs().max() if v is None else v
            scale = measure.of(size)
            # What is saved is the output itself or memory of its own: a view of an output would keep its own graph.
            flat = scale if scale.dim() == (spec.axis is not None) else scale.clone().reshape(flat_shape(spec.axis))
            plan = plan_of("fake_quantize", x, flat, zero_point, spec, None)
            y = plan.kernels.general_quantize(x, flat, zero_point, None, None, None, *plan.grid, None)
        ctx.save_for_backward(x, size if v is None else None, v, flat, zero_point)
        ctx.rest = spec, measure, plan, scale.shape
        return y, scale

    @staticmethod
    def backward(ctx, gy, g_scale):
        x, largest, v, flat, zero_point = ctx.saved_tensors
        _spec, measure, plan, shape = ctx.rest
        if gy is None:
            gy = torch.zeros_like(x)
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, v, zero_point, gy, g_scale)
        with below_autograd():
            op = backward_op("general_quantize_bwd", plan.kernels, gy)
            gx, gs, *_ = op(gy, x, flat, zero_point, None, None, None, None, *plan.grid, plan.factor, True, False)
            gs = gs.reshape(shape)
            if g_scale is not None:
                gs = gs + g_scale
            if v is not None:
                return gx, measure.back(gs, v), None, None, None
            # Elements of the largest magnitude share its gradient; it is added where they are.
            hit = x.abs().eq_(largest)
            hit.mul_(measure.back(gs, largest) / hit.sum())
            return gx.addcmul_(hit, x.sign()), None, None, None, None


def composed(
    x: Tensor, v: Tensor | None, zero_point: Tensor | None, spec: QuantSpec, measure: Measure | Damped
) -> tuple[Tensor, Tensor]:
    """(y, s) by separate Functions."""
    scale = Size.apply(x.abs().max() if v is None else v, measure)
    return fake_quantize(x, scale.reshape(flat_shape(spec.axis)), zero_point, spec=spec), scale


def _differentiable(ctx, x, v, zero_point, gy, g_scale):
    """The gradients as functions of x, v and their cotangents."""
    spec, measure, *_ = ctx.rest
    leaves = [t for t, needed in zip((x, v), ctx.needs_input_grad, strict=False) if needed]
    results = composed(x, v, zero_point, spec, measure)
    given = [(r, g) for r, g in zip(results, (gy, g_scale), strict=True) if g is not None]
    found = iter(
        torch.autograd.grad([r for r, _ in given], leaves, [g for _, g in given], create_graph=True, allow_unused=True)
    )
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None
