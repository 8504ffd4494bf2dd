# SPDX-License-Identifier: Apache-2.0
"""fastflat, by the backend in force."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

import fastflat

from ..cases.general_quantize import AMOUNTS
from ..cases.liq import BITS as LIQ_BITS
from ..cases.mixquant import BITS, mixture


class Identity(Function):
    """The raw op ``identity``, both ways."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.ops.fastflat.identity(x)

    @staticmethod
    def backward(ctx, gy: Tensor) -> Tensor:
        return torch.ops.fastflat.identity(gy)


def fake_quantize(data):
    spec, amounts = data.case.spec, AMOUNTS.get(data.case.granularity, {})
    if data.scale is None:
        return lambda x, scale: fastflat.fake_quantize_dynamic(x, spec=spec, **amounts)[0]
    return lambda x, scale: fastflat.fake_quantize(x, scale, spec=spec, **amounts)


def mixquant(data):
    spec, scales, weight = data.case.spec, *mixture(data)
    return lambda x, scale: fastflat.mixquant(x, scale * scales, weight, bits=BITS, spec=spec)


def composed_mixquant(data):
    """A call a candidate, added up: what one has without the mixture's kernels."""
    spec, scales, weight = data.case.spec, *mixture(data)
    specs = [spec.replace(bits=b) for b in BITS]

    def forward(x: Tensor, scale: Tensor) -> Tensor:
        parts = (fastflat.fake_quantize(x, scale * s, spec=q) for s, q in zip(scales, specs, strict=True))
        return sum(w * y for w, y in zip(weight, parts, strict=True))

    return forward


def one_quantizer(data):
    """One of the candidates alone."""
    return fake_quantize(data)


def binarize(data):
    return lambda x, scale: fastflat.binarize(x, axis=0)


def liq(data):
    return lambda w, clip: fastflat.liq_quantize(w, clip, bits=LIQ_BITS)


def identity(data):
    fastflat.choose("identity", data.x.device.type)  # loads the compiled library, which the raw op does not
    return lambda x, scale: Identity.apply(x)
