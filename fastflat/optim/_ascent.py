# SPDX-License-Identifier: Apache-2.0
"""Which parameters an ascent moves, and where their weights are kept meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from fastflat.memory import in_huge_pages
from fastflat.optim import _tensors
from fastflat.optim._plans import Ordered

STORAGES = ("backup", "swap", "master")


class Storage:
    """Where the weights of each parameter are kept during a second pass: one place a parameter, whoever is perturbed.

    Attributes:
        backup: bytes of the weights, None with masters or swapped parameters alone.
        place: where in the backup those of a parameter begin.
        others: the other memory of each parameter that is swapped.
    """

    def __init__(self, params: list[Tensor], kind: str, has_master: Callable[[Tensor], bool], device: torch.device):
        own = [p for p in params if not has_master(p)]
        self.kind = kind
        self.backup: Tensor | None = None
        self.place: dict[Tensor, int] = {}
        self.others: dict[Tensor, Tensor] = {}
        if kind != "swap" and own:
            at, size = _tensors.places([_tensors.local(p) for p in own])
            self.backup = in_huge_pages(torch.empty(max(size, 1), dtype=torch.uint8, device=device))
            self.place = dict(zip(own, at, strict=True))

    def other(self, p: Tensor) -> Tensor:
        if p not in self.others:
            self.others[p] = in_huge_pages(torch.empty_like(p, requires_grad=False))
        return self.others[p]


class AscentPlan(Ordered):
    """The perturbed parameters, in an order: those with a master first.

    Attributes:
        halves: whether weights in 16 bits are moved themselves.
        backup: that of the storage; ``place`` says where in it the weights of a parameter begin.
    """

    def __init__(
        self,
        members: list[tuple[Tensor, int]],
        chosen: list[int],
        storage: Storage,
        has_master: Callable[[Tensor], bool],
    ):
        super().__init__(members, sorted(chosen, key=lambda i: not has_master(members[i][0])))
        self._masters = sum(has_master(p) for p in self.params)
        own = self.params[self._masters :]
        self.halves = any(_tensors.local(p).dtype in _tensors.HALVES for p in own)
        self.backup = storage.backup
        self.place = {p: storage.place[p] for p in own if p in storage.place}
        self._at = list(self.place.values())
        self._others = [storage.other(p) for p in own] if storage.kind == "swap" else None
        self._originals: list[Tensor] | None = None
        self._rho: tuple[list[float], Tensor] | None = None
        self._kept_masters: dict[Tensor, Tensor] = {}

    def weights(self, weights_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """What the kernels read: masters, then the parameters themselves."""
        if not self._masters and not self.sharded:
            return self.params
        first = [_tensors.local(weights_of(p)) for p in self.params[: self._masters]]
        rest = self.params[self._masters :]
        return [*first, *(map(_tensors.local, rest) if self.sharded else rest)]

    def radii(self, of_groups: list[float], device: torch.device) -> Tensor:
        """The radius of each parameter, fp64 on the device; sent there when one has changed."""
        if self._rho is None or self._rho[0] != of_groups:
            each = torch.tensor([of_groups[g] for g in self.groups], dtype=torch.float64)
            if self._rho is None:
                self._rho = (of_groups, each.to(device))
            else:
                self._rho[1].copy_(each)
                self._rho = (of_groups, self._rho[1])
        return self._rho[1]

    def rise(
        self,
        kernels: SimpleNamespace,
        ws: list[Tensor],
        grads: list[Tensor],
        given: list[Tensor],
        scale: Tensor,
        metrics: list[int],
        eta: float,
        state: Tensor | None,
    ) -> None:
        """Adds the perturbations; `given` are the gradients as the kernels take them."""
        m = self._masters
        self._kept_masters = dict(zip(self.params[:m], ws[:m], strict=True))
        of_masters, of_rest = (metrics, metrics) if len(metrics) == 1 else (metrics[:m], metrics[m:])
        if m:
            copies = [_tensors.local(p) for p in self.params[:m]]
            gs = grads[:m] if m < len(ws) else grads
            lists = _tensors.all_or_none(
                (ws[:m], self.weights_of(kernels, ws[:m])),
                (gs, given if gs is grads else self.gradients_of(kernels, gs)),
                (copies, self.weights_of(kernels, copies)),
            )
            kernels.sharpness_ascent_(*lists, None, [], scale[:m], of_masters, eta, None)
        if m == len(ws):
            return
        own, gs = (ws[m:], grads[m:]) if m else (ws, grads)
        others = self._others or []
        lists = _tensors.all_or_none(
            (own, self.weights_of(kernels, own, m)),
            (gs, self.gradients_of(kernels, gs, m) if m else given),
            (others, self.states_of(kernels, others, m)),
        )
        kept = (None, []) if self._others else (self.backup, self._at)
        kernels.sharpness_ascent_(*lists, *kept, scale[m : len(ws)], of_rest, eta, state)
        if not self._others:
            return
        self._originals = [p.data for p in self.params[m:]]
        for p, other in zip(self.params[m:], self._others, strict=True):
            p.data = other

    def point_back(self) -> None:
        """Swapped parameters point to their own memory again."""
        if self._originals is not None:
            for p, original in zip(self.params[self._masters :], self._originals, strict=True):
                p.data = original
            self._originals = None

    def put_back(self, params: list[Tensor]) -> None:
        """The weights of these before the ascent."""
        for p in params:
            w = _tensors.local(p)
            if p in self._kept_masters:
                w.copy_(self._kept_masters[p])
            elif self.backup is not None:
                w.copy_(_tensors.kept(self.backup, self.place[p], w))

    def share_not_moved(self) -> float:
        """The share of the weights in 16 bits that the ascent left where they were, of those with a gradient."""
        stayed = count = 0
        for t, p in enumerate(self.params[self._masters :]):
            w = _tensors.local(p)
            if w.dtype not in _tensors.HALVES:
                continue
            before = self._originals[t] if self._originals is not None else _tensors.kept(self.backup, self._at[t], w)
            moving = _tensors.local(p.grad) != 0
            stayed += ((w == before) & moving).sum()
            count += moving.sum()
        return float(stayed) / max(float(count), 1.0)
