# SPDX-License-Identifier: Apache-2.0
"""Binarization with a scale for each row (XNOR-Net), with the gradient through the scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastflat._ops import OPS, compute_dtype

from . import Case, shape_of


def cases(sizes: Sequence[int], dtypes: Sequence[torch.dtype], passes: Sequence[str] = ("both",)) -> Iterator[Case]:
    """One case per type, size and pass."""
    for dtype in dtypes:
        for size in sizes:
            shape = shape_of(size)
            x = torch.empty(shape, dtype=dtype, device="meta")
            alpha = torch.empty(shape[0], dtype=compute_dtype(dtype), device="meta")
            forward = OPS["binarize"].bytes_moved(x, None, 0, 0)
            total = forward + OPS["binarize_bwd"].bytes_moved(x, None, x, None, alpha, 1.0, True, 0, 0)
            for which in passes:
                yield Case("binarize", shape, dtype, which, None, "channel", total if which == "both" else forward)
