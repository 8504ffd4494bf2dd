# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the inputs family: samples are the rows of a place with two axes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Places of long and of short samples.
_PLACES = ("tensor", "odd rows")
_COPIES = 3


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place not in _PLACES:
        return
    x = torch.zeros(shape if len(shape) == 2 else (1, *shape), dtype=dtype)
    if op == "inputs_noise":
        yield from ((x, torch.tensor([1, 0]), _COPIES, law, 1.0, keep) for law, keep in ((0, 1.0), (1, 0.5), (2, 0.5)))
    elif op == "inputs_pgd_step":
        active = torch.zeros(len(x), dtype=torch.bool)
        for norm in (0, 1):
            yield x, x.clone(), x.clone(), active, 0.1, 0.1, norm, 0.0, 1.0
    else:
        raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    # Attack steps have no CUDA kernel to measure.
    if place == "rows" and op == "inputs_noise":
        yield (x, torch.tensor([1, 0]), _COPIES, 1, 1.0, 0.5), 1.0 + _COPIES
