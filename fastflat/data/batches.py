# SPDX-License-Identifier: Apache-2.0
"""Batches for training: shuffled, shifted, mirrored and normalised, all in vectorised tensor code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Iterates over (x, y): x normalised fp32 ``[B, C, H, W]``, y int64 ``[B]``, on a device.

    Args:
        x, y: uint8 images ``[N, C, H, W]`` and labels ``[N]``.
        size: images in a batch; the last one of an epoch is dropped if short when ``shuffle`` is on and it is not
            the only one.
        mean, std: of each channel of images scaled to [0, 1].
        shuffle: a new order in every epoch, drawn from torch's global generator.
        shift: largest random shift in pixels (zero padding), ``mirror``: random left-right flips.
        device: of the results.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        size: int,
        mean: Tensor,
        std: Tensor,
        *,
        shuffle: bool = False,
        shift: int = 0,
        mirror: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise ValueError(f"data: batch must be at least 1, got {size}")
        self.x, self.y = x.to(device), y.to(device)
        self.size = min(size, len(x))
        self.shuffle, self.shift, self.mirror = shuffle, shift, mirror
        self.mean = (mean * 255).view(1, -1, 1, 1).to(device)
        self.inverse = (1 / (std * 255)).view(1, -1, 1, 1).to(device)

    def __len__(self) -> int:
        full, rest = divmod(len(self.x), self.size)
        return full + (rest > 0 and not self.shuffle)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.x)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        order = order.to(self.x.device)
        for start in range(0, len(self) * self.size, self.size):
            at = order[start : start + self.size]
            yield self._images(at), self.y[at]

    def _images(self, at: Tensor) -> Tensor:
        x = self.x[at]
        if self.shift:
            x = shifted(x, torch.randint(-self.shift, self.shift + 1, (2, len(at))).to(x.device), self.shift)
        if self.mirror:
            flip = (torch.rand(len(at)) < 0.5).to(x.device)
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
        return (x.float() - self.mean) * self.inverse


def shifted(x: Tensor, by: Tensor, most: int) -> Tensor:
    """Each image of ``[B, C, H, W]`` moved by its (rows, columns) in ``by`` ``[2, B]``, at most `most`; zeros enter."""
    channels, height, width = x.shape[1:]
    padded = torch.nn.functional.pad(x, (most,) * 4).flatten(2)
    rows = torch.arange(height, device=x.device) + (most - by[0])[:, None]
    columns = torch.arange(width, device=x.device) + (most - by[1])[:, None]
    pixel = (rows[:, :, None] * (width + 2 * most) + columns[:, None, :]).flatten(1)
    return padded.gather(2, pixel[:, None].expand(-1, channels, -1)).view_as(x)
