# SPDX-License-Identifier: Apache-2.0
"""Losses and statistics over logits; `sizes` are elements of all logits together.

``kl`` and ``js``: K noisy sets of logits beside a clean one, ``kl-1000x4`` of 1000 classes and four sets. ``ce``: the
re-balanced cross-entropy with factors, shifts, margins and weights of classes. ``stats``: of each row. ``scan``: the
loss at K steps, ``scan-10x16`` at sixteen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS, compute_dtype

from . import Case, Data

#: Work, classes, K.
GRANULARITIES = {
    **{f"{work}-{c}x{k}": (work, c, k) for work in ("kl", "js") for c, k in ((1000, 4), (10, 3))},
    **{f"{work}-{c}": (work, c, 0) for work in ("ce", "stats") for c in (1000, 10)},
    **{f"scan-{c}x16": ("scan", c, 16) for c in (1000, 10)},
}
#: What a loss knows of the classes.
NAMES = ("mult", "add", "margin", "class_weight")


@dataclasses.dataclass(frozen=True)
class LogitsCase(Case):
    """A case of shape [tensors, rows C]: K + 1 sets of logits, or two tensors of a scan, or one."""

    @property
    def work(self) -> str:
        return GRANULARITIES[self.granularity][0]

    @property
    def steps(self) -> int:
        return GRANULARITIES[self.granularity][2]

    def data(self, device: torch.device) -> LogitsData:
        generator = torch.Generator().manual_seed(0)
        classes = GRANULARITIES[self.granularity][1]
        rows = self.shape[1] // classes

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, dtype)

        compute = compute_dtype(self.dtype)
        paired = self.work in ("kl", "js")
        z = draw(self.steps, rows, classes) if paired else draw(rows, classes)
        other = None if self.work in ("ce", "stats") else draw(rows, classes)
        y = torch.zeros(rows, dtype=torch.int64, device=device)
        if device.type != "meta":
            y = torch.randint(classes, (rows,), generator=generator).to(device)
        of_classes = tuple(draw(classes, dtype=compute).abs() + 0.5 for _ in NAMES)
        t = torch.linspace(0, 1, max(self.steps, 1), dtype=compute, device=device)
        gy = torch.ones(rows if paired else (), dtype=compute, device=device)
        return LogitsData(self, z, other, gy, y, of_classes, t)


@dataclasses.dataclass(frozen=True)
class LogitsData(Data):
    """x are logits; `scale` those that they are compared with, or move along."""

    y: Tensor
    classes: tuple[Tensor, ...]
    t: Tensor


def _bytes(case: LogitsCase, data: LogitsData) -> int:
    z, z0, y = data.x, data.scale, data.y
    if case.work in ("kl", "js"):
        js = case.work == "js"
        op, arguments = "logits_divergence", (z0, z, js)
        behind = (data.gy, z0, z, *OPS[op].fake(*arguments), js)
    elif case.work == "ce":
        op, arguments = "logits_loss", (z, y, *data.classes, 1.0, -100)
        _, weight, norm = OPS[op].fake(*arguments)
        behind = (weight, z, y, *data.classes[:3], norm, 1.0)
    elif case.work == "stats":
        return OPS["logits_stats"].bytes_moved(z, y, -100)
    else:
        return OPS["logits_scan"].bytes_moved(z0, z, y, data.t, -100)
    moved = OPS[op].bytes_moved(*arguments)
    return moved + (OPS[f"{op}_bwd"].bytes_moved(*behind) if case.passes == "both" else 0)


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = tuple(GRANULARITIES),
    passes: Sequence[str] = ("both",),
) -> Iterator[LogitsCase]:
    """One case per type, size, work and pass; statistics and scans have a forward pass alone."""
    for dtype in dtypes:
        for size in sizes:
            for name in granularities:
                work, classes, k = GRANULARITIES[name]
                tensors = {"kl": k + 1, "js": k + 1, "scan": 2}.get(work, 1)
                rows = max(1, size // (tensors * classes))
                for which in passes if work in ("kl", "js", "ce") else ("forward",):
                    case = LogitsCase("logits", (tensors, rows * classes), dtype, which, None, name, 0)
                    yield dataclasses.replace(case, bytes=_bytes(case, case.data(torch.device("meta"))))
