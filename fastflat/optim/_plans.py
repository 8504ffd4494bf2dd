# SPDX-License-Identifier: Apache-2.0
"""What stays the same from step to step: the order of the parameters, their states and tables."""

from __future__ import annotations

import dataclasses

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

    def take(self, of_all: list) -> list[Tensor]:
        """These tensors out of a list with one for each parameter of the optimizer."""
        chosen = of_all if self.whole else [of_all[i] for i in self.order]
        return [_tensors.local(t) for t in chosen] if self.sharded else chosen


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
