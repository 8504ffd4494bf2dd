# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the bitplane family: it has no scales, so places without channels are enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

_PLANES = 4


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    # A plane whose length is a multiple of every access, and one whose length is of none.
    if place not in ("tensor", "odd rows"):
        return
    for hard in ((False, False), (True, True)) if dtype == torch.float32 else ((False, False),):
        args = (*_arguments(torch.empty(shape, dtype=dtype)), *hard)
        if op == "bitplane":
            yield args
        elif op == "bitplane_bwd":
            yield (args[0][0], *args)
        elif op == "bitplane_jvp":
            yield (*args[:4], *args)
        else:
            raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    if place != "tensor":
        return
    planes = 1  # as many more cost the same each, and the interpreter is slow
    args = (*_arguments(x, planes), False, False)
    if op == "bitplane":
        yield args, 2 * planes + 1
    elif op == "bitplane_bwd":
        yield (x, *args), 4 * planes + 1
    elif op == "bitplane_jvp":
        yield (*args[:4], *args), 4 * planes + 1


def _arguments(x: torch.Tensor, planes: int = _PLANES) -> tuple[torch.Tensor, ...]:
    """Planes of x's shape, and the small tensors."""
    compute = _ops.compute_dtype(x.dtype)
    p = torch.stack([x] * planes)
    return p, p.neg(), torch.ones(planes, dtype=compute), *(torch.ones((), dtype=compute) for _ in range(2))
