# SPDX-License-Identifier: Apache-2.0
"""Histograms of data that come in batches and on ranks: bounded memory, and the same counts whatever the order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Most and fewest bins on each side of zero for a scale, and the most counts of all scales together.
HALF, _LEAST, _COUNTS = 2**15, 2**10, 2**22

#: Elements that are put into bins at once: bounds the temporary memory.
_CHUNK = 2**22

#: Exponents that keep the width of a bin a normal number of fp64.
_LOWEST = -1022


class Histogram:
    """Counts of x in ``2 half`` bins, one row for each scale; bin j holds ``[(j - half) w, (j - half + 1) w)``.

    The width is a power of two, ``w = 2**exponent[r]``, the least with ``max|x| < half w``. A larger value doubles
    it and merges neighbouring bins, which moves no element across an edge: the counts depend on the data alone and not
    on their batches, the order or the rank they came on. Values are known to w, which is at most ``2 max|x| / half``:
    6e-5 of the extreme for one scale, 2e-3 where thousands of scales share the memory (32 MiB at most).

    Attributes:
        counts: ``[scales, 2 half]`` int64.
        exponent: ``[scales]`` int64.
    """

    def __init__(self, scales: int, device: torch.device | str) -> None:
        half = HALF
        while half > _LEAST and 2 * half * scales > _COUNTS:
            half //= 2
        self.half = half
        self.counts = torch.zeros(scales, 2 * half, dtype=torch.int64, device=device)
        self.exponent = torch.full((scales,), _LOWEST, dtype=torch.int64, device=device)

    @property
    def width(self) -> Tensor:
        """``[scales]`` fp64: the width of a bin, written as its bits because no library promises an exact 2**n."""
        return ((self.exponent + 1023) << 52).view(torch.float64)

    def update(self, rows: Tensor, extreme: Tensor) -> None:
        """Count ``rows`` ``[scales, n]`` (finite) whose greatest magnitudes are ``extreme`` ``[scales]``."""
        _, exponent = torch.frexp(extreme.double())
        need = (exponent.long() - (self.half.bit_length() - 1)).clamp(min=_LOWEST)
        self._grow(torch.where(extreme > 0, need, _LOWEST))
        scales = rows.shape[0]
        first = torch.arange(scales, device=rows.device).unsqueeze(1) * (2 * self.half) + self.half
        width = self.width.unsqueeze(1)
        for part in rows.split(max(_CHUNK // scales, 1), dim=1):
            bins = torch.floor(part.double() / width).long() + first
            self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _grow(self, exponent: Tensor) -> None:
        """Widen the bins to ``2**exponent`` where that is wider."""
        shift = (exponent - self.exponent).clamp(min=0, max=31)
        self.exponent = torch.maximum(self.exponent, exponent)
        if bool(shift.any()):
            bins = torch.arange(-self.half, self.half, device=shift.device)
            merged = (bins.unsqueeze(0) >> shift.unsqueeze(1)) + self.half
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, merged, self.counts)

    def combine(self, largest: Callable[[Tensor], object], total: Callable[[Tensor], object]) -> None:
        """Add up the histograms of all ranks; the callables all-reduce a tensor in place by maximum and by sum."""
        exponent = self.exponent.clone()
        largest(exponent)
        self._grow(exponent)
        total(self.counts)

    def coarse(self, half: int) -> Histogram:
        """The same with at most ``2 half`` bins a row."""
        other = Histogram.__new__(Histogram)
        factor = max(self.half // half, 1)
        other.half = self.half // factor
        other.counts = self.counts.view(len(self.counts), 2 * other.half, factor).sum(-1)
        other.exponent = self.exponent + (factor.bit_length() - 1)
        return other

    def edges(self) -> Tensor:
        """``[scales, 2 half + 1]`` fp64: where the bins begin and end."""
        bins = torch.arange(-self.half, self.half + 1, device=self.counts.device, dtype=torch.float64)
        return bins * self.width.unsqueeze(1)

    def quantile(self, share: float) -> Tensor:
        """``[scales]`` fp64: the quantile of x as :func:`exact_quantile`, within one width."""
        return (_quantile(self.counts, share) - self.half) * self.width

    def quantile_of_magnitude(self, share: float) -> Tensor:
        """The same of |x|."""
        folded = self.counts[:, self.half :] + self.counts[:, : self.half].flip(1)
        return _quantile(folded, share) * self.width


def _quantile(counts: Tensor, share: float) -> Tensor:
    """Where the quantile lies, in bins from the first edge; the elements of a bin count as spread evenly in it."""
    below = counts.cumsum(1)
    last = below[:, -1:] - 1
    rank = share * last.double()

    def place(k: Tensor) -> Tensor:
        """Where the k-th smallest element lies."""
        bins = torch.searchsorted(below, k, right=True).clamp(max=counts.shape[1] - 1)
        inside = counts.gather(1, bins)
        before = below.gather(1, bins) - inside
        return bins + (k - before + 0.5) / inside.clamp(min=1)

    low = rank.floor().long()
    first, second = place(low), place(torch.minimum(low + 1, last))
    return (first + (rank - low) * (second - first)).squeeze(1)


def exact_quantile(rows: Tensor, share: float) -> Tensor:
    """``[scales]`` fp64: the quantile of each row ``[scales, n]``, linear between order statistics as
    ``torch.quantile``, without its limit on the size."""
    count = rows.shape[-1]
    rank = share * (count - 1)
    below = int(rank)
    low = rows.kthvalue(below + 1, dim=-1).values.double()
    if below + 1 == count:
        return low
    high = rows.kthvalue(below + 2, dim=-1).values.double()
    return low + (rank - below) * (high - low)
