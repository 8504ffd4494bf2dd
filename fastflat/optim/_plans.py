# SPDX-License-Identifier: Apache-2.0
"""What stays the same from step to step: the order of the parameters, their states and tables."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastflat.optim import _tensors


class Bucket:
    """Neighbouring parameters of a plan that one call of a kernel takes: the same states, places and copies."""

    def __init__(self, form: tuple, first: int, members: list[int]):
        self.form, self.members = form, members
        self.rows = slice(first, first + len(members))
        self.states: list[list[Tensor]] = []
        self.averages: list[Tensor] = []
        self.weights: tuple[object, Weights] | None = None  # those of an ascent, which is the first


class Plan:
    """What stays the same while the same parameters have gradients: their order, states and tables."""

    def __init__(self, params: list[Tensor], order: list[int], buckets: list[Bucket], group: Tensor, whole: bool):
        self.params, self.order, self.buckets, self.group = (params, order, buckets, group)
        self.index = None if whole else torch.tensor(order, dtype=torch.int64, device=group.device)
        self.sharded = any(_tensors.is_dtensor(p) for p in params)
        self.held = [] if self.sharded else [_tensors.Held(params)]
        for b in buckets:
            self.held += [_tensors.Held(tensors) for tensors in (*b.states, b.averages)]

    def take(self, of_all: list) -> list[Tensor]:
        """The plan's tensors out of a list with one for each parameter of the optimizer."""
        chosen = of_all if self.index is None else [of_all[i] for i in self.order]
        return [_tensors.local(t) for t in chosen] if self.sharded else chosen


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
