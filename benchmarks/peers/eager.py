# SPDX-License-Identifier: Apache-2.0
"""Quantizers as Python code writes them: chains of PyTorch operations, as short as they get without own kernels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat._spec import MINIFLOATS, TINY
from fastflat.quant import eager

from ..cases.general_quantize import AMOUNTS
from ..cases.liq import BITS as LIQ_BITS
from ..cases.mixquant import BITS, mixture


class _Through(Function):
    """``function`` of a tensor, without derivatives inside; the gradient passes."""

    @staticmethod
    def forward(ctx, x: Tensor, function) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def formula(data):
    """The chain as a function of (x, scale), ready to run or to compile. Groups are rows of a view."""
    spec, dtype = data.case.spec, data.x.dtype
    if data.scale is None:
        return _dynamic(spec, dtype)
    if spec.draws or spec.format != "int":
        return _general(spec, AMOUNTS.get(data.case.granularity, {}), data.factor, dtype)
    factor, qmin, qmax, group = data.factor, spec.qmin, spec.qmax, spec.group
    if group is None:
        return lambda x, scale: eager.lsq(x, scale, qmin, qmax, spec.axis, factor).to(dtype)

    def in_groups(x, scale):
        y = eager.lsq(x.view(-1, group), scale.view(-1), qmin, qmax, 0, factor)
        return y.view(x.shape).to(dtype)

    return in_groups


def lsq(data):
    return formula(data)


def mixquant(data):
    """A chain a candidate, added up."""
    spec, scales, weight = data.case.spec, *mixture(data)
    specs = [spec.replace(bits=b) for b in BITS]
    chains = [formula(dataclasses.replace(data, case=dataclasses.replace(data.case, spec=q))) for q in specs]
    return lambda x, scale: sum(w * f(x, scale * s) for w, f, s in zip(weight, chains, scales, strict=True)).to(x.dtype)


def binarize(data):
    """The sign, straight through between -1 and 1, times the mean magnitude of its row."""
    dtype = data.x.dtype

    def chain(x: Tensor, scale: None) -> Tensor:
        wide = x.float()
        sign = _Through.apply(wide.clamp(-1, 1), lambda c: torch.where(c < 0, -1.0, 1.0))
        return (wide.abs().mean(1, keepdim=True) * sign).to(dtype)

    return chain


def liq(data):
    """Normalised by constants, clamped to the clip, rounded to levels."""
    levels, dtype = 2**LIQ_BITS - 1, data.x.dtype

    def chain(w: Tensor, clip: Tensor) -> Tensor:
        wide = w.float()
        std, mean = torch.std_mean(wide.detach())
        u = ((wide - mean) / std) / clip
        unit = (u.clamp(-1, 1) + 1) * 0.5
        return (clip * (_Through.apply(unit, lambda c: (c * levels).round_().div_(levels)) * 2 - 1)).to(dtype)

    return chain


def on_grid(c: Tensor, spec) -> Tensor:
    """The value of the grid nearest to clamped c; stochastically one of its two neighbours."""
    if spec.rounding == "stochastic":
        return torch.rand_like(c).add_(c).floor_()
    if spec.format == "int":
        return c.round()
    if spec.format == "e4m3":
        return c.to(torch.float8_e4m3fn).to(c.dtype)
    _, smallest, unit = MINIFLOATS[spec.format]
    step = (c.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=smallest).mul_(unit)
    return (c / step).round_().mul_(step)


def _general(spec, amounts, factor: float, dtype: torch.dtype):
    """Noise, stochastic rounding and floating-point grids with a learned scale per channel."""
    nu, a, low, high = amounts.get("nu", 1.0), amounts.get("a", 0.0), spec.qmin, spec.qmax
    rounded = lambda c: on_grid(c, spec)  # noqa: E731

    def chain(x: Tensor, scale: Tensor) -> Tensor:
        if scale.requires_grad:
            scale = eager._Scaled.apply(scale, factor)
        scale = scale.view(-1, 1)
        u = x / scale
        if spec.noise == "uniform":
            return (torch.clamp(u + torch.rand_like(u).sub_(0.5), low, high) * scale).to(dtype)
        if spec.noise == "normal":
            return (torch.clamp(u + torch.randn_like(u).mul_(12**-0.5), low, high) * scale).to(dtype)
        c = torch.clamp(u, low, high)
        q = _Through.apply(c, rounded)
        if spec.noise == "temper":
            with torch.no_grad():
                rest = (c - q).mul_(a).add_(torch.rand_like(u).sub_(0.5), alpha=nu)
            q = q + rest
        y = q * scale
        if spec.noise == "bypass":
            y = torch.where(torch.rand_like(u) < nu, x, y)
        return y.to(dtype)

    return chain


def _dynamic(spec, dtype: torch.dtype):
    """A scale from the largest magnitude of each channel or block, a constant; all elements pass their gradient, since
    none lies beyond the grid (by more than the rounding of the largest, in block formats)."""
    largest = float(spec.qmax)

    def quantized(x: Tensor) -> Tensor:
        blocks = x if spec.group is None else x.view(-1, spec.group)
        scale = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1, keepdim=True, dtype=torch.float32)
        if spec.scale_rule == "floor":
            emax = 2.0 ** -int(torch.log2(torch.tensor(largest)))
            scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(emax)
        else:
            scale = scale / largest
        scale = scale.clamp_(min=TINY)
        return on_grid((blocks / scale).clamp_(-largest, largest), spec).mul_(scale).to(dtype).view(x.shape)

    return lambda x, scale: _Through.apply(x, quantized)
