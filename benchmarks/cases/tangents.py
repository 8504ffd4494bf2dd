# SPDX-License-Identifier: Apache-2.0
"""Tangents through activations, quantizers and batch norms: `sizes` are elements of a primal, one tangent and eight.

``gelu``: the tangent of its backward. ``scale``: of a quantizer whose one scale moves. ``scale_grad``: of its backward,
masked tangents and their sums with the residual. ``norm``: of a batch norm in evaluation. ``stats``, ``apply``: of one
in training, the sums and what follows from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS, compute_dtype

from . import Case, Data

WORK = ("gelu", "scale", "scale_grad", "norm", "stats", "apply")
#: Work and tangents.
GRANULARITIES = {f"{work}{count if count > 1 else ''}": (work, count) for work in WORK for count in (1, 8)}
_SUMS = ("scale_grad", "stats")
_CHANNELS, _INNER = 64, 49


@dataclasses.dataclass(frozen=True)
class TangentsCase(Case):
    """A case of shape [tangents, elements]."""

    work: str = ""

    @property
    def op(self) -> str:
        return "tangents_sums" if self.work in _SUMS else "tangents_combine"

    def data(self, device: torch.device) -> TangentsData:
        generator = torch.Generator().manual_seed(0)
        count, n = self.shape
        wide = compute_dtype(self.dtype)
        primal = (1, 1, n)
        if self.work in ("norm", "stats", "apply"):
            primal = (n // (_CHANNELS * _INNER), _CHANNELS, _INNER)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, dtype)

        t0, t1 = draw(count, *primal), draw(count, *primal)
        numbers = [draw(*shape, primal[1], dtype=wide) for shape in ((), (count,), (count,))]
        mask = (draw(*primal).abs() < 1.5).to(self.dtype)
        return TangentsData(self, t0, None, t0, t1, draw(*primal), draw(*primal), mask, *numbers)


@dataclasses.dataclass(frozen=True)
class TangentsData(Data):
    """x holds the tangents, p and g are primals; `gain` has a number a channel, `slope` and `shift` have K of them."""

    t1: Tensor
    p: Tensor
    g: Tensor
    mask: Tensor
    gain: Tensor
    slope: Tensor
    shift: Tensor

    @property
    def arguments(self) -> tuple:
        """Of the op."""
        none = (None,) * 6
        return {
            "gelu": (self.x, self.p, self.t1, self.g, *none, 4),
            "scale": (self.x, self.mask, None, None, self.p, self.slope, *none[:4], 0),
            "scale_grad": (self.x, self.p, None, None, self.mask, False),
            "norm": (self.x, self.gain, *none[:5], None, None, None, 0),
            "stats": (self.x, self.p, None, None, None, True),
            "apply": (self.x, self.gain, None, None, self.p, self.slope, None, None, self.shift, None, 0),
        }[self.case.work]


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("forward",),
) -> Iterator[TangentsCase]:
    """One case per dtype, size of a primal and work; nothing here has a backward pass."""
    for dtype in dtypes:
        for size in sizes:
            for name in granularities:
                work, count = GRANULARITIES[name]
                n = size
                if work in ("norm", "stats", "apply"):
                    n = max(1, round(size / (_CHANNELS * _INNER))) * _CHANNELS * _INNER
                case = TangentsCase("tangents", (count, n), dtype, "forward", None, name, 0, work)
                meta = case.data(torch.device("meta"))
                yield dataclasses.replace(case, bytes=OPS[case.op].bytes_moved(*meta.arguments))
