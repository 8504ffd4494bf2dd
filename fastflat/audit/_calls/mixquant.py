# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the mixquant family."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops
from fastflat._spec import TINY, QuantSpec

_WIDTHS = (2, 4, 8, 6)


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = torch.empty(shape, dtype=dtype)
    # Four candidates of the heaviest rule everywhere; eight, which hold the most, where rows and columns differ.
    for count in (4, 8) if place in ("tensor", "columns") and dtype == torch.float32 else (4,):
        candidates, factor = _candidates(x, axis, group, count)
        grid = (axis, group, 1e-9, QuantSpec.torch(4).rules)
        if op == "mixquant":
            yield (x, *candidates, *grid)
        elif op == "mixquant_bwd":
            yield (x, x, *candidates, factor, *grid)
        elif op == "mixquant_jvp":
            if place in ("tensor", "columns"):
                yield (x, candidates[0], factor, x, *candidates, factor, *grid)
        else:
            raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    candidates, factor = _candidates(x, axis, group, 2)
    grid = (axis, group, TINY, 0)
    if op == "mixquant":
        yield (x, *candidates, *grid), 2
    elif op == "mixquant_bwd":
        if place != "groups":  # two sums a candidate and group are a tenth of the data there
            yield (x, x, *candidates, factor, *grid), 3
    elif op == "mixquant_jvp":
        yield (x, candidates[0], factor, x, *candidates, factor, *grid), 3


def _candidates(x: torch.Tensor, axis: int, group: int, count: int) -> tuple[tuple, torch.Tensor]:
    """scale, qmin, qmax, weight; and the factors."""
    compute = _ops.compute_dtype(x.dtype)
    scale = torch.full((count, *_ops.scale_shape(x.shape, axis, group)), 0.3, dtype=compute)
    low = torch.tensor([-(2.0 ** (_WIDTHS[j % len(_WIDTHS)] - 1)) for j in range(count)], dtype=compute)
    return (scale, low, -low - 1, torch.full_like(low, 1 / count)), torch.ones_like(low)
