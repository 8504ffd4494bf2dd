# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the compressors family: one bucket, and small ones; with a residual and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat._ops import compute_dtype
from fastflat._ops.compressors import buckets_of, code_bytes

_PLACES = ("tensor", "odd rows")
_WORKERS, _BUCKET, _STATE = 3, 512, (1, 0)


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place not in _PLACES:
        return
    g, compute = torch.zeros(shape, dtype=dtype), compute_dtype(dtype)
    n, error = g.numel(), torch.zeros(shape, dtype=compute)

    def units(bucket: int) -> torch.Tensor:
        return torch.zeros(buckets_of(n, bucket), dtype=compute)

    if op == "compressors_units":
        yield from ((g, error, *rest) for rest in ((0, 0, n, 0.0), (1, 7, _BUCKET, 0.0), (2, 1, n, 2.5)))
    elif op == "compressors_encode_":
        yield from ((g, error, units(n), None, 0, n), (g, None, units(_BUCKET), torch.tensor(_STATE), 7, _BUCKET))
    elif op == "compressors_decode_":
        for levels, bucket, add in ((0, n, False), (1, n, True), (7, _BUCKET, False)):
            codes = torch.zeros(_WORKERS, code_bytes(n, levels), dtype=torch.uint8)
            yield g, codes, units(bucket).expand(_WORKERS, -1).contiguous(), levels, bucket, 1.0, add
    elif op == "compressors_topk_":
        yield from ((g, error, n // 100), (g, None, n // 100))
    else:
        raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    # There are no CUDA kernels to measure.
    yield from ()
