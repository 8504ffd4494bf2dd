# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the row_tangents family: rows are those of a place with two axes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

#: Places whose rows a program holds, some and one at a time, on 16 bytes and off them; and one it passes over twice.
_PLACES = ("tensor", "long rows", "short rows", "odd rows")


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place in _PLACES and (dtype in (torch.float32, torch.bfloat16) or place == "tensor"):
        rows, length = shape if len(shape) == 2 else (1, *shape)
        yield _arguments(op, 2, rows, length, dtype, channels=True)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    # Few rows share their tangents out among blocks, each of which reads the primals: one tangent.
    if place != "rows":
        return
    arguments = _arguments(op, 1, *x.shape, x.dtype, channels=False)
    yield arguments, _ops.OPS[op].bytes_moved(*arguments) / (x.numel() * x.element_size())


def _arguments(op: str, k: int, rows: int, length: int, dtype: torch.dtype, channels: bool) -> tuple:
    x, normal = torch.zeros(k, rows, length, dtype=dtype), torch.zeros(rows, length, dtype=dtype)
    weight, along = (torch.zeros(*s, dtype=dtype) if channels else None for s in ((length,), (k, length)))
    compute = _ops.compute_dtype(dtype)
    of_row, of_tangent = torch.zeros(rows, dtype=compute), torch.zeros(k, rows, dtype=compute)
    if op == "row_tangents_norm":
        return x, normal, of_row, weight, along, along, True
    if op == "row_tangents_norm_bwd":
        return x, x.clone(), of_tangent, of_tangent, along, normal, normal.clone(), of_row, weight, True
    if op == "row_tangents_softmax":
        return x, normal, of_row, True
    if op == "row_tangents_softmax_bwd":
        return x, x.clone(), normal, normal.clone()
    raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")
