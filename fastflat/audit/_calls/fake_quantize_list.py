# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the fake_quantize_list family: the tensor of a place, twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops
from fastflat._spec import TINY, QuantSpec


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place not in ("tensor", "columns", "groups"):
        return  # the three forms of run_tile; sums are launched by fake_quantize
    x = torch.empty(shape, dtype=dtype)
    spec = QuantSpec.torch(4)
    lists = _lists(x, axis, group, spec.rules, spec.eps)
    if op == "fake_quantize_list":
        yield lists
    elif op == "fake_quantize_list_bwd":
        yield ([x, x], *lists, [0.5, 0.5], [0, 0])
    else:
        raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    # One tensor: traffic is counted by its elements, and a list only repeats it.
    scale = torch.full(_ops.scale_shape(x.shape, axis, group), 0.3)
    grids = [[value] for value in (-8, 7, axis, group, TINY, 0)]
    if op == "fake_quantize_list":
        yield ([x], [scale], [], *grids), 2
    elif op == "fake_quantize_list_bwd":
        yield ([x], [x], [scale], [], *grids, [1.0], [1]), 3


def _lists(x: torch.Tensor, axis: int, group: int, rules: int, eps: float) -> tuple:
    scale = torch.empty(_ops.scale_shape(x.shape, axis, group), dtype=_ops.compute_dtype(x.dtype))
    return ([x, x], [scale] * 2, [scale] * 2, *([v] * 2 for v in (-8, 7, axis, group, eps, rules)))
