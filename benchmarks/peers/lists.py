# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors: the rows of the case's data, each with the scale of its row."""

from __future__ import annotations

import torch

import fastflat
from fastflat.quant import eager

from ..cases.fake_quantize_list import ROW


def fused(data):
    """One call for the list."""
    return lambda x, scale: torch.stack(fastflat.fake_quantize_list(x.unbind(0), scale.unbind(0), ROW))


def each(data):
    """A call for each tensor."""

    def forward(x, scale):
        return torch.stack(
            [fastflat.fake_quantize(*row, spec=ROW) for row in zip(x.unbind(0), scale.unbind(0), strict=True)]
        )

    return forward


def composed(data):
    """The chain of PyTorch operations for each tensor."""
    factor, dtype = ROW.grad_factor(data.x.shape[1], 1), data.x.dtype

    def forward(x, scale):
        rows = zip(x.unbind(0), scale.unbind(0), strict=True)
        return torch.stack([eager.lsq(*row, ROW.qmin, ROW.qmax, None, factor).to(dtype) for row in rows])

    return forward
