# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the logits family: rows are those of a place with two axes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

#: Places whose rows a program holds, some and one at a time, on 16 bytes and off them; and one it passes over again.
_PLACES = ("tensor", "long rows", "rows", "odd rows")


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place in _PLACES and (dtype in (torch.float32, torch.bfloat16) or place == "tensor"):
        rows, length = shape if len(shape) == 2 else (1, *shape)
        yield from _arguments(op, rows, length, dtype)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    # Forward passes read a row once more for each maximum and sum, from the caches, which the count knows nothing of.
    if place == "rows" and op.endswith("_bwd"):
        arguments = next(_arguments(op, *x.shape, x.dtype))
        yield arguments, (4.0 if op == "logits_divergence_bwd" else 2.0)


def _arguments(op: str, rows: int, length: int, dtype: torch.dtype) -> Iterator[tuple]:
    compute = _ops.compute_dtype(dtype)
    z0, z = torch.zeros(rows, length, dtype=dtype), torch.zeros(1, rows, length, dtype=dtype)
    y, of_row = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=compute)
    of_class, norm = torch.zeros(length, dtype=compute), torch.zeros(2, rows, 2, dtype=compute)
    if op == "logits_divergence":
        yield from ((z0, z, js) for js in (False, True))
    elif op == "logits_divergence_bwd":
        yield from ((of_row, z0, z, torch.zeros(1 + js, rows, dtype=compute), norm, js) for js in (False, True))
    elif op == "logits_loss":
        yield z0, y, *(of_class,) * 4, 1.0, -100
    elif op == "logits_loss_bwd":
        yield of_row, z0, y, *(of_class,) * 3, norm[0], 1.0
    elif op == "logits_stats":
        yield z0, y, -100
    elif op == "logits_scan":
        yield z0, z[0], y, torch.zeros(2, dtype=compute), -100
    else:
        raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")
