# SPDX-License-Identifier: Apache-2.0
"""Regularisers over weight matrices: ``reduce`` the symmetry of rows and two matrix norms, ``saturate`` the bounded
weight with its bound learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from fastflat._ops import OPS, compute_dtype

from . import Case, Data, shape_of

GRANULARITIES = ("reduce", "saturate")


@dataclasses.dataclass(frozen=True)
class WeightNormsCase(Case):
    """A case of shape [O, I]."""

    def data(self, device: torch.device) -> Data:
        generator = torch.Generator().manual_seed(0)
        w, gy = (torch.randn(self.shape, generator=generator).to(device, self.dtype) for _ in range(2))
        compute = compute_dtype(self.dtype)
        if self.granularity == "reduce":
            return Data(self, w, None, torch.ones((), dtype=compute, device=device))
        return Data(self, w, torch.tensor(2.0, dtype=compute, device=device), gy)


def _bytes(case: WeightNormsCase) -> int:
    w = torch.empty(case.shape, dtype=case.dtype, device="meta")
    alpha = torch.empty((), dtype=compute_dtype(case.dtype), device="meta")
    if case.granularity == "saturate":
        forward, behind = OPS["weight_norms_saturate"].bytes_moved(w, alpha), (w, w, alpha)
    else:
        moments, row_l1, col_l1, absmax = OPS["weight_norms_reduce"].fake(w)
        forward, behind = (
            OPS["weight_norms_reduce"].bytes_moved(w),
            (moments, row_l1, col_l1, alpha, w, moments, absmax),
        )
    back = OPS[f"weight_norms_{case.granularity}_bwd"].bytes_moved(*behind)
    return forward + (back if case.passes == "both" else 0)


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = GRANULARITIES,
    passes: Sequence[str] = ("both",),
) -> Iterator[WeightNormsCase]:
    """One case per type, size, work and pass."""
    for dtype in dtypes:
        for size in sizes:
            for name in granularities:
                for which in passes:
                    case = WeightNormsCase("weight_norms", shape_of(size), dtype, which, None, name, 0)
                    yield dataclasses.replace(case, bytes=_bytes(case))
