# SPDX-License-Identifier: Apache-2.0
"""Bit planes as Python code writes them, compiled, and fused; functions of the planes p and q."""

from __future__ import annotations

import torch

import fastflat


def _small(data):
    """Mask, scale and steepness of a weight in the middle of its schedule."""
    planes, device = data.x.shape[0], data.x.device
    dtype = torch.float64 if data.x.dtype == torch.float64 else torch.float32
    make = lambda value, *shape: torch.full(shape, value, dtype=dtype, device=device)  # noqa: E731
    return make(0.2, planes).requires_grad_(), make(0.5).requires_grad_(), make(10.0)


def fused(data):
    m, scale, beta = _small(data)
    return lambda p, q: fastflat.bitplane(p, q, m, scale, beta)


def eager(data):
    """The formula as a chain of PyTorch operations."""
    m, scale, beta = _small(data)
    planes = len(m)
    power = (2.0 ** torch.arange(planes - 1, -1, -1, dtype=m.dtype, device=m.device) / (2**planes - 1)).unsqueeze(1)

    def chain(p, q):
        bits = torch.sigmoid(beta * p) - torch.sigmoid(beta * q)
        return (scale * (bits * power * torch.sigmoid(beta * m).unsqueeze(1)).sum(0)).to(p.dtype)

    return chain


def compiled(data):
    """``torch.compile`` of the same chain."""
    torch._dynamo.reset()
    return torch.compile(eager(data), dynamic=False, fullgraph=True)
