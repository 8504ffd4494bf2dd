# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the binarize family."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = torch.empty(shape, dtype=dtype)
    alpha = torch.ones(_ops.scale_shape(x.shape, axis, group), dtype=_ops.compute_dtype(dtype))
    yield from _arguments(op, x, None, alpha, axis, group)
    # Importance adds a load of fp32 beside those of x: the forms of the tiles are enough, once.
    if dtype == torch.float32 and place in ("tensor", "groups", "columns"):
        yield from _arguments(op, x, torch.ones(shape, dtype=alpha.dtype), alpha, axis, group)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    alpha = torch.ones(_ops.scale_shape(x.shape, axis, group), dtype=_ops.compute_dtype(x.dtype))
    streams = {"binarize": 3, "binarize_bwd": 5, "binarize_jvp": 5}[op]
    for args in _arguments(op, x, None, alpha, axis, group):
        yield args, streams


def _arguments(op: str, x, h, alpha, axis: int, group: int) -> Iterator[tuple]:
    rule = (1.0, True, axis, group)
    if op == "binarize":
        yield x, h, axis, group
    elif op == "binarize_bwd":
        yield x, None, x, h, alpha, *rule
    elif op == "binarize_jvp":
        yield x, x, h, alpha, *rule
    else:
        raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")
