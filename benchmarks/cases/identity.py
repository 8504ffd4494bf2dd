# SPDX-License-Identifier: Apache-2.0
"""The op that does nothing: what a call and a pass over memory cost by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastflat._ops import OPS

from . import Case, shape_of


def cases(sizes: Sequence[int], dtypes: Sequence[torch.dtype], passes: Sequence[str] = ("both",)) -> Iterator[Case]:
    """One case per size, type and pass; its backward is the op once more."""
    for dtype in dtypes:
        for size in sizes:
            shape = shape_of(size)
            traffic = OPS["identity"].bytes_moved(torch.empty(shape, dtype=dtype, device="meta"))
            for which in passes:
                yield Case("identity", shape, dtype, which, None, "none", traffic * (1 + (which == "both")))
