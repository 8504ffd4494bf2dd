# SPDX-License-Identifier: Apache-2.0
"""The inputs family through the emulated kernels: how :mod:`emulated` hands batches over."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57


class InputsOps:
    """Contiguous tensors, at any address."""

    def inputs_noise(self, x, state, K, law, most, keep) -> tuple[Tensor, Tensor]:
        samples = len(x)
        noisy = torch.full((K, *x.shape), 7.0, dtype=x.dtype)
        sigma = torch.full((K, samples), 7.0)
        addresses = [t.data_ptr() for t in (x, state, noisy, sigma)]
        sizes = (K, samples, x.numel() // max(samples, 1))
        self._check(self.module.inputs_noise(STORAGES[x.dtype], *sizes, law, most, keep, *addresses, STREAM))
        return noisy, sigma
