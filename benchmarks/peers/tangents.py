# SPDX-License-Identifier: Apache-2.0
"""Tangents: ours, and with as few operators of torch as do the same."""

from __future__ import annotations

import math

import torch

import fastflat


def ours(data):
    fastflat.choose(data.case.op, data.x.device.type)  # loads the compiled library, which the raw op does not
    op = getattr(torch.ops.fastflat, data.case.op)
    arguments = data.arguments
    return lambda x, scale: op(*arguments)


def eager(data):
    t0, t1, p, g, mask = data.x, data.t1, data.p, data.g, data.mask
    gain = data.gain.to(t0.dtype)[:, None]
    slope, shift = (r.to(t0.dtype)[:, None, :, None] for r in (data.slope, data.shift))

    def gelu():
        square = p * p
        density = torch.exp(square * -0.5) * (1 / math.sqrt(2 * math.pi))
        slope_ = torch.addcmul(torch.special.ndtr(p), p, density)
        bend = density * (2 - square) * g
        return torch.addcmul(t0 * slope_, t1, bend)

    calls = {
        "gelu": gelu,
        "scale": lambda: torch.addcmul(t0 * mask, p, slope),
        "scale_grad": lambda: (t0 * mask, (t0 * p).sum((1, 3))),
        "norm": lambda: t0 * gain,
        "stats": lambda: ((t0 * p).sum((1, 3)), t0.sum((1, 3))),
        "apply": lambda: torch.addcmul(shift, t0, gain).addcmul_(p, slope),
    }
    return lambda x, scale: calls[data.case.work]()
