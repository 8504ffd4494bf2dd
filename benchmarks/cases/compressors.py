# SPDX-License-Identifier: Apache-2.0
"""Compressed gradients with error feedback: ``sign``, ``qsgd`` (4 bits, buckets of 512), ``terngrad`` (clipped) and
``topk`` (1 %)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS, compute_dtype

from . import Case, Data, shape_of

GRANULARITIES = ("sign", "qsgd", "terngrad", "topk")
#: Levels, norm and bucket (None: the whole) of each method of codes, and the clip of TernGrad.
CODES = {"sign": (0, 0, None), "qsgd": (7, 1, 512), "terngrad": (1, 2, None)}
CLIP = 2.5


@dataclasses.dataclass(frozen=True)
class CompressorsCase(Case):
    """A case of shape [rows, columns]."""

    @property
    def k(self) -> int:
        return max(1, self.elements // 100)

    def data(self, device: torch.device) -> CompressorsData:
        data = super().data(device)
        error = (0.1 * data.gy).to(compute_dtype(self.dtype))
        return CompressorsData(self, data.x, None, data.gy, error)


@dataclasses.dataclass(frozen=True)
class CompressorsData(Data):
    """x is the gradient, error the residual, which a call writes."""

    error: Tensor


def _bytes(case: CompressorsCase) -> int:
    """Both ops of a method of codes read g and error: the units must be known before a code is."""
    g = torch.empty(case.shape, dtype=case.dtype, device="meta")
    error = torch.empty(case.shape, dtype=compute_dtype(case.dtype), device="meta")
    if case.granularity == "topk":
        return OPS["compressors_topk_"].bytes_moved(g, error, case.k)
    levels, norm, bucket = CODES[case.granularity]
    bucket = bucket or case.elements
    units = OPS["compressors_units"].fake(g, error, norm, levels, bucket, 0.0)
    read = OPS["compressors_units"].bytes_moved(g, error, norm, levels, bucket, 0.0)
    return read + OPS["compressors_encode_"].bytes_moved(g, error, units, None, levels, bucket)


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = GRANULARITIES,
    passes: Sequence[str] = ("forward",),
) -> Iterator[CompressorsCase]:
    """One case per type, size and method; nothing here has a backward pass."""
    for dtype in dtypes:
        for size in sizes:
            for name in granularities:
                case = CompressorsCase("compressors", shape_of(size), dtype, "forward", None, name, 0)
                yield dataclasses.replace(case, bytes=_bytes(case))
