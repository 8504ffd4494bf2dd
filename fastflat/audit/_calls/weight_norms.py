# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the weight_norms family: matrices are the places with two axes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

_PLACES = ("tensor", "odd rows")


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place in _PLACES:
        yield _arguments(op, *(shape if len(shape) == 2 else (1, *shape)), dtype)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    # Of the CUDA kernels there is that of the nonlinearity alone.
    if place == "rows" and op == "weight_norms_saturate":
        yield _arguments(op, *x.shape, x.dtype), 2.0


def _arguments(op: str, rows: int, columns: int, dtype: torch.dtype) -> tuple:
    w, compute = torch.zeros(rows, columns, dtype=dtype), _ops.compute_dtype(dtype)
    alpha, moments = torch.ones((), dtype=compute), torch.zeros(3, rows, dtype=compute)
    if op == "weight_norms_reduce":
        return (w,)
    if op == "weight_norms_reduce_bwd":
        return moments, moments[0], torch.zeros(columns, dtype=compute), alpha, w, moments, torch.ones(2, dtype=compute)
    if op == "weight_norms_saturate":
        return w, alpha
    if op == "weight_norms_saturate_bwd":
        return w, w.clone(), alpha
    raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")
