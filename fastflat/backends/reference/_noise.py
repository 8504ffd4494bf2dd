# SPDX-License-Identifier: Apache-2.0
"""The random draws of ``csrc/math/philox.h`` and ``noise.h``, the same bits on any device and without a host sync.

``state`` is an int64 tensor ``[seed, offset]`` on the device where the draws are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.backends.reference import _elementary

_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words from four counter words and two key words, all in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap in int64; their bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def words(state: Tensor, blocks: int, first: int = 0) -> tuple[Tensor, ...]:
    """The four words, int64 ``[blocks]`` each, of the blocks from number `first` on."""
    seed, offset = state.unbind()
    block = torch.arange(first, first + blocks, dtype=torch.int64, device=state.device)
    counter = (block & _LOW, (block >> 32) & _LOW, offset & _LOW, (offset >> 32) & _LOW)
    return philox(counter, (seed & _LOW, (seed >> 32) & _LOW))


def uniform(state: Tensor, numel: int, first: int = 0) -> Tensor:
    """u in (0, 1), fp32 ``[numel]``: multiples of 2^-16 moved by half a step, of the elements from `first`, a multiple
    of 8, on."""
    drawn = torch.stack(words(state, (numel + 7) // 8, first // 8), 1)
    k = torch.stack((drawn & 0xFFFF, drawn >> 16), 2).flatten()[:numel]
    return (k.to(torch.float32) + 0.5) * 2.0**-16


def centred(state: Tensor, numel: int, first: int = 0) -> Tensor:
    """xi = u - 1/2 in (-1/2, 1/2), fp32 ``[numel]``."""
    return uniform(state, numel, first) - 0.5


def normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent draws of N(0, 1/12) from two words of 32 bits in int64, by the rule of Box and Muller."""
    u = ((radius_word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    radius = _elementary.sqrt(_elementary.log_of_normal(u) * -0.16666667)
    step = ((angle_word >> 7) & 0x7FFFFF) - 0x400000
    sine, cosine = _elementary.sine_cosine((step.to(torch.float32) + 0.5) * 2.0**-23)
    swap, turned = (angle_word >> 30) & 1 == 1, angle_word >> 31 == 1
    even, odd = torch.where(swap, -sine, cosine), torch.where(swap, cosine, sine)
    return torch.where(turned, -even, even) * radius, torch.where(turned, -odd, odd) * radius


def normal(state: Tensor, numel: int, first: int = 0) -> Tensor:
    """xi ~ N(0, 1/12), fp32 ``[numel]``: the variance of :func:`centred`, of the elements from `first`, a multiple of
    4, on."""
    w0, w1, w2, w3 = words(state, (numel + 3) // 4, first // 4)
    return torch.stack((*normal_pair(w0, w1), *normal_pair(w2, w3)), 1).flatten()[:numel]
