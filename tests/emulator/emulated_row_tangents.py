# SPDX-License-Identifier: Apache-2.0
"""The row_tangents family through the emulated kernels: how :mod:`emulated` hands rows over."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57
INPUTS = ("x", "g", "along_weight", "along_bias", "normal", "grad", "weight", "of_row", "mean", "scale")


class RowTangentOps:
    """Contiguous tensors, at any address."""

    def row_tangents_norm(self, x, normal, inv, weight, along_weight, along_bias, centered) -> tuple[Tensor, ...]:
        k = next(len(t) for t in (x, along_weight, along_bias) if t is not None)
        statistics = [torch.full((k, len(normal)), 7e7, dtype=compute_dtype(normal.dtype)) for _ in range(2)]
        tensors = {"x": x, "of_row": inv, "weight": weight, "along_weight": along_weight, "along_bias": along_bias}
        return self._row_tangents("row_tangents_norm", k, centered, normal, tensors, statistics), *statistics

    def row_tangents_norm_bwd(self, g, x, mean, scale, along_weight, normal, grad, inv, weight, centered) -> Tensor:
        k = next(len(t) for t in (g, x, mean, scale, along_weight) if t is not None)
        tensors = {"g": g, "x": x, "mean": mean, "scale": scale, "along_weight": along_weight}
        tensors |= {"grad": grad, "of_row": inv, "weight": weight}
        return self._row_tangents("row_tangents_norm_bwd", k, centered, normal, tensors)

    def row_tangents_softmax(self, t, p, scale, log) -> Tensor:
        return self._row_tangents("row_tangents_softmax", len(t), log, p, {"x": t, "of_row": scale})

    def row_tangents_softmax_bwd(self, g, along, p, grad) -> Tensor:
        k = len(g if along is None else along)
        return self._row_tangents("row_tangents_softmax_bwd", k, False, p, {"g": g, "x": along, "grad": grad})

    def _row_tangents(self, op, k, option, normal, tensors, statistics=(None, None)) -> Tensor:
        out = torch.full((k, *normal.shape), 7.0, dtype=normal.dtype)
        tensors = {**tensors, "normal": normal}
        every = [*(tensors.get(name) for name in INPUTS), out, *statistics]
        addresses = [0 if t is None else t.data_ptr() for t in every]
        storage = STORAGES[normal.dtype]
        self._check(self.module.row_tangents(op, storage, k, *normal.shape, option, addresses, STREAM))
        return out
