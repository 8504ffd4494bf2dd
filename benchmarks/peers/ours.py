# SPDX-License-Identifier: Apache-2.0
"""fastflat, by the backend in force."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

import fastflat


class Identity(Function):
    """The raw op ``identity``, both ways."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.ops.fastflat.identity(x)

    @staticmethod
    def backward(ctx, gy: Tensor) -> Tensor:
        return torch.ops.fastflat.identity(gy)


def fake_quantize(data):
    spec = data.case.spec
    return lambda x, scale: fastflat.fake_quantize(x, scale, spec=spec)


def identity(data):
    fastflat.choose("identity", data.x.device.type)  # loads the compiled library, which the raw op does not
    return lambda x, scale: Identity.apply(x)
