# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the logits family.

Eager reverse mode and torch.compile run the kernels, forward and one backward. Whatever asks for more (create_graph,
forward mode, the transforms of torch.func, gradients to the numbers of the classes) gets the same formula in torch's
own operations, which have every derivative in every mode; values then differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._ops import compute_dtype
from fastflat.autograd._modes import backward_op, below_autograd, transformed


class Classes(NamedTuple):
    """What a re-balanced loss knows of the classes: tensors ``[C]`` or None."""

    mult: Tensor | None = None
    add: Tensor | None = None
    margin: Tensor | None = None
    weight: Tensor | None = None


def _composes(*tensors: Tensor | None) -> bool:
    """Whether the call needs torch's own operations: a transform, or a gradient that no kernel has."""
    return transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def _again(composed: Callable, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Gradients of composed(*inputs) that can be differentiated again."""
    with torch.enable_grad():
        results = composed(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad(results, wanted, cotangents, create_graph=True))
    return [next(found) if t.requires_grad else None for t in inputs]


# Divergences --------------------------------------------------------------------------------------------------------


def _composed_divergence(z0: Tensor, z: Tensor, js: bool) -> Tensor:
    log_p = torch.cat([z0[None], z]).to(compute_dtype(z.dtype)).log_softmax(-1)
    if js:
        p = log_p.exp()
        mean = p.mean(0)
        log_q = torch.where(mean == 0, torch.ones_like(mean), mean).log()
    else:
        log_p, log_q = log_p[:1], log_p[1:]
        p = log_p.exp()
    # A class that cannot be adds nothing, to no derivative either.
    ratio = log_p - log_q
    ratio = torch.where(p == 0, torch.zeros_like(ratio), ratio)
    return (p * ratio).sum(-1).mean(0)


class PlainDivergence(Function):
    """Mean over the pairs, or over the distributions."""

    @staticmethod
    def forward(ctx, z0, z, js, kernels):
        with below_autograd():
            divergence, norm = kernels.logits_divergence(z0, z, js)
        ctx.save_for_backward(z0, z, divergence, norm)
        ctx.plan = js, kernels
        return divergence.mean(0)

    @staticmethod
    def backward(ctx, g):
        z0, z, divergence, norm = ctx.saved_tensors
        js, kernels = ctx.plan
        if torch.is_grad_enabled() or transformed():
            gz0, gz = _again(lambda z0, z: _composed_divergence(z0, z, js), (z0, z), (g,))
            return gz0, gz, None, None
        with below_autograd():
            call = backward_op("logits_divergence_bwd", kernels, g)
            gz0, gz = call(g / len(divergence), z0, z, divergence, norm, js)
        return gz0, gz, None, None


class CompiledDivergence(Function):
    """The same as torch.compile traces it."""

    @staticmethod
    def forward(ctx, z0, z, js):
        divergence, norm = torch.ops.fastflat.logits_divergence(z0, z, js)
        ctx.save_for_backward(z0, z, divergence, norm)
        ctx.js = js
        return divergence.mean(0)

    @staticmethod
    def backward(ctx, g):
        z0, z, divergence, norm = ctx.saved_tensors
        each = g / divergence.shape[0]
        return *torch.ops.fastflat.logits_divergence_bwd(each, z0, z, divergence, norm, ctx.js), None


def divergence(z0: Tensor, z: Tensor, js: bool, kernels: SimpleNamespace | None) -> Tensor:
    """``[B]``, by the Function that the mode in force needs."""
    if torch.compiler.is_compiling():
        return CompiledDivergence.apply(z0, z, js)
    if transformed():
        return _composed_divergence(z0, z, js)
    return PlainDivergence.apply(z0, z, js, kernels)


# Cross-entropy ------------------------------------------------------------------------------------------------------


def _label(t: Tensor, y: Tensor) -> Tensor:
    """Of each row the element of its label; NaN where that is no class."""
    known = (y >= 0) & (y < t.shape[-1])
    found = t.gather(-1, torch.where(known, y, 0)[..., None]).squeeze(-1)
    return torch.where(known, found, torch.full_like(found, float("nan")))


def _composed_loss(z: Tensor, y: Tensor, classes: Classes, s: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    mult, add, margin, weights = classes
    a = z.to(compute_dtype(z.dtype))
    a = a if mult is None else a * mult
    a = a if add is None else a + add
    if margin is not None:
        own = torch.arange(z.shape[-1], device=z.device) == y[..., None]
        a = a - torch.where(own, margin, torch.zeros_like(margin))
    log_p = (s * a).log_softmax(-1)
    ones = torch.ones_like(log_p) if weights is None else weights.expand_as(log_p)
    kept, weight = y != ignore_index, _label(ones, y)
    loss = -weight * _label(log_p, y)
    return torch.where(kept, loss, torch.zeros_like(loss)), torch.where(kept, weight, torch.zeros_like(weight))


class PlainLoss(Function):
    """(loss, weight) of each row; the weights have no derivative here."""

    @staticmethod
    def forward(ctx, z, y, classes, s, ignore_index, kernels):
        with below_autograd():
            loss, weight, norm = kernels.logits_loss(z, y, *classes, s, ignore_index)
        ctx.save_for_backward(z, y, weight, norm, *classes[:3])
        ctx.plan = s, ignore_index, kernels
        ctx.classes = classes
        ctx.mark_non_differentiable(weight)
        return loss, weight

    @staticmethod
    def backward(ctx, g, _):
        z, y, weight, norm, *given = ctx.saved_tensors
        s, ignore_index, kernels = ctx.plan
        if torch.is_grad_enabled() or transformed():
            (gz,) = _again(lambda z: _composed_loss(z, y, ctx.classes, s, ignore_index)[:1], (z,), (g,))
            return gz, None, None, None, None, None
        with below_autograd():
            gz = backward_op("logits_loss_bwd", kernels, g)(g * weight, z, y, *given, norm, s)
        return gz, None, None, None, None, None


class CompiledLoss(Function):
    """The same as torch.compile traces it."""

    @staticmethod
    def forward(ctx, z, y, mult, add, margin, weights, s, ignore_index):
        loss, weight, norm = torch.ops.fastflat.logits_loss(z, y, mult, add, margin, weights, s, ignore_index)
        ctx.save_for_backward(z, y, mult, add, margin, weight, norm)
        ctx.s = s
        ctx.mark_non_differentiable(weight)
        return loss, weight

    @staticmethod
    def backward(ctx, g, _):
        z, y, mult, add, margin, weight, norm = ctx.saved_tensors
        gz = torch.ops.fastflat.logits_loss_bwd(g * weight, z, y, mult, add, margin, norm, ctx.s)
        return gz, None, None, None, None, None, None, None


def loss(
    z: Tensor, y: Tensor, classes: Classes, s: float, ignore_index: int, kernels: SimpleNamespace | None
) -> tuple[Tensor, Tensor]:
    """(loss, weight) of each row, ``[N]``."""
    if _composes(*classes):
        return _composed_loss(z, y, classes, s, ignore_index)
    if torch.compiler.is_compiling():
        return CompiledLoss.apply(z, y, *classes, s, ignore_index)
    return PlainLoss.apply(z, y, classes, s, ignore_index, kernels)


# Statistics ---------------------------------------------------------------------------------------------------------


def _composed_stats(z: Tensor, y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = z.to(compute_dtype(z.dtype)).log_softmax(-1)
    kept, of_label, p = y != ignore_index, _label(log_p, y), log_p.detach().exp()
    own = torch.arange(z.shape[-1], device=z.device) == y[..., None]
    other, largest = torch.where(own, torch.zeros_like(p), p).amax(-1), p.amax(-1)
    of_rows = (-of_label, of_label.exp(), other - of_label.detach().exp())
    ce, p_y, gap = (torch.where(kept, t, torch.zeros_like(t)) for t in of_rows)
    return ce, p_y, gap, 2 * largest * (1 - largest)


def _of_stats(g: Tensor, of_p: Tensor, p: Tensor, y: Tensor, ignore_index: int) -> Tensor:
    """The cotangent of the cross-entropy: p = exp(-ce)."""
    return (g - of_p * p).masked_fill(y == ignore_index, 0.0)


class PlainStats(Function):
    """Cross-entropy and probability of the label, which can be differentiated, gap and curvature, which cannot."""

    @staticmethod
    def forward(ctx, z, y, ignore_index, kernels):
        with below_autograd():
            stats, norm = kernels.logits_stats(z, y, ignore_index)
        ce, p, gap, curvature = stats.unbind()
        ctx.save_for_backward(z, y, p, norm)
        ctx.plan = ignore_index, kernels
        ctx.mark_non_differentiable(gap, curvature)
        return ce, p, gap, curvature

    @staticmethod
    def backward(ctx, g, of_p, *_):
        z, y, p, norm = ctx.saved_tensors
        ignore_index, kernels = ctx.plan
        if torch.is_grad_enabled() or transformed():
            (gz,) = _again(lambda z: _composed_stats(z, y, ignore_index)[:2], (z,), (g, of_p))
            return gz, None, None, None
        with below_autograd():
            of_loss = _of_stats(g, of_p, p, y, ignore_index)
            gz = backward_op("logits_loss_bwd", kernels, of_loss)(of_loss, z, y, None, None, None, norm, 1.0)
        return gz, None, None, None


class CompiledStats(Function):
    """The same as torch.compile traces it."""

    @staticmethod
    def forward(ctx, z, y, ignore_index):
        stats, norm = torch.ops.fastflat.logits_stats(z, y, ignore_index)
        ce, p, gap, curvature = (row.clone() for row in stats.unbind())
        ctx.save_for_backward(z, y, p, norm)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(gap, curvature)
        return ce, p, gap, curvature

    @staticmethod
    def backward(ctx, g, of_p, *_):
        z, y, p, norm = ctx.saved_tensors
        of_loss = _of_stats(g, of_p, p, y, ctx.ignore_index)
        return torch.ops.fastflat.logits_loss_bwd(of_loss, z, y, None, None, None, norm, 1.0), None, None


def stats(z: Tensor, y: Tensor, ignore_index: int, kernels: SimpleNamespace | None) -> tuple[Tensor, ...]:
    """(cross-entropy, p of the label, gap, curvature) of each row."""
    if torch.compiler.is_compiling():
        return CompiledStats.apply(z, y, ignore_index)
    if transformed():
        return _composed_stats(z, y, ignore_index)
    return PlainStats.apply(z, y, ignore_index, kernels)


def scan(a: Tensor, b: Tensor, y: Tensor, t: Tensor, ignore_index: int, kernels: SimpleNamespace | None) -> Tensor:
    """Losses along a step, ``[K]``; with a derivative the composed form of each step."""
    if _composes(a, b, t):
        compute = compute_dtype(a.dtype)
        kept = (y != ignore_index).sum()
        moved = a.to(compute) - t[:, None, None] * b.to(compute)
        return _composed_loss(moved, y.expand(len(t), *y.shape), Classes(), 1.0, ignore_index)[0].sum(-1) / kept
    run = torch.ops.fastflat.logits_scan if kernels is None else kernels.logits_scan
    return run(a, b, y, t, ignore_index)
