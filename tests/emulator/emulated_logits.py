# SPDX-License-Identifier: Apache-2.0
"""The logits family through the emulated kernels: how :mod:`emulated` hands rows over."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57
TENSORS = ("z0", "z", "y", "mult", "add", "margin", "weight", "g", "norm", "divergence", "out0", "out", "of_row")


def _rows(z: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, 7e7, dtype=compute_dtype(z.dtype))


class LogitsOps:
    """Contiguous tensors, at any address."""

    def logits_divergence(self, z0, z, js) -> tuple[Tensor, Tensor]:
        k, r, _ = z.shape
        found = {"divergence": _rows(z, k + js, r), "norm": _rows(z, k + 1, r, 2)}
        self._logits("logits_divergence", z.shape, {"z0": z0, "z": z, **found}, js=js)
        return tuple(found.values())

    def logits_divergence_bwd(self, g, z0, z, divergence, norm, js) -> tuple[Tensor, Tensor]:
        found = {"out0": torch.full_like(z0, 7.0), "out": torch.full_like(z, 7.0)}
        given = {"g": g, "z0": z0, "z": z, "divergence": divergence, "norm": norm}
        self._logits("logits_divergence_bwd", z.shape, {**given, **found}, js=js)
        return tuple(found.values())

    def logits_loss(self, z, y, mult, add, margin, class_weight, s, ignore_index) -> tuple[Tensor, ...]:
        n = len(z)
        found = {"of_row": _rows(z, n), "out": _rows(z, n), "norm": _rows(z, n, 2)}
        given = {"z": z, "y": y, "mult": mult, "add": add, "margin": margin, "weight": class_weight}
        self._logits("logits_loss", (1, *z.shape), {**given, **found}, s=s, ignore_index=ignore_index)
        return tuple(found.values())

    def logits_loss_bwd(self, g, z, y, mult, add, margin, norm, s) -> Tensor:
        given = {"g": g, "z": z, "y": y, "mult": mult, "add": add, "margin": margin, "norm": norm}
        out = torch.full_like(z, 7.0)
        self._logits("logits_loss_bwd", (1, *z.shape), {**given, "out": out}, s=s)
        return out

    def logits_stats(self, z, y, ignore_index) -> tuple[Tensor, Tensor]:
        found = {"of_row": _rows(z, 4, len(z)), "norm": _rows(z, len(z), 2)}
        self._logits("logits_stats", (1, *z.shape), {"z": z, "y": y, **found}, ignore_index=ignore_index)
        return tuple(found.values())

    def _logits(self, op, shape, tensors, js=False, s=1.0, ignore_index=-100) -> None:
        addresses = [0 if tensors.get(name) is None else tensors[name].data_ptr() for name in TENSORS]
        storage = STORAGES[tensors["z"].dtype]
        self._check(self.module.logits(op, storage, *shape, js, s, ignore_index, addresses, STREAM))
