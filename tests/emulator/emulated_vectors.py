# SPDX-License-Identifier: Apache-2.0
"""The vectors family through the emulated kernels: how :mod:`emulated` hands rows over."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57


def numbers(*shape: int) -> Tensor:
    return torch.full(shape, 7e77, dtype=torch.float64)


class VectorOps:
    """Contiguous tensors, at any address."""

    def vectors_dot(self, q: Tensor, w: Tensor) -> Tensor:
        call, result = self._rows(q, w), numbers(len(q), len(w))
        partials = numbers(self.module.vectors_dot_partials(call) if result.numel() else 0)
        addresses = (t.data_ptr() for t in (q, w, partials, result))
        self._check(self.module.vectors_dot(call, *addresses, STREAM))
        return result

    def vectors_subtract_(self, w: Tensor, q: Tensor, c: Tensor) -> Tensor:
        call, squares = self._rows(q, w), numbers(len(w))
        partials = numbers(self.module.vectors_subtract_partials(call))
        addresses = (t.data_ptr() for t in (w, q, c, partials, squares))
        self._check(self.module.vectors_subtract(call, *addresses, STREAM))
        return squares

    def vectors_rademacher(self, state: Tensor, k: int, n: int, dtype: torch.dtype) -> Tensor:
        result = torch.full((k, n), 7.0, dtype=dtype)
        rest = (result.numel(), result.data_ptr(), STREAM)
        self._check(self.module.vectors_rademacher(STORAGES[dtype], state.data_ptr(), *rest))
        return result

    def vectors_quadratic(self, v: Tensor, hv: Tensor, starts: list[int]) -> Tensor:
        segments, chunks, n = [], 0, v.shape[1]
        types = (STORAGES[v.dtype], STORAGES[hv.dtype])
        for k in range(len(v)):
            for begin, end in itertools.pairwise(starts):
                addresses = tuple(t.data_ptr() + (k * n + begin) * t.element_size() for t in (v, hv))
                segments.append((addresses, types, end - begin, chunks, 0))
                chunks += self.module.list_chunks(end - begin)
        partials, result = numbers(chunks), numbers(len(v), len(starts) - 1)
        if segments:
            addresses = (partials.data_ptr(), result.data_ptr())
            self._check(self.module.vectors_quadratic(*types, segments, *addresses, STREAM))
        return result

    def _rows(self, q: Tensor, w: Tensor):
        return self.module.RowsCall(STORAGES[q.dtype], STORAGES[w.dtype], len(q), *w.shape)
