# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the weight_norms family, as in :mod:`fastflat.autograd.logits`: kernels for eager reverse mode and
torch.compile, torch's own operations for whatever asks for more."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._ops import compute_dtype
from fastflat.autograd._modes import backward_op, below_autograd, transformed


def _again(composed, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of composed(*inputs) that can be differentiated again."""
    with torch.enable_grad():
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(composed(*inputs), wanted, cotangents, create_graph=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def _composed_reduce(w: Tensor) -> tuple[Tensor, ...]:
    value = w.to(compute_dtype(w.dtype))
    mean = value.mean(-1)
    d = value - mean[..., None]
    m2, m3 = d.square().mean(-1), d.pow(3).mean(-1)
    spread = m2 != 0
    held = torch.where(spread, m2, torch.ones_like(m2))
    skew = torch.where(spread, m3 / (held * held.sqrt()), torch.zeros_like(m3))
    size = value.abs()
    return torch.stack([mean, m2, skew], -2), size.sum(-1), size.sum(-2), size.amax((-2, -1))


class PlainReduce(Function):
    """(moments [3, O], row_l1, col_l1, absmax)"""

    @staticmethod
    def forward(ctx, w, kernels):
        with below_autograd():
            moments, row_l1, col_l1, absmax = kernels.weight_norms_reduce(w)
        ctx.save_for_backward(w, moments, absmax)
        ctx.kernels = kernels
        return moments, row_l1, col_l1, absmax[0].clone()

    @staticmethod
    def backward(ctx, *g):
        w, moments, absmax = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            return *_again(_composed_reduce, (w,), g), None
        with below_autograd():
            run = backward_op("weight_norms_reduce_bwd", ctx.kernels, *g)
            return run(*(t.contiguous() for t in g), w, moments, absmax), None


class CompiledReduce(Function):
    """The same as torch.compile traces it."""

    @staticmethod
    def forward(ctx, w):
        moments, row_l1, col_l1, absmax = torch.ops.fastflat.weight_norms_reduce(w)
        ctx.save_for_backward(w, moments, absmax)
        return moments, row_l1, col_l1, absmax[0].clone()

    @staticmethod
    def backward(ctx, *g):
        return torch.ops.fastflat.weight_norms_reduce_bwd(*g, *ctx.saved_tensors)


def reduce(w: Tensor, kernels: SimpleNamespace | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(moments [3, O], row_l1 [O], col_l1 [I], absmax [])"""
    if torch.compiler.is_compiling():
        return CompiledReduce.apply(w)
    return _composed_reduce(w) if transformed() else PlainReduce.apply(w, kernels)


def _composed_saturate(w: Tensor, alpha: Tensor) -> Tensor:
    return (alpha * torch.tanh(w.to(alpha.dtype) / alpha)).to(w.dtype)


class PlainSaturate(Function):
    """alpha tanh(w / alpha)"""

    @staticmethod
    def forward(ctx, w, alpha, kernels):
        ctx.save_for_backward(w, alpha)
        ctx.kernels = kernels
        with below_autograd():
            return kernels.weight_norms_saturate(w, alpha)

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled() or transformed():
            return *_again(_composed_saturate, ctx.saved_tensors, (g,)), None
        with below_autograd():
            gw, galpha = backward_op("weight_norms_saturate_bwd", ctx.kernels, g)(g, *ctx.saved_tensors)
        return gw, galpha, None


class CompiledSaturate(Function):
    """The same as torch.compile traces it."""

    @staticmethod
    def forward(ctx, w, alpha):
        ctx.save_for_backward(w, alpha)
        return torch.ops.fastflat.weight_norms_saturate(w, alpha)

    @staticmethod
    def backward(ctx, g):
        return torch.ops.fastflat.weight_norms_saturate_bwd(g, *ctx.saved_tensors)


def saturate(w: Tensor, alpha: Tensor, kernels: SimpleNamespace | None) -> Tensor:
    """y by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledSaturate.apply(w, alpha)
    return _composed_saturate(w, alpha) if transformed() else PlainSaturate.apply(w, alpha, kernels)
