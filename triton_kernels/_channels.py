# SPDX-License-Identifier: Apache-2.0
"""Kernels whose programs stay within one channel: a tile of its elements, a partial sum of each."""

import torch
import triton
import triton.language as tl

from ._launch import BLOCK, Scales


@triton.jit
def channel_tile(count, inner, channels, chunks, BLOCK: tl.constexpr):
    """Channel, storage offsets and mask of this program's tile of the `count` elements of a channel."""
    pid = tl.program_id(0).to(tl.int64)
    channel = pid // chunks
    element = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    return channel, (element // inner) * (channels * inner) + channel * inner + element % inner, element < count


def grid_of(scales: Scales) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """The grid, and (count, inner, channels, chunks) as kernels take them."""
    count = scales.outer * scales.inner
    chunks = triton.cdiv(count, BLOCK)
    return (scales.channels * chunks,), (count, scales.inner, scales.channels, chunks)


def partials(x: torch.Tensor, layout: tuple[int, int, int, int]) -> torch.Tensor:
    """Room for a sum a program, in double; added up along the last axis they are the sums of the channels."""
    return torch.empty((layout[2], layout[3]), dtype=torch.float64, device=x.device)
