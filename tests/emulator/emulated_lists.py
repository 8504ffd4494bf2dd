# SPDX-License-Identifier: Apache-2.0
"""The families over lists of tensors through the emulated kernels: how :mod:`emulated` hands lists over."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STREAM = 0x57

SUM_GRADIENT = 0


class Kept:
    """The bytes of a tensor like w inside a backup."""

    def __init__(self, backup: Tensor, at: int, w: Tensor) -> None:
        self.address, self.dtype = backup.data_ptr() + at, w.dtype

    def data_ptr(self) -> int:
        return self.address


def described(streams: tuple, size: int, first: int = 0, option: int = 0) -> tuple:
    """What a kernel is told of one tensor; None is a stream that it has not."""
    addresses = tuple(0 if s is None else s.data_ptr() for s in streams)
    types = tuple(0 if s is None else STORAGES[s.dtype] for s in streams)
    return addresses, types, size, first, option


def of_each(values: list[int], t: int) -> int:
    return values[0] if len(values) == 1 else values[t]


def maybe(tensors: list[Tensor], t: int) -> Tensor | None:
    return tensors[t] if tensors else None


def drawn(state: Tensor | None) -> int:
    return 0 if state is None else state.data_ptr()


def numbered(ws: list[Tensor]):
    """Each tensor with its place, and the number of its first random element."""
    first = 0
    for t, w in enumerate(ws):
        yield t, w, first
        first += -(-w.numel() // 8) * 8


class ListOps:
    """Dense tensors, the partners of one in its layout."""

    def _sums(self, like: list[Tensor]) -> tuple[list[int], Tensor, Tensor]:
        """The first chunk of each tensor, room for the sums of all chunks, and for the result."""
        firsts, chunks = [], 0
        for t in like:
            firsts.append(chunks)
            chunks += self.module.list_chunks(t.numel())
        partials, sums = (torch.full((n, 3), 7e77, dtype=torch.float64) for n in (chunks, len(like)))
        return firsts, partials, sums

    def sharpness_sums(self, gs, others, kind, eta) -> Tensor:
        firsts, partials, sums = self._sums(gs)
        tensors = []
        for t, g in enumerate(gs):
            of_kind = of_each(kind, t)
            other = None if of_kind == SUM_GRADIENT else others[t]
            tensors.append(described((g, other), g.numel(), firsts[t], of_kind))
        self._check(self.module.sharpness_sums(tensors, eta, partials.data_ptr(), sums.data_ptr(), STREAM))
        return sums

    def sharpness_scale(self, sums, rho, eps, linf) -> Tensor:
        result = rho.new_full((rho.numel() + 2,), 7e77)
        counts = (len(sums), rho.data_ptr(), rho.numel(), eps, linf)
        self._check(self.module.sharpness_scale(sums.data_ptr(), *counts, result.data_ptr(), STREAM))
        return result

    def sharpness_ascent_(self, ws, gs, outs, backup, at, scale, metric, eta, state=None) -> None:
        tensors = []
        for t, w, first in numbered(ws):
            kept = None if backup is None else Kept(backup, at[t], w)
            streams = (w, gs[t], maybe(outs, t), kept)
            tensors.append(described(streams, w.numel(), first, of_each(metric, t)))
        self._check(self.module.sharpness_ascent(tensors, scale.data_ptr(), eta, drawn(state), STREAM))

    def descent_rows_(self, hyper, group, steps, mix, of_gradients, of_weights, rule) -> Tensor:
        rows = hyper.new_full((len(group), 16), 7e77)
        sources = (hyper, group, steps, mix, of_gradients, of_weights)
        addresses = (0 if s is None else s.data_ptr() for s in sources)
        self._check(self.module.descent_rows(*addresses, len(group), rule, rows.data_ptr(), STREAM))
        return rows

    def descent_sgd_(self, ws, outs, backup, at, gs, firsts, momenta, averages, rows, state=None) -> None:
        tensors = self._steps(ws, outs, backup, at, gs, firsts, momenta, [], [], averages)
        self._check(self.module.descent_sgd(tensors, rows.data_ptr(), drawn(state), STREAM))

    def descent_adam_(
        self, ws, outs, backup, at, gs, firsts, means, squares, largest, averages, rows, padam, state=None
    ) -> None:
        tensors = self._steps(ws, outs, backup, at, gs, firsts, means, squares, largest, averages)
        self._check(self.module.descent_adam(tensors, rows.data_ptr(), padam, drawn(state), STREAM))

    def descent_lamb_moments_(self, ws, backup, at, gs, firsts, means, squares, rows) -> Tensor:
        firsts_of, partials, sums = self._sums(ws)
        tensors = self._steps(ws, [], backup, at, gs, firsts, means, squares, [], [])
        tensors = [(*tensor[:3], first, 0) for tensor, first in zip(tensors, firsts_of, strict=True)]
        results = (rows.data_ptr(), partials.data_ptr(), sums.data_ptr())
        self._check(self.module.descent_lamb_moments(tensors, *results, STREAM))
        return sums

    def descent_lamb_(self, ws, outs, backup, at, means, squares, averages, rows, sums, state=None) -> None:
        tensors = self._steps(ws, outs, backup, at, [], [], means, squares, [], averages)
        self._check(self.module.descent_lamb(tensors, rows.data_ptr(), sums.data_ptr(), drawn(state), STREAM))

    @staticmethod
    def _steps(ws, outs, backup, at, gs, firsts, means, squares, largest, averages) -> list[tuple]:
        tensors = []
        for t, w, first in numbered(ws):
            source = w if backup is None else Kept(backup, at[t], w)
            lists = (outs, gs, firsts, means, squares, largest, averages)
            streams = (source, w, *(maybe(of_stream, t) for of_stream in lists))
            tensors.append(described(streams, w.numel(), first))
        return tensors
