# SPDX-License-Identifier: Apache-2.0
"""What stays the same from step to step: the order of the parameters, their states and tables."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from fastflat.optim import _tensors


class Bucket:
    """Neighbouring parameters of a plan that one call of a kernel takes: the same states, places and copies."""

    def __init__(self, form: tuple, first: int, count: int):
        self.form = form
        self.rows = slice(first, first + count)
        self.states: list[list[Tensor]] = []
        self.averages: list[Tensor] = []
        self.weights: tuple[object, Weights] | None = None  # those of an ascent, which is the first


class Ordered:
    """Parameters in an order, out of all that an optimizer has: ``order`` holds their numbers."""

    def __init__(self, members: list[tuple[Tensor, int]], order: list[int]):
        self.order = order
        self.whole = order == list(range(len(members)))
        self.params = [members[i][0] for i in order]
        self.groups = [members[i][1] for i in order]
        self.sharded = any(_tensors.is_dtensor(p) for p in self.params)
        self.held = [] if self.sharded else [_tensors.Held(self.params)]
        self._tables = None if self.sharded else _tensors.Tables(self.params)

    def take(self, of_all: list) -> list[Tensor]:
        """These tensors out of a list with one for each parameter of the optimizer."""
        chosen = of_all if self.whole else [of_all[i] for i in self.order]
        return [_tensors.local(t) for t in chosen] if self.sharded else chosen

    def tables(self, kernels: SimpleNamespace) -> _tensors.Tables | None:
        """Lists as tables, for kernels that take them."""
        return self._tables if kernels.backend == "cpu" else None

    def weights_of(self, kernels: SimpleNamespace, ws: list[Tensor], first: int = 0) -> list[Tensor]:
        """Weights of the parameters from number `first` on, as the kernels take them soonest."""
        tables = self.tables(kernels)
        return ws if tables is None else tables.of_weights(ws, first)

    def states_of(self, kernels: SimpleNamespace, states: list[Tensor], first: int = 0) -> list[Tensor]:
        """The same of states."""
        tables = self.tables(kernels)
        return states if tables is None else tables.of_states(states, first)

    def gradients_of(self, kernels: SimpleNamespace, grads: list[Tensor], first: int = 0) -> list[Tensor]:
        """The same of gradients; those of the parameters' own weights must have been asked for before."""
        tables = self.tables(kernels)
        return grads if tables is None else tables.of_gradients(grads, first)

    def before_of(self, kernels: SimpleNamespace, weights: Weights, first: int) -> list[Tensor]:
        """The same of the weights before an ascent."""
        tables = self.tables(kernels)
        if weights.backup is None or tables is None:
            return weights.before()
        return tables.of_backup(weights.backup, weights.at, weights.ws, first) or weights.before()


class Plan(Ordered):
    """What stays the same while the same parameters have gradients: their buckets, and the row of numbers of each."""

    def __init__(self, members: list[tuple[Tensor, int]], order: list[int], buckets: list[Bucket], group: Tensor):
        super().__init__(members, order)
        self.buckets, self.group = buckets, group
        self.index = None if self.whole else torch.tensor(order, dtype=torch.int64, device=group.device)
        for b in buckets:
            self.held += [_tensors.Held(tensors) for tensors in (*b.states, b.averages)]


@dataclasses.dataclass
class Weights:
    """The weights of a bucket as a descent kernel takes them: ``ws`` take the new values, ``outs`` their copies in 16
    bits; the values before lie in the backup, or are ws."""

    ws: list[Tensor]
    outs: list[Tensor] = dataclasses.field(default_factory=list)
    backup: Tensor | None = None
    at: list[int] = dataclasses.field(default_factory=list)

    def before(self) -> list[Tensor]:
        if self.backup is None:
            return self.ws
        return [_tensors.kept(self.backup, at, w) for at, w in zip(self.at, self.ws, strict=True)]
