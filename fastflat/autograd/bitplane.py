# SPDX-License-Identifier: Apache-2.0
"""Derivatives of weights made of bit planes, of every order and in every mode.

The map is smooth, so nothing is frozen: ``Gradient`` and ``Tangent`` run the fused kernels and have, as functions of
their own, the derivatives of the same formula composed of PyTorch operations. Those materialise ``[N, ...]`` tensors;
nothing of first order does. beta is a constant of every derivative. Hard bits and hard masks have the derivative 0.

``PlainValue`` is the short way for eager reverse mode; the others serve torch.func, forward mode and higher orders.
``CompiledValue`` is what torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._ops import compute_dtype
from fastflat.autograd._batching import one_by_one
from fastflat.autograd._modes import backward_op, below_autograd, remember, transformed


class Plan(NamedTuple):
    """Everything about a call that is not a tensor."""

    hard_w: bool
    hard_m: bool
    dtype: torch.dtype | None
    kernels: SimpleNamespace

    @property
    def hard(self) -> tuple[bool, bool]:
        return self.hard_w, self.hard_m


class Value(Function):
    """w, with every derivative."""

    @staticmethod
    def forward(p, q, m, scale, beta, plan):
        return plan.kernels.bitplane(p, q, m, scale, beta, *plan.hard, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, gw):
        if gw is None:
            return (None,) * 6
        return *Gradient.apply(gw, *ctx.saved_tensors, ctx.plan), None, None

    @staticmethod
    def jvp(ctx, tp, tq, tm, ts, tbeta, _plan):
        _constant_beta(tbeta)
        return Tangent.apply(tp, tq, tm, ts, *ctx.saved_tensors, ctx.plan)

    @staticmethod
    def vmap(info, in_dims, p, q, m, scale, beta, plan):
        if in_dims[2] is None and in_dims[3] is None and in_dims[4] is None:
            # All samples share the small vectors: the batch is one more axis behind the planes.
            p, q = (_second(t, d, info.batch_size) for t, d in ((p, in_dims[0]), (q, in_dims[1])))
            return Value.apply(p, q, m, scale, beta, plan), 0
        return one_by_one(Value, info.batch_size, in_dims, p, q, m, scale, beta, plan)


class Gradient(Function):
    """(gp, gq, gm, gs) of a cotangent gw."""

    @staticmethod
    def forward(gw, p, q, m, scale, beta, plan):
        return backward_op("bitplane_bwd", plan.kernels, gw)(gw, p, q, m, scale, beta, *plan.hard)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        *moving, beta = ctx.saved_tensors
        _, pull = torch.func.vjp(_over(_composed_gradient, beta, ctx.plan), *moving)
        return *pull(tuple(_filled(cotangents, moving[1:]))), None, None

    @staticmethod
    def jvp(ctx, *tangents_and_plan):
        *tangents, tbeta, _ = tangents_and_plan
        _constant_beta(tbeta)
        *moving, beta = ctx.saved_tensors
        return _push(_over(_composed_gradient, beta, ctx.plan), moving, tangents)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return one_by_one(Gradient, info.batch_size, in_dims, *inputs)


class Tangent(Function):
    """tw of the tangents (tp, tq, tm, ts), each of which may be None."""

    @staticmethod
    def forward(tp, tq, tm, ts, p, q, m, scale, beta, plan):
        return plan.kernels.bitplane_jvp(tp, tq, tm, ts, p, q, m, scale, beta, *plan.hard, plan.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        remember(ctx, *inputs)

    @staticmethod
    def backward(ctx, cotangent):
        if cotangent is None:
            return (None,) * 10
        *tangents, p, q, m, scale, beta = ctx.saved_tensors
        moving = (*_filled(tangents, (p, q, m, scale)), p, q, m, scale)
        _, pull = torch.func.vjp(_over(_composed_tangent, beta, ctx.plan), *moving)
        gradients = pull(cotangent)
        present = (None if t is None else g for t, g in zip(tangents, gradients, strict=False))
        return *present, *gradients[4:], None, None

    @staticmethod
    def jvp(ctx, *tangents_and_plan):
        *second, tbeta, _ = tangents_and_plan
        _constant_beta(tbeta)
        *first, p, q, m, scale, beta = ctx.saved_tensors
        moving = (*_filled(first, (p, q, m, scale)), p, q, m, scale)
        return _push(_over(_composed_tangent, beta, ctx.plan), moving, second)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return one_by_one(Tangent, info.batch_size, in_dims, *inputs)


class PlainValue(Function):
    """w for eager reverse mode: the same rule with the least overhead."""

    @staticmethod
    def forward(ctx, p, q, m, scale, beta, plan):
        ctx.save_for_backward(p, q, m, scale, beta)
        ctx.plan = plan
        with below_autograd():
            return plan.kernels.bitplane(p, q, m, scale, beta, *plan.hard, plan.dtype)

    @staticmethod
    def backward(ctx, gw):
        plan = ctx.plan
        if torch.is_grad_enabled() or transformed():
            return *Gradient.apply(gw, *ctx.saved_tensors, plan), None, None
        with below_autograd():
            return *backward_op("bitplane_bwd", plan.kernels, gw)(gw, *ctx.saved_tensors, *plan.hard), None, None


class CompiledValue(Function):
    """w as torch.compile traces it, forward and one backward."""

    @staticmethod
    def forward(ctx, p, q, m, scale, beta, hard_w, hard_m, dtype):
        ctx.save_for_backward(p, q, m, scale, beta)
        ctx.hard = (hard_w, hard_m)
        return torch.ops.fastflat.bitplane(p, q, m, scale, beta, hard_w, hard_m, dtype)

    @staticmethod
    def backward(ctx, gw):
        gradients = torch.ops.fastflat.bitplane_bwd(gw, *ctx.saved_tensors, *ctx.hard)
        return *gradients, None, None, None, None


def bitplane(p: Tensor, q: Tensor, m: Tensor, scale: Tensor, beta: Tensor, plan: Plan) -> Tensor:
    """w by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        # by place: the compiler of torch 2.10 reads no property of a named tuple
        return CompiledValue.apply(p, q, m, scale, beta, *plan[:3])
    function = Value if transformed() else PlainValue
    return function.apply(p, q, m, scale, beta, plan)


