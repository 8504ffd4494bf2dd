# SPDX-License-Identifier: Apache-2.0
"""The weight_norms family through the emulated kernels: how :mod:`emulated` hands weights over."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57


class WeightNormsOps:
    """Contiguous tensors whose storage starts on 16 bytes."""

    def weight_norms_saturate(self, w, alpha) -> Tensor:
        y = torch.full_like(w, 7.0)
        addresses = [t.data_ptr() for t in (w, alpha, y)]
        self._check(self.module.weight_norms_saturate(STORAGES[w.dtype], w.numel(), *addresses, STREAM))
        return y
