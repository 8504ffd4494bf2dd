# SPDX-License-Identifier: Apache-2.0
"""The tangents family through the emulated kernels: how :mod:`emulated` hands tangents over."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class TangentOps:
    """Contiguous tensors, at any address."""

    def tangents_combine(self, *arguments) -> Tensor:
        *tensors, kind = arguments
        t0, p0, t1, p1, f0, r0 = tensors[:6]
        tangent = t0 if t0 is not None else t1
        shape = tangent.shape if tangent is not None else (len(r0), *f0.shape)
        dtype = (tangent if tangent is not None else f0).dtype
        out = torch.full(shape, 7.0, dtype=dtype)
        of_channel = (p is not None and p.dim() == 1 for p in (p0, p1))
        rest = ([address(t) for t in tensors], out.data_ptr(), STREAM)
        call = (STORAGES[dtype], kind, self.module.Geometry(*shape[1:]), shape[0], *of_channel, *rest)
        self._check(self.module.tangents_combine(*call))
        return out

    def tangents_sums(self, t0, p0, t1, p1, mask, total) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if t0.dtype == torch.float64 else torch.float32
        count, outer, channels, inner = t0.shape
        mapped = torch.full(t0.shape if mask is not None else (0,), 7.0, dtype=t0.dtype)
        dots = torch.full((count, channels) if p0 is not None else (0,), 7e30, dtype=wide)
        totals = torch.full((count, channels) if total else (0,), 7e30, dtype=wide)
        results = (mapped.data_ptr(), dots.data_ptr() if p0 is not None else 0, totals.data_ptr() if total else 0)
        addresses = [*(address(t) for t in (t0, p0, t1, p1, mask)), *results]
        call = self.module.SumsCall(STORAGES[t0.dtype], self.module.Geometry(outer, channels, inner), count, addresses)
        partials = torch.full((2 * self.module.tangents_sums_partials(call),), 7e30, dtype=wide)
        self._check(self.module.tangents_sums(call, partials.data_ptr(), STREAM))
        return mapped, dots, totals
