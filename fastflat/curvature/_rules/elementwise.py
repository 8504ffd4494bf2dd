# SPDX-License-Identifier: Apache-2.0
"""Element-wise ops: the K tangents of each argument times its partial derivative, a primal factor made once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflat.curvature import _tangents
from fastflat.curvature._rules._table import Call, Scaled, aligned, rule

aten = torch.ops.aten


def combined(c: Call, factors: dict[int, float | Callable[[], Tensor]]) -> Tensor | Scaled | None:
    """``sum_i f_i T_i`` over the arguments that have tangents, broadcast to the shape of the result."""
    shape = (c.k, *c.out_shape)
    moving = [i for i in factors if c.moves(i)]
    if len(moving) == 1 and not isinstance(factors[moving[0]], (int, float)) and c.shape(moving[0]) == shape[1:]:
        return c.scaled(moving[0], (c.place(), moving[0]), factors[moving[0]])
    if len(moving) == 2 and all(c.shape(i) == shape[1:] and callable(factors[i]) for i in moving):
        (i, j), values = moving, [c.once(i, factors[i]) for i in moving]
        if all(v.shape == shape[1:] for v in values):
            return _tangents.combine(shape[1:], t0=c.tangent(i), p0=values[0], t1=c.tangent(j), p1=values[1])
    total = None
    for index, factor in factors.items():
        t = c.tangent(index)
        if t is None:
            continue
        t = aligned(t, len(shape) - 1)
        scalar = isinstance(factor, (int, float))
        factor = factor if scalar else c.once(index, factor)
        if total is None:
            total = t if scalar and factor == 1 else t * factor
            own = total is not t
        elif scalar:
            total = torch.add(total, t, alpha=factor)
            own = True
        elif own and total.shape == shape:
            total.addcmul_(t, factor)
        else:
            total, own = torch.addcmul(total, t, factor), True
    return total if total is None or total.shape == shape else total.expand(shape)


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(c: Call):
    sign = -1 if c.op in (aten.sub.Tensor, aten.sub.Scalar) else 1
    return combined(c, {0: 1, 1: sign * c.primal(2)})


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(c: Call):
    return combined(c, {0: -c.primal(2), 1: 1})


@rule(aten.neg.default)
def neg(c: Call):
    return -c.tangent(0)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(c: Call):
    a, b = (c.step.args[i] if isinstance(c.step.args[i], (int, float)) else (lambda i=i: c.primal(i)) for i in (0, 1))
    return combined(c, {0: b, 1: a})


@rule(aten.div.Tensor, aten.div.Scalar)
def div(c: Call):
    b = c.step.args[1]
    if isinstance(b, (int, float)):
        return c.tangent(0) / b
    # A count is an integer, whose reciprocal would come in the default type.
    return combined(c, {0: lambda: 1 / c.primal(1).to(c.out.dtype), 1: lambda: -c.out / c.primal(1)})


@rule(aten.relu.default)
def relu(c: Call):
    return c.scaled(0, ("above", c.place(), 0), lambda: (c.out <= 0).logical_not().to(c.out.dtype))


@rule(aten.threshold_backward.default, unmoved=(1,))
def threshold_backward(c: Call):
    above = ("above", c.origin(1), c.primal(2))
    return c.scaled(0, above, lambda: (c.primal(1) <= c.primal(2)).logical_not().to(c.primal(1).dtype))


@rule(aten.where.self)
def where(c: Call):
    a, b = c.tangent(1), c.tangent(2)
    n = len(c.out_shape)
    a, b = (torch.zeros((), dtype=(a if b is None else b).dtype) if t is None else aligned(t, n) for t in (a, b))
    return torch.where(c.primal(0), a, b).expand(c.k, *c.out_shape)


@rule(aten.masked_fill.Scalar)
def masked_fill(c: Call):
    return aligned(c.tangent(0), len(c.out_shape)).masked_fill(c.primal(1), 0).expand(c.k, *c.out_shape)


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


def _mish_backward(g: Tensor, x: Tensor) -> Tensor:
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    return g * (t + x * s * (1 - t * t))


#: The same as operations with a derivative, where PyTorch has none for the op.
_DIFFERENTIABLE = {
    aten.silu_backward.default: _silu_backward,
    aten.mish_backward.default: _mish_backward,
    aten.hardsigmoid_backward.default: lambda g, x: g * ((x > -3) & (x < 3)) / 6,
}


def partial(c: Call, index: int) -> Tensor:
    """The partial derivative of an element-wise op by one argument, by reverse-mode AD of that op."""
    shape = c.out_shape
    values = [c.primal(i) for i in range(len(c.step.args))]
    x = values[index].expand(shape).detach().requires_grad_()
    values[index] = x
    cut = len(values) - len(c.step.keywords)
    with torch.enable_grad():
        y = _DIFFERENTIABLE.get(c.op, c.op)(*values[:cut], **dict(zip(c.step.keywords, values[cut:], strict=True)))
        if not y.requires_grad:
            return torch.zeros_like(x).detach()
        (found,) = torch.autograd.grad(y, x, torch.ones_like(y), allow_unused=True)
    return torch.zeros_like(x) if found is None else found.detach()


@rule(
    *(aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.mish.default),
    *(aten.elu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.hardswish.default),
    *(aten.hardsigmoid.default, aten.softplus.default, aten.celu.default, aten.threshold.default),
    *(aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.log2.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.abs.default, aten.square.default),
    *(aten.sin.default, aten.cos.default, aten.tan.default, aten.atan.default, aten.erf.default, aten.erfc.default),
    *(aten.sinh.default, aten.cosh.default, aten.asin.default, aten.acos.default, aten.log10.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.atan2.default, aten.hypot.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default),
    *(aten.mish_backward.default, aten.elu_backward.default),
    aten.hardswish_backward.default,
    *(aten.softplus_backward.default, aten.addcmul.default, aten.addcdiv.default, aten.xlogy.Tensor),
    *(aten.lerp.Tensor, aten.lerp.Scalar),
)
def elementwise(c: Call):
    return combined(c, {i: lambda i=i: partial(c, i) for i in range(len(c.step.args)) if c.moves(i)})


_KINDS = {
    aten.sigmoid_backward.default: _tangents.SIGMOID,
    aten.tanh_backward.default: _tangents.TANH,
    aten.silu_backward.default: _tangents.SILU,
}


@rule(*_KINDS, aten.gelu_backward.default)
def activation_backward(c: Call):
    # One pass for both tangents, the derivatives of the activation formed on the way.
    if c.op is aten.gelu_backward.default:
        kind = _tangents.GELU if c.primal(2) == "none" else _tangents.GELU_TANH
    else:
        kind = _KINDS[c.op]
    g, x = c.tangent(0), c.tangent(1)
    grad = None if x is None else c.operand(0)
    return _tangents.combine(c.out_shape, t0=g, t1=x, p0=c.operand(1), p1=grad, kind=kind)


@rule(
    *(aten.leaky_relu_backward.default, aten.hardtanh_backward.default, aten.hardsigmoid_backward.default),
    unmoved=(1,),
)
def piecewise(c: Call):
    return combined(c, {0: lambda: partial(c, 0)})
