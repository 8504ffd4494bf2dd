# SPDX-License-Identifier: Apache-2.0
"""Weights made of 8 bit planes (CSQ): x is p, the scale's place holds q, and both get their gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from fastflat._ops import OPS, compute_dtype

from . import Case, Data

PLANES = 8


@dataclasses.dataclass(frozen=True)
class BitplaneCase(Case):
    """A case of shape [planes, elements of the weight]."""

    def data(self, device: torch.device) -> Data:
        generator = torch.Generator().manual_seed(0)
        p, q = (torch.randn(self.shape, generator=generator).to(device, self.dtype) for _ in range(2))
        return Data(self, p, q, torch.randn(self.shape[1], generator=generator).to(device, self.dtype))


def cases(sizes: Sequence[int], dtypes: Sequence[torch.dtype], passes: Sequence[str] = ("both",)) -> Iterator[Case]:
    """One case per type, size of the weight and pass."""
    for dtype in dtypes:
        for size in sizes:
            p = torch.empty((PLANES, size), dtype=dtype, device="meta")
            m = torch.empty(PLANES, dtype=compute_dtype(dtype), device="meta")
            args = (p, p, m, m[0], m[0], False, False)
            forward = OPS["bitplane"].bytes_moved(*args)
            total = forward + OPS["bitplane_bwd"].bytes_moved(p[0], *args)
            for which in passes:
                moved = total if which == "both" else forward
                yield BitplaneCase("bitplane", (PLANES, size), dtype, which, None, "planes", moved)
