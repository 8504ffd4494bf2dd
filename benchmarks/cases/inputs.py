# SPDX-License-Identifier: Apache-2.0
"""Noise and attack steps on images of 3 x 32 x 32; `sizes` are elements of the batch.

``noise``: three copies of uniform strength; ``noise-masked``: on a fifth of the elements; ``pgd-linf`` and ``pgd-l2``:
a step on 70 % of the samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS

from . import Case, Data

GRANULARITIES = ("noise", "noise-masked", "pgd-linf", "pgd-l2")
#: Copies, strength, chance of an element with `noise-masked`; step and radius by norm.
COPIES, STRENGTH, KEEP = 3, 1.2, 0.2
STEPS = {"linf": (2 / 255, 8 / 255), "l2": (0.3, 1.0)}
_IMAGE = (3, 32, 32)


@dataclasses.dataclass(frozen=True)
class InputsCase(Case):
    """A case of shape [B, 3072]."""

    @property
    def keep(self) -> float:
        return KEEP if self.granularity == "noise-masked" else 1.0

    @property
    def norm(self) -> str | None:
        return self.granularity[4:] if self.granularity.startswith("pgd") else None

    def data(self, device: torch.device) -> InputsData:
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.rand(self.shape[0], *_IMAGE, generator=generator).to(device, self.dtype)

        xa, x0, g = draw(), draw(), draw() - 0.5
        active = (torch.rand(self.shape[0], generator=generator) < 0.7).to(device)
        return InputsData(self, xa, None, xa, x0, g, active)


@dataclasses.dataclass(frozen=True)
class InputsData(Data):
    """x is the batch, or the iterate."""

    x0: Tensor
    g: Tensor
    active: Tensor


def _bytes(case: InputsCase) -> int:
    x = torch.empty(case.shape, dtype=case.dtype, device="meta")
    if case.norm is None:
        return OPS["inputs_noise"].bytes_moved(x, None, COPIES, 1, STRENGTH, case.keep)
    active = torch.empty(case.shape[0], dtype=torch.bool, device="meta")
    return OPS["inputs_pgd_step"].bytes_moved(x, x, x, active)


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = GRANULARITIES,
    passes: Sequence[str] = ("forward",),
) -> Iterator[InputsCase]:
    """One case per type, size and work; nothing here has a backward pass."""
    for dtype in dtypes:
        for size in sizes:
            for name in granularities:
                shape = (max(1, size // 3072), 3072)
                case = InputsCase("inputs", shape, dtype, "forward", None, name, 0)
                yield dataclasses.replace(case, bytes=_bytes(case))
