# SPDX-License-Identifier: Apache-2.0
"""A mixture of four bit-widths with learned scales and weights: per tensor, per channel, in groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat import QuantSpec
from fastflat._ops import OPS, compute_dtype

from . import Case, Data, scale_shape, shape_of

#: Candidates of every case.
BITS = (2, 4, 6, 8)
#: The bits of a spec here are those that its data start from (Data.scale); candidates derive theirs.
GRANULARITIES = {
    "tensor": QuantSpec.lsq(bits=4),
    "channel": QuantSpec.lsq(bits=4, axis=0),
    "group128": QuantSpec.lsq(bits=4, group=128),
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
            for size in sizes:
                shape = shape_of(size, spec.group)
                forward, backward = traffic(shape, dtype, spec)
                for which in passes:
                    total = forward + backward if which == "both" else forward
                    yield Case("mixquant", shape, dtype, which, spec, granularity, total)


def traffic(shape: tuple[int, int], dtype: torch.dtype, spec: QuantSpec) -> tuple[int, int]:
    """Bytes that forward and backward must move: the op table's, which reads the arguments' sizes only."""
    compute = compute_dtype(dtype)
    x = torch.empty(shape, dtype=dtype, device="meta")
    scale = torch.empty((len(BITS), *scale_shape(spec, shape)), dtype=compute, device="meta")
    each = torch.empty(len(BITS), dtype=compute, device="meta")
    grid = (-1 if spec.axis is None else spec.axis, spec.group or 0, spec.eps, spec.rules)
    forward = OPS["mixquant"].bytes_moved(x, scale, each, each, each, *grid)
    return forward, OPS["mixquant_bwd"].bytes_moved(x, x, scale, each, each, each, each, *grid)


def mixture(data: Data) -> tuple[Tensor, Tensor]:
    """What each candidate's scale is to that of the case, ``[n, 1, ...]``, and learned weights ``[n]``."""
    scale = data.scale
    step = [2.0 ** (data.case.spec.bits - b) for b in BITS]
    scales = torch.tensor(step, dtype=scale.dtype, device=scale.device).view(-1, *[1] * scale.dim())
    weight = torch.full((len(BITS),), 1 / len(BITS), dtype=scale.dtype, device=scale.device)
    return scales, weight.requires_grad_(data.case.passes == "both")
