# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the tangents family: as many tangents as share a reading of the primals, and one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

_SEVERAL = 8
#: Activations by number, of which the last has no second tangent.
_ACTIVATIONS, _RELU = (1, 2, 3, 4, 5, 6), 6


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    n = torch.Size(shape).numel()
    alone, channels = (1, 1, n), (n // shape[-1], shape[-1], 1)
    if op == "tangents_combine":
        if place == "tensor":
            for kind in _ACTIVATIONS if dtype == torch.float32 else (4,):
                yield _activation(kind, _SEVERAL, alone, dtype)
        elif place in ("columns", "odd columns"):
            yield _everything(_SEVERAL, channels, dtype)
    elif place in ("tensor", "odd rows"):
        for count in (1, _SEVERAL):
            yield _sums(count, alone, dtype)
    elif place == "columns":
        yield _sums(_SEVERAL, channels, dtype)
    elif place == "groups" and dtype == torch.float32:
        yield _sums(_SEVERAL, (1, n // group, group), dtype)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    if place != "tensor":
        return
    shape = (1, 1, x.numel())
    # As many tangents as share a reading.
    count = 2 if x.element_size() == 2 else 4
    if op == "tangents_combine":
        calls = [_activation(4, count, shape, x.dtype), _everything(count, shape, x.dtype)]
    else:
        calls = [_sums(count, shape, x.dtype)]
    for arguments in calls:
        yield arguments, _ops.OPS[op].bytes_moved(*arguments) / (x.numel() * x.element_size())


def _activation(kind: int, count: int, shape, dtype: torch.dtype) -> tuple:
    t, p = torch.zeros(count, *shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    second = (None, None) if kind == _RELU else (t.clone(), p.clone())
    return t, p, *second, *[None] * 6, kind


def _everything(count: int, shape, dtype: torch.dtype) -> tuple:
    t0, t1 = (torch.zeros(count, *shape, dtype=dtype) for _ in range(2))
    p1, f0, f1, mask = (torch.zeros(shape, dtype=dtype) for _ in range(4))
    p0, *rest = (torch.zeros(*k, shape[1], dtype=_ops.compute_dtype(dtype)) for k in ((), (count,), (count,), (count,)))
    r0, r1, shift = rest
    return t0, p0, t1, p1, f0, r0, f1, r1, shift, mask, 0


def _sums(count: int, shape, dtype: torch.dtype) -> tuple:
    t0, t1 = (torch.zeros(count, *shape, dtype=dtype) for _ in range(2))
    p0, p1, mask = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    return t0, p0, t1, p1, mask, True
