# SPDX-License-Identifier: Apache-2.0
"""The vectors family in plain PyTorch, row by row of the basis."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastflat.backends.reference import _noise


def vectors_dot(q: Tensor, w: Tensor) -> Tensor:
    wide = w.double()
    rows = [(wide * row.double()).sum(1) for row in q]
    return torch.stack(rows) if rows else wide.new_zeros(0, len(w))


def vectors_subtract_(w: Tensor, q: Tensor, c: Tensor) -> Tensor:
    for row, factors in zip(q, c.to(w.dtype), strict=True):
        w.sub_(factors[:, None] * row.to(w.dtype))
    return w.double().square().sum(1)


def vectors_rademacher(state: Tensor, k: int, n: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.stack(_noise.words(state, -(-k * n // 128)), 1)
    set_ = (drawn[:, :, None] >> torch.arange(32, device=state.device)) & 1
    return (1 - 2 * set_).flatten()[: k * n].view(k, n).to(dtype)


def vectors_quadratic(v: Tensor, hv: Tensor, starts: list[int]) -> Tensor:
    products = v.double() * hv.double()
    sums = [products[:, begin:end].sum(1) for begin, end in itertools.pairwise(starts)]
    return torch.stack(sums, 1) if sums else products.new_zeros(len(v), 0)
