# SPDX-License-Identifier: Apache-2.0
"""Tangents of layer norm, softmax and cross-entropy; `sizes` are elements of the primal.

``norm`` and ``norm_bwd`` over rows of 128 and of 768 channels, ``softmax`` over rows of 64 keys, ``cross_entropy`` of
10 and of 50257 classes: ``norm-128`` for one tangent, ``norm-128x8`` for eight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS, compute_dtype

from . import Case, Data

#: Work, and length of a row.
_ROWS = (
    *(("norm", 128), ("norm", 768), ("norm_bwd", 128), ("norm_bwd", 768)),
    *(("softmax", 64), ("cross_entropy", 10), ("cross_entropy", 50257)),
)
GRANULARITIES = {
    f"{work}-{length}{'x8' if k == 8 else ''}": (work, length, k) for work, length in _ROWS for k in (1, 8)
}
_OPS = {"norm": "row_tangents_norm", "norm_bwd": "row_tangents_norm_bwd"}


@dataclasses.dataclass(frozen=True)
class RowTangentsCase(Case):
    """A case of shape [K, R D]."""

    rows: int = 0

    @property
    def op(self) -> str:
        return _OPS.get(GRANULARITIES[self.granularity][0], "row_tangents_softmax")

    @property
    def log(self) -> bool:
        return self.granularity.startswith("cross_entropy")

    def data(self, device: torch.device) -> RowTangentsData:
        generator = torch.Generator().manual_seed(0)
        _, length, k = GRANULARITIES[self.granularity]

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, dtype)

        tangents, values = (k, self.rows, length), (self.rows, length)
        compute = compute_dtype(self.dtype)
        x, inv = draw(*tangents), draw(self.rows, dtype=compute).abs() + 0.5
        if self.op == "row_tangents_softmax":
            p = draw(*values).log_softmax(1)
            arguments = (x, p, inv, True) if self.log else (x, p.exp(), None, False)
        else:
            channels, along = draw(length), draw(k, length)
            arguments = (x, draw(*values), inv, channels, along, draw(k, length), True)
            if self.op == "row_tangents_norm_bwd":
                statistics = (draw(k, self.rows, dtype=compute) for _ in range(2))
                arguments = (draw(*tangents), x, *statistics, along, draw(*values), draw(*values), inv, channels, True)
        return RowTangentsData(self, x, None, x, arguments)


@dataclasses.dataclass(frozen=True)
class RowTangentsData(Data):
    """x holds tangents; `arguments` are those of the op."""

    arguments: tuple


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("forward",),
) -> Iterator[RowTangentsCase]:
    """One case per type, size and work; nothing here has a backward pass."""
    for dtype in dtypes:
        for size in sizes:
            for name in granularities:
                _, length, k = GRANULARITIES[name]
                rows = max(1, size // length)
                case = RowTangentsCase("row_tangents", (k, rows * length), dtype, "forward", None, name, 0, rows)
                meta = case.data(torch.device("meta"))
                yield dataclasses.replace(case, bytes=OPS[case.op].bytes_moved(*meta.arguments))
