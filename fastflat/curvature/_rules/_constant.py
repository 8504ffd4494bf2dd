# SPDX-License-Identifier: Apache-2.0
"""Ops whose result has no derivative: a tangent ends there."""

from __future__ import annotations

import torch

import fastflat.backends  # noqa: F401  (registers the ops of torch.ops.fastflat)

aten = torch.ops.aten

CONSTANT = {
    overload
    for packet in (
        *(aten.detach_copy, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like),
        *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty),
        *(aten.rand_like, aten.randn_like, aten.randint_like, aten.bernoulli, aten.multinomial),
        *(aten.round, aten.floor, aten.ceil, aten.trunc, aten.sign, aten.sgn),
        *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isnan, aten.isinf, aten.isfinite, aten.signbit),
        *(aten.logical_and, aten.logical_or, aten.logical_not, aten.logical_xor, aten.any, aten.all),
        *(aten.argmax, aten.argmin, aten.argsort, aten.bucketize, aten.searchsorted, aten.nonzero),
        torch.ops.fastflat.liq_moments,
    )
    for name in packet.overloads()
    for overload in (getattr(packet, name),)
}