def _constant_beta(tangent: Tensor | None) -> None:
    if tangent is not None:
        raise ValueError("fastflat::bitplane: beta must carry no tangent, got one; it is a schedule: detach it")


def _second(t: Tensor, dim: int | None, size: int) -> Tensor:
    """A batched tensor with the planes in front and the batch behind them."""
    return t.unsqueeze(1).expand(t.shape[0], size, *t.shape[1:]) if dim is None else t.movedim(dim, 1)


def _filled(tensors, like) -> list[Tensor]:
    """Zeros in place of absent tensors."""
    return [torch.zeros_like(of) if t is None else t for t, of in zip(tensors, like, strict=False)]


def _push(function: Callable, primals, tangents):
    """The tangent of function(*primals) as the transpose of its transpose: forward levels do not nest."""
    result, pull = torch.func.vjp(function, *primals)
    _, push = torch.func.vjp(pull, torch.utils._pytree.tree_map(torch.zeros_like, result))
    return push(tuple(_filled(tangents, primals)))[0]


# The formula in PyTorch operations, differentiable to any order.


def _over(composed: Callable, beta: Tensor, plan: Plan) -> Callable:
    """A composed form as a function of the tensors that move."""
    return lambda *moving: composed(*moving, beta, plan)


def _soft(t: Tensor, beta: Tensor, hard: bool) -> tuple[Tensor, Tensor]:
    """A bit and its derivative by t; the product of two sigmoids keeps its digits where one of them is 1."""
    if hard:
        return (t > 0).to(t.dtype), torch.zeros_like(t)
    x = beta * t
    value = torch.sigmoid(x)
    return value, beta * (value * torch.sigmoid(-x))


def _planes(p: Tensor, q: Tensor, m: Tensor, scale: Tensor, beta: Tensor, plan: Plan):
    """Bits, slopes, weights 2^(N-1-b) M_b and their derivatives by m_b, shaped to broadcast; and the step."""
    count, compute = m.shape[0], compute_dtype(p.dtype)
    column = (count,) + (1,) * (p.dim() - 1)
    power = (2 ** torch.arange(count - 1, -1, -1, device=m.device)).to(compute).view(column)
    mask, by_mask = _soft(m.view(column), beta, plan.hard_m)
    first, second = (_soft(t.to(compute), beta, plan.hard_w) for t in (p, q))
    return first, second, power * mask, power * by_mask, scale / (2**count - 1)


def _composed_gradient(gw, p, q, m, scale, beta, plan):
    (first, by_p), (second, by_q), weight, by_mask, step = _planes(p, q, m, scale, beta, plan)
    g = gw.to(weight.dtype)
    along = g * (step * weight)
    d = (g * (first - second)).reshape(m.shape[0], -1).sum(1)
    gm = step * by_mask.reshape(-1) * d
    gs = (weight.reshape(-1) * d).sum() / (2 ** m.shape[0] - 1)
    return (along * by_p).to(p.dtype), -(along * by_q).to(p.dtype), gm, gs


def _composed_tangent(tp, tq, tm, ts, p, q, m, scale, beta, plan):
    (first, by_p), (second, by_q), weight, by_mask, step = _planes(p, q, m, scale, beta, plan)
    compute = weight.dtype
    lift = step * by_mask * tm.view(by_mask.shape) + weight * (ts / (2 ** m.shape[0] - 1))
    moved = step * weight * (by_p * tp.to(compute) - by_q * tq.to(compute))
    return (moved + lift * (first - second)).sum(0).to(plan.dtype or p.dtype)
