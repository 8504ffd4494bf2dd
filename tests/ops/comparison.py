# SPDX-License-Identifier: Apache-2.0
"""Comparison by bits, and the data that breaks quantizers. Imported by the op tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Ties of a grid of 0.1 and of 0.5, zeros of both signs, subnormals, infinities, NaN, overflow of x/s and of int64.
SPECIAL = (0.0, -0.0, 0.05, -0.05, 0.15, 0.25, -0.25, 0.75, -0.75, 1.25, 1e-40, -1e-40, 3e38, -3e38, 1e20, -1e20)
SPECIAL += (float("inf"), float("-inf"), float("nan"))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape, strides and bits; NaN equals NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    nan = actual.isnan()
    assert torch.equal(nan, expected.isnan())
    view = _INTEGER[actual.element_size()]
    a, b = (t.masked_fill(nan, 0).contiguous().view(view) for t in (actual, expected))
    different = (a != b).nonzero()
    assert not len(different), f"{len(different)} values differ, first at {different[0].tolist()}"


def random_data(shape, dtype=torch.float32, seed=0, special=True) -> Tensor:
    """Normal data of `shape` with the special values strewn in."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if special and x.numel():
        count = min(len(SPECIAL), x.numel())
        where = torch.randperm(x.numel(), generator=generator)[:count]
        x.view(-1)[where] = torch.tensor(SPECIAL[:count], dtype=torch.float64)
    return x.to(dtype)
