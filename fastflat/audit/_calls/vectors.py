# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the vectors family: rows as long as the tensor of a place, which has no scales here."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

#: Rows of the basis, and vectors: kernels for one and for several differ.
_ROWS, _COUNTS = 3, (1, 8)


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    # Rows whose length is a multiple of every access, and of none.
    if place not in ("tensor", "odd rows") or (place == "odd rows" and dtype != torch.float32):
        return
    n = torch.Size(shape).numel()
    if op == "vectors_rademacher":
        if place == "tensor":
            yield torch.tensor([1, 0]), 1, n, dtype
    elif dtype != torch.float16:  # bf16 beside fp32, no other 16 bits
        for vectors in _COUNTS:
            yield _arguments(op, _ROWS, vectors, n, dtype)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    if place != "tensor":
        return
    n = x.numel()
    if op == "vectors_rademacher":
        calls = [(torch.tensor([1, 0]), 1, n, x.dtype)]
    elif op == "vectors_quadratic":
        calls = [_arguments(op, _ROWS, 1, n, x.dtype)]
    else:
        # As many rows as share a reading of the vector, and as many vectors as share one of the basis.
        calls = [_arguments(op, _ROWS, vectors, n, x.dtype) for vectors in (1, 4)]
    for arguments in calls:
        yield arguments, _ops.OPS[op].bytes_moved(*arguments) / (n * x.element_size())


def _arguments(op: str, rows: int, vectors: int, n: int, dtype: torch.dtype) -> tuple:
    q = torch.zeros(rows, n, dtype=dtype)
    w = torch.zeros(vectors, n, dtype=_ops.compute_dtype(dtype))
    if op == "vectors_dot":
        return q, w
    if op == "vectors_subtract_":
        return w, q, torch.zeros(rows, vectors, dtype=torch.float64)
    if op == "vectors_quadratic":
        return q, w[:1].expand(rows, n).contiguous(), [0, n // 2, n]
    raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")
