# SPDX-License-Identifier: Apache-2.0
"""Regularisers over weight matrices: ours, and in torch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

import fastflat


def _symmetry(mean: Tensor, skew: Tensor, row_l1: Tensor, col_l1: Tensor) -> Tensor:
    return mean.square().sum() + 0.1 * skew.square().sum() + row_l1.amax() + col_l1.amax()


def ours(data):
    if data.case.granularity == "saturate":
        return fastflat.saturate

    def reduce(w: Tensor, _: None) -> Tensor:
        found = fastflat.weight_reduce(w)
        return _symmetry(found.mean, found.skew, found.row_l1, found.col_l1) + found.absmax

    return reduce


def eager(data):
    def saturate(w: Tensor, alpha: Tensor) -> Tensor:
        return alpha.to(w.dtype) * torch.tanh(w / alpha.to(w.dtype))

    def reduce(w: Tensor, _: None) -> Tensor:
        w = w.float() if w.dtype != torch.float64 else w
        mean = w.mean(1)
        d = w - mean[:, None]
        skew = d.pow(3).mean(1) / d.square().mean(1) ** 1.5
        size = w.abs()
        return _symmetry(mean, skew, size.sum(1), size.sum(0)) + size.amax()

    return saturate if data.case.granularity == "saturate" else reduce
