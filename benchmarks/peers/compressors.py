# SPDX-License-Identifier: Apache-2.0
"""Compressed gradients: ours, and in torch's operations as communication hooks have them, bits packed."""

from __future__ import annotations

import torch
from torch import Tensor

import fastflat

from ..cases.compressors import CLIP, CODES


def ours(data):
    case, error = data.case, data.error
    if case.granularity == "topk":
        return lambda g, _: fastflat.compress_topk(g, case.k, error=error).values
    options = {"clip": CLIP} if case.granularity == "terngrad" else {}
    return lambda g, _: fastflat.compress(g, case.granularity, error=error, **options).codes


def packed(stored: Tensor, bits: int) -> Tensor:
    """uint8 codes of a whole number of bytes."""
    places = torch.arange(8 // bits, device=stored.device, dtype=torch.uint8) * bits
    return (stored.view(-1, 8 // bits) << places).sum(-1, dtype=torch.uint8)


def eager(data):
    case, error = data.case, data.error

    def sign(g: Tensor, _: None) -> Tensor:
        p = g + error
        unit, plus = p.abs().mean(), p >= 0
        error.copy_(p - torch.where(plus, unit, -unit))
        return packed(plus.to(torch.uint8), 1)

    def levels(g: Tensor, _: None) -> Tensor:
        count, norm, bucket = CODES[case.granularity]
        p = (g + error).view(-1, bucket or g.numel())
        if norm == 1:
            unit = p.norm(dim=1, keepdim=True) / count
        else:
            unit = torch.minimum(p.abs().amax(1, keepdim=True), CLIP * p.square().mean(1, keepdim=True).sqrt())
        a = (p.abs() / unit).clamp(max=count)
        f = a.floor()
        c = (f + (torch.rand_like(a) < a - f)) * p.sign()
        error.copy_((p - unit * c).view(error.shape))
        return packed((c + count).to(torch.uint8), 2 if count == 1 else 4)

    def topk(g: Tensor, _: None) -> Tensor:
        p = (g + error).flatten()
        at = p.abs().topk(case.k, sorted=False).indices
        values = p[at].to(g.dtype)
        p[at] -= values
        error.copy_(p.view(error.shape))
        return values

    return {"sign": sign, "topk": topk}.get(case.granularity, levels)
