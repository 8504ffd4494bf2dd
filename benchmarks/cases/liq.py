# SPDX-License-Identifier: Apache-2.0
"""The weight-normalising quantizer in 4 bits with one mean and deviation; the scale's place holds the clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from fastflat._ops import OPS, compute_dtype

from . import Case, Data, shape_of

BITS = 4


@dataclasses.dataclass(frozen=True)
class LiqCase(Case):
    """A case whose clip is learned."""

    def data(self, device: torch.device) -> Data:
        clip = torch.full((), 2.5, dtype=compute_dtype(self.dtype), device=device)
        return dataclasses.replace(super().data(device), scale=clip)


def cases(sizes: Sequence[int], dtypes: Sequence[torch.dtype], passes: Sequence[str] = ("both",)) -> Iterator[Case]:
    """One case per type, size and pass."""
    for dtype in dtypes:
        for size in sizes:
            shape = shape_of(size)
            w = torch.empty(shape, dtype=dtype, device="meta")
            one = torch.empty((), dtype=compute_dtype(dtype), device="meta")
            point = (w, one, one, one, 2**BITS - 1, -1, 1e-8)
            forward = OPS["liq_moments"].bytes_moved(w, -1) + OPS["liq"].bytes_moved(*point)
            total = forward + OPS["liq_bwd"].bytes_moved(w, *point)
            for which in passes:
                yield LiqCase("liq", shape, dtype, which, None, "tensor", total if which == "both" else forward)
