# SPDX-License-Identifier: Apache-2.0
"""What a second forward pass must not do twice: move statistics, draw other random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Randomness:
    """The states of the generators that a pass draws from: the CPU's and, for a model on a GPU, that device's."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def put_back(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu, self._device)


@contextlib.contextmanager
def buffers_kept(model: nn.Module | None) -> Iterator[None]:
    """Every buffer of the model has, after the block, the value it had before: running statistics of normalisation
    layers of any class, their counters, ranges that observers follow."""
    if model is None:
        yield
        return
    buffers = [b for b in model.buffers() if b.numel()]
    before = [b.detach().clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            # Not every layer that writes a buffer counts its version up.
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
