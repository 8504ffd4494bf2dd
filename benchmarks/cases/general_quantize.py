# SPDX-License-Identifier: Apache-2.0
"""Quantizers beyond the plain integer grid: noise, stochastic rounding, floating-point grids, block formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastflat import QuantSpec
from fastflat._ops import OPS, compute_dtype

from . import Case, DynamicCase, scale_shape, shape_of

#: 4 bits or the format's, one learned scale per channel; block formats have a scale from the data for each block.
GRANULARITIES = {
    "uniform": QuantSpec.lsq(bits=4, axis=0, noise="uniform"),
    "normal": QuantSpec.lsq(bits=4, axis=0, noise="normal"),
    "temper": QuantSpec.lsq(bits=4, axis=0, noise="temper"),
    "bypass": QuantSpec.lsq(bits=4, axis=0, noise="bypass"),
    "stochastic": QuantSpec.lsq(bits=4, axis=0, rounding="stochastic"),
    "e4m3": QuantSpec.lsq(bits=8, axis=0, format="e4m3"),
    "e2m1": QuantSpec.lsq(bits=4, axis=0, format="e2m1"),
    "mxfp8": QuantSpec.mx("e4m3"),
    "mxfp4": QuantSpec.mx("e2m1"),
}

#: Share of the noise and of the residual given back; without an entry the defaults of fastflat.fake_quantize.
AMOUNTS = {"temper": {"nu": 0.5, "a": 0.5}, "bypass": {"nu": 0.5}}


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("both",),
) -> Iterator[Case]:
    """One case per type, quantizer, size and pass."""
    for dtype in dtypes:
        for granularity in granularities:
            spec = GRANULARITIES[granularity]
            kind = DynamicCase if spec.group else Case
            for size in sizes:
                shape = shape_of(size, spec.group)
                forward, backward = traffic(shape, dtype, spec)
                for which in passes:
                    total = forward + backward if which == "both" else forward
                    yield kind("general_quantize", shape, dtype, which, spec, granularity, total)


def traffic(shape: tuple[int, int], dtype: torch.dtype, spec: QuantSpec) -> tuple[int, int]:
    """Bytes that forward and backward must move: the op table's, which reads the arguments' sizes only."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    scale = torch.empty(scale_shape(spec, shape), dtype=compute_dtype(dtype), device="meta")
    grid = (*spec.ends, -1 if spec.axis is None else spec.axis, spec.group or 0, spec.eps, spec.rules)
    backward = OPS["general_quantize_bwd"].bytes_moved(x, x, scale, None, None, None, None, None, *grid, 1.0, True)
    if spec.group:
        return OPS["general_quantize_dynamic"].bytes_moved(x, None, None, None, None, *grid), backward
    return OPS["general_quantize"].bytes_moved(x, scale, None, None, None, None, *grid), backward
