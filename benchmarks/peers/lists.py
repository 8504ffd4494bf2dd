# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors. A forward function here takes the lists of tensors and of scales, and returns a list."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

import fastflat
from fastflat.quant import eager

from ..cases.fake_quantize_list import SPEC


class _Multiplications(Function):
    """One node for the list, a multiplication of every tensor each way; scales get a gradient that costs nothing."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        ctx.rest = tensors[count:]
        return tuple(torch._foreach_mul(tensors[:count], 0.5))

    @staticmethod
    def backward(ctx, *gys: Tensor):
        return None, *torch._foreach_mul(gys, 0.5), *(scale.detach() for scale in ctx.rest)


def mul(data):
    """The floor: what autograd's engine and the memory take for so many leaves."""
    return lambda xs, scales: _Multiplications.apply(len(xs), *xs, *scales)


def fused(data):
    """One call for the list."""
    return lambda xs, scales: fastflat.fake_quantize_list(xs, scales, SPEC)


def each(data):
    """A call for each tensor."""
    return lambda xs, scales: [fastflat.fake_quantize(x, s, spec=SPEC) for x, s in zip(xs, scales, strict=True)]


def composed(data):
    """The chain of PyTorch operations for each tensor."""
    factors, dtype = [SPEC.grad_factor(x.numel(), 1) for x in data.xs], data.x.dtype

    def forward(xs, scales):
        calls = zip(xs, scales, factors, strict=True)
        return [eager.lsq(x, s, SPEC.qmin, SPEC.qmax, None, factor).to(dtype) for x, s, factor in calls]

    return forward
