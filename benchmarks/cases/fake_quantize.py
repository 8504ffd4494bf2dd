# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization to 4 bits with a learned scale, per tensor, per channel and in groups; and per channel with a scale
from the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastflat import QuantSpec
from fastflat._ops import OPS, compute_dtype

from . import Case, DynamicCase, scale_shape, shape_of

GRANULARITIES = {
    "tensor": QuantSpec.lsq(bits=4),
    "channel": QuantSpec.lsq(bits=4, axis=0),
    "group32": QuantSpec.lsq(bits=4, group=32),
    "group128": QuantSpec.lsq(bits=4, group=128),
    "dynamic": QuantSpec(bits=4, axis=0, mask="none"),
}


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("both",),
) -> Iterator[Case]:
    """One case per type, granularity, size and pass."""
    for dtype in dtypes:
        for granularity in granularities:
            spec = GRANULARITIES[granularity]
            kind = Case if spec.trains_scale else DynamicCase
            for size in sizes:
                shape = shape_of(size, spec.group)
                forward, backward = traffic(shape, dtype, spec)
                for which in passes:
                    total = forward + backward if which == "both" else forward
                    yield kind("fake_quantize", shape, dtype, which, spec, granularity, total)


def traffic(shape: tuple[int, int], dtype: torch.dtype, spec: QuantSpec) -> tuple[int, int]:
    """Bytes that forward and backward must move: the op table's, which reads the arguments' sizes only."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    scale = torch.empty(scale_shape(spec, shape), dtype=compute_dtype(dtype), device="meta")
    grid = (spec.qmin, spec.qmax, -1 if spec.axis is None else spec.axis, spec.group or 0, spec.eps, spec.rules)
    backward = OPS["fake_quantize_bwd"].bytes_moved(x, x, scale, None, *grid, 1.0, spec.trains_scale)
    if spec.trains_scale:
        return OPS["fake_quantize"].bytes_moved(x, scale, None, *grid), backward
    return OPS["fake_quantize_absmax"].bytes_moved(x, *grid), backward
