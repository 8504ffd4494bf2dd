# SPDX-License-Identifier: Apache-2.0
"""What the families over lists of tensors share: results written back in their storage type."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference import _noise


class Writer:
    """Writes results of the compute type to the tensors of a list, in turn: to nearest even, or bfloat16
    stochastically with a Philox state. ``write(t, *tensors)`` belongs to one element of the list."""

    def __init__(self, state: Tensor | None):
        self._state, self._first = state, 0

    def write(self, value: Tensor, *to: Tensor) -> None:
        for tensor in to:
            if self._state is not None and tensor.dtype == torch.bfloat16:
                tensor.copy_(self._stochastic(value))
            else:
                tensor.copy_(value)

    def next(self, numel: int) -> None:
        """The draws of the tensor just written are spent."""
        self._first += -(-numel // 8) * 8

    def _stochastic(self, value: Tensor) -> Tensor:
        # Draws follow the storage; a view with the elements in that order lends its strides to the draws.
        order = torch.empty_like(value, dtype=torch.int32)
        drawn = (_noise.uniform(self._state, value.numel(), self._first) * 2.0**16 - 0.5).to(torch.int32)
        order.copy_(drawn.as_strided(value.shape, order.stride()))
        bits = value.contiguous().view(torch.int32)
        up = (order.contiguous() < (bits & 0xFFFF)).to(torch.int32)
        rounded = ((bits >> 16) + up).to(torch.int16).view(torch.bfloat16)
        special = (bits & 0x7F800000) == 0x7F800000
        return torch.where(special, value.contiguous().to(torch.bfloat16), rounded).view(value.shape)


def kept(backup: Tensor, at: int, w: Tensor) -> Tensor:
    """The place in a backup of the bytes of w, in storage order, as a tensor like w."""
    like = torch.empty_like(w)
    place = backup[at : at + w.numel() * w.element_size()].view(w.dtype)
    return place.as_strided(like.shape, like.stride(), place.storage_offset())


def of_each(values: list[int], t: int) -> int:
    """The value of tensor t in a list with one for all, or one a tensor."""
    return values[0] if len(values) == 1 else values[t]


def computed(t: Tensor) -> Tensor:
    """t in its compute type."""
    return t.to(compute_dtype(t.dtype))


def rounded(numbers: Tensor, like: Tensor) -> Tensor:
    """fp64 numbers in the compute type of `like`."""
    return numbers.to(compute_dtype(like.dtype))
