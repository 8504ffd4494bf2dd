# SPDX-License-Identifier: Apache-2.0
"""The vector work of Krylov methods and estimators: `sizes` are lengths of a vector.

``dot`` and ``subtract``: one vector with a basis of 10, ``dot8`` and ``subtract8``: eight vectors. ``lanczos``: a step
of the three-term recurrence. ``signs``: a random vector of +-1. ``forms``: quadratic forms of 64 slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS

from . import Case, Data

#: Rows of the basis, and vectors.
GRANULARITIES = {
    "dot": (10, 1), "dot8": (10, 8), "lanczos": (2, 1), "subtract": (10, 1), "subtract8": (10, 8), "signs": (0, 1),
    "forms": (1, 1),
}  # fmt: skip
_OPS = {"dot": "vectors_dot", "signs": "vectors_rademacher", "forms": "vectors_quadratic"}
_SLICES = 64


@dataclasses.dataclass(frozen=True)
class VectorsCase(Case):
    """A case of shape [vectors, n]."""

    rows: int = 0

    @property
    def op(self) -> str:
        return _OPS.get(self.granularity.rstrip("8"), "vectors_subtract_")

    def data(self, device: torch.device) -> VectorsData:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=self.dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        w, q = draw(*self.shape), draw(self.rows, self.shape[1])
        # Small factors: what is left after many calls is still of the size it had.
        factors = (draw(self.rows, self.shape[0]) * 1e-6).double()
        return VectorsData(self, w, None, w, q, factors)


@dataclasses.dataclass(frozen=True)
class VectorsData(Data):
    """x holds the vectors."""

    basis: Tensor
    factors: Tensor

    @property
    def starts(self) -> list[int]:
        n = self.x.shape[1]
        return [n * t // _SLICES for t in range(_SLICES + 1)]

    @property
    def arguments(self) -> tuple:
        """Of the op."""
        return {
            "vectors_dot": (self.basis, self.x),
            "vectors_subtract_": (self.x, self.basis, self.factors),
            "vectors_rademacher": (torch.tensor([1, 0], device=self.x.device), *self.x.shape, self.x.dtype),
            "vectors_quadratic": (self.basis, self.x, self.starts),
        }[self.case.op]


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("forward",),
) -> Iterator[VectorsCase]:
    """One case per type of vectors (fp32, fp64), length and work; nothing here has a backward pass."""
    for dtype in dtypes:
        for size in sizes if dtype.itemsize >= 4 else ():
            for name in granularities:
                rows, vectors = GRANULARITIES[name]
                case = VectorsCase("vectors", (vectors, size), dtype, "forward", None, name, 0, rows)
                meta = case.data(torch.device("meta"))
                yield dataclasses.replace(case, bytes=OPS[case.op].bytes_moved(*meta.arguments))
