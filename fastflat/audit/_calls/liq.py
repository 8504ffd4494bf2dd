# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the liq family, which has no groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if not group and not (op == "liq_jvp" and place not in ("tensor", "columns")):
        yield _arguments(op, torch.empty(shape, dtype=dtype), axis)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    if group:
        return
    streams = {"liq_moments": 2, "liq": 2, "liq_bwd": 3, "liq_jvp": 3}[op]
    if op == "liq_moments" and place in ("columns", "images"):
        # Of scales that alternate, a thread owns columns for 8 packs' worth of rows: more would leave a GPU idle. For
        # each it writes a double, which the second pass reads: an eighth of what a row of packs is, in each of the two.
        streams *= 1 + 1 / 8
    yield _arguments(op, x, axis), streams


def _arguments(op: str, w: torch.Tensor, axis: int) -> tuple:
    compute = _ops.compute_dtype(w.dtype)
    mean, std = (torch.ones(_ops.scale_shape(w.shape, axis, 0), dtype=compute) for _ in range(2))
    clip = torch.ones((), dtype=compute)
    point = (w, mean, std, clip, 15, axis, 1e-8)
    if op == "liq_moments":
        return w, axis
    if op == "liq":
        return point
    if op == "liq_bwd":
        return w, *point
    if op == "liq_jvp":
        return w, clip, *point
    raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")
