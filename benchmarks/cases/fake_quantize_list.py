# SPDX-License-Identifier: Apache-2.0
"""Many small tensors of 4096 elements, 4 bits with a learned scale each: one call for all against a call for each.

A case's data is one matrix whose rows are the tensors; taking it apart and putting the results together is part of
every peer's time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastflat import QuantSpec
from fastflat._ops import OPS, compute_dtype

from . import Case

#: Elements of a tensor of the list.
LENGTH = 4096
#: The spec of a row; that of the case has the rows as channels, for a scale each.
ROW = QuantSpec.lsq(bits=4)
GRANULARITIES = {"tensor": ROW.replace(axis=0)}


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("both",),
) -> Iterator[Case]:
    """One case per type, size and pass; a size is that of all tensors together."""
    for dtype in dtypes:
        for granularity in granularities:
            for size in sizes:
                shape = (max(size // LENGTH, 1), min(size, LENGTH))
                forward, backward = traffic(shape, dtype)
                for which in passes:
                    total = forward + backward if which == "both" else forward
                    yield Case(
                        "fake_quantize_list", shape, dtype, which, GRANULARITIES[granularity], granularity, total
                    )


def traffic(shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that forward and backward must move: the op table's, which reads the arguments' sizes only."""
    count = shape[0]
    xs = [torch.empty(shape[1], dtype=dtype, device="meta")] * count
    scales = [torch.empty((), dtype=compute_dtype(dtype), device="meta")] * count
    grids = [[value] * count for value in (ROW.qmin, ROW.qmax, -1, 0, ROW.eps, ROW.rules)]
    forward = OPS["fake_quantize_list"].bytes_moved(xs, scales, [], *grids)
    return forward, OPS["fake_quantize_list_bwd"].bytes_moved(xs, xs, scales, [], *grids, [1.0] * count, [1] * count)
