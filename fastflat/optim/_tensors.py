# SPDX-License-Identifier: Apache-2.0
"""Parameters as the kernels take them: local shards, one device, no shared memory, dense gradients."""

from __future__ import annotations

import array
import itertools
import operator
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastflat._ops.sharpness import ALIGNMENT
from fastflat.memory import in_huge_pages

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)


def is_dtensor(t: Tensor) -> bool:
    # A DTensor cannot exist before its module is imported, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The shard of a DTensor that lies on this rank, any other tensor itself."""
    return t._local_tensor if is_dtensor(t) else t


def fits(state: Tensor, p: Tensor) -> bool:
    """Whether a state has the shape of its parameter and, of a DTensor, lies on the same ranks in the same way."""
    if is_dtensor(p) != is_dtensor(state) or tuple(state.shape) != tuple(p.shape):
        return False
    if not is_dtensor(p):
        return True
    return (
        state.placements == p.placements
        and state.device_mesh.shape == p.device_mesh.shape
        and state._local_tensor.shape == p._local_tensor.shape
    )


def described(t: Tensor) -> str:
    """The shape of a tensor in words, of a DTensor with its ranks."""
    if not is_dtensor(t):
        return str(list(t.shape))
    return f"{list(t.shape)} over {t.device_mesh.size()} ranks, {list(t._local_tensor.shape)} here"


def check_parameters(op: str, params: Sequence[Tensor]) -> None:
    """Floating tensors of a known type on one device, no two of which share memory."""
    seen: dict[int, list[tuple[int, int]]] = {}
    device = None
    for p in params:
        if is_dtensor(p):
            p = p._local_tensor
        if p.dtype not in FLOATS:
            raise TypeError(f"{op}: parameters must be float32, float64, bfloat16 or float16, got {p.dtype}")
        if p.layout is not torch.strided:
            raise TypeError(f"{op}: parameters must be dense, got {p.layout}")
        if device is not None and p.device != device:
            raise ValueError(
                f"{op}: parameters must be on one device, got {device} and {p.device}; use one optimizer a device"
            )
        device = p.device
        if p.numel() and p.device.type != "meta":
            last = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
            start = p.storage_offset() * p.element_size()
            span = (start, start + last * p.element_size())
            seen.setdefault(p.untyped_storage().data_ptr(), []).append(span)
    for spans in seen.values():
        spans.sort()
        if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise ValueError(f"{op}: parameters must not share memory; pass a tied parameter once, not two views of it")


def check_gradients(op: str, grads: Iterable[Tensor]) -> None:
    """Dense, real gradients."""
    layouts = {g.layout for g in grads}
    if layouts - {torch.strided}:
        found = (layouts - {torch.strided}).pop()
        raise ValueError(f"{op}: gradients must be dense, got {found}; build the embedding with sparse=False")


def shares_memory(t: Tensor) -> bool:
    """Whether other tensors live in t's storage, as gradients in the buckets of DistributedDataParallel do."""
    return t.untyped_storage().nbytes() != t.numel() * t.element_size()


def zeros(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A state of p: its shape, strides and, of a DTensor, ranks."""
    state = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    in_huge_pages(local(state))
    return state.zero_()


def places(ws: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where the bytes of each tensor begin in a backup, and the size of the backup."""
    at, end = [], 0
    for w in ws:
        at.append(end)
        end += -(-w.numel() * w.element_size() // ALIGNMENT) * ALIGNMENT
    return at, end


def kept(backup: Tensor, at: int, w: Tensor) -> Tensor:
    """What a backup holds of w, as a tensor with the strides of the dense w."""
    like = torch.empty_like(w, device="meta")
    place = backup[at : at + w.numel() * w.element_size()].view(w.dtype)
    return place.as_strided(like.shape, like.stride(), place.storage_offset())


def sum_over_shards(sums: Tensor, params: Sequence[Tensor]) -> None:
    """Adds up the rows of ``sums`` [T, 3] of sharded parameters over the ranks that hold the other shards, in place."""
    rows: dict[tuple, list[int]] = {}
    for t, p in enumerate(params):
        if is_dtensor(p):
            sharded = tuple(d for d, placement in enumerate(p.placements) if placement.is_shard())
            if sharded:
                rows.setdefault((p.device_mesh, sharded), []).append(t)
    for (mesh, sharded), of_mesh in rows.items():
        whole = len(of_mesh) == len(params)
        part = sums if whole else sums[of_mesh]
        for d in sharded:
            torch.distributed.all_reduce(part, group=mesh.get_group(d))
        if not whole:
            sums[of_mesh] = part


class Held:
    """A second owner of tensors, on the C++ side. A tensor that only Python owns takes and drops the interpreter's lock
    each time a kernel's argument is built from it, which a list of a thousand notices."""

    def __init__(self, tensors: list[Tensor]):
        make = getattr(torch._C, "ScriptList", None)
        self._owner = make(tensors) if make is not None and tensors else None


#: Numbers of the storage types in a table; csrc/core/pairs.h has the same.
STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_DTYPE = operator.attrgetter("dtype")


def all_or_none(*pairs: tuple[list[Tensor], list[Tensor]]) -> list[list[Tensor]]:
    """The tables of these (list, table or the list itself), or all the lists: no call takes both, for a table knows no
    shape."""
    whole = all(table is not tensors or not tensors for tensors, table in pairs)
    return [table if whole else tensors for tensors, table in pairs]


class Tables:
    """Lists of many small CPU tensors as the compiled CPU kernels take them too: one int64 tensor ``[3, T]`` of
    addresses, numbers of elements and storage types.

    To hand over a list costs up to a microsecond a tensor, more than the arithmetic of a small one. Kernels cannot
    check an address, so what the parameters are is looked at here, anew whenever one of them has another address, and
    what may change with every gradient each time; where tensors do not qualify the list stays a list.

    Args:
        params: what the other tensors belong to, one by one.
    """

    #: Mean number of elements up to which a table pays.
    _SMALL = 32768

    def __init__(self, params: list[Tensor]):
        self._numels = [p.numel() for p in params]
        self.pays = len(params) >= 16 and sum(self._numels) <= self._SMALL * len(params)
        self._sure = False
        self._known: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
        self._states: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._templates: dict[tuple[int, int, torch.dtype], tuple[list[torch.dtype], Tensor]] = {}

    def of_weights(self, ws: list[Tensor], first: int) -> list[Tensor]:
        """The weights of the parameters from number `first` on, their copies, or other places for them."""
        if not self.pays or not ws:
            return ws
        addresses = list(map(Tensor.data_ptr, ws))
        known = self._known.get((id(ws), first))
        if known is not None and known[0] == addresses:
            return [known[1]]
        self._sure = False
        if not self._fit(ws, first):
            return ws
        if len(self._known) > 64:  # lists that did not last
            self._known.clear()
        table = self._table(addresses, list(map(_DTYPE, ws)), first)
        self._known[id(ws), first] = (addresses, table)
        return [table]

    def of_states(self, states: list[Tensor], first: int) -> list[Tensor]:
        """Tensors that nobody else has, in a list that stays: once looked at, they are what they were."""
        if not self.pays or not states:
            return states
        known = self._states.get(id(states))
        if known is None:
            known = self._states[id(states)] = (states, self.of_weights(states, first))
        return known[1]

    def of_gradients(self, grads: list[Tensor], first: int) -> list[Tensor]:
        """Gradients: they have the sizes and the device of their parameters, once those are known."""
        if not self.pays or not grads:
            return grads
        if not self._sure:
            if not self._fit(grads, first):
                return grads
            self._sure = True
        dtypes = list(map(_DTYPE, grads))
        if not all(map(Tensor.is_contiguous, grads)) or not STORAGES.keys() >= set(dtypes[:1]):
            return grads
        return [self._table(list(map(Tensor.data_ptr, grads)), dtypes, first)]

    def of_backup(self, backup: Tensor, at: list[int], ws: list[Tensor], first: int) -> list[Tensor] | None:
        """What a backup holds of the parameters from number `first` on, which are ws; None where a list must do."""
        if not self.pays or not self._fit(ws, first):
            return None
        base = backup.data_ptr()
        return [self._table([base + a for a in at], list(map(_DTYPE, ws)), first)]

    def _fit(self, tensors: list[Tensor], first: int) -> bool:
        """Whether they lie on the CPU, contiguous, each with as many elements as its parameter."""
        return (
            max(map(Tensor.get_device, tensors)) < 0
            and all(map(Tensor.is_contiguous, tensors))
            and list(map(Tensor.numel, tensors)) == self._numels[first : first + len(tensors)]
            and STORAGES.keys() >= set(map(_DTYPE, tensors))
        )

    def _table(self, addresses: list[int], dtypes: list[torch.dtype], first: int) -> Tensor:
        key = (first, len(addresses), dtypes[0])
        template = self._templates.get(key)
        if template is None or template[0] != dtypes:
            numels = self._numels[first : first + len(addresses)]
            rows = torch.tensor([addresses, numels, [STORAGES[d] for d in dtypes]], dtype=torch.int64)
            self._templates[key] = template = (dtypes, rows)
        table = template[1].clone()
        table[0].copy_(torch.frombuffer(array.array("q", addresses), dtype=torch.int64))
        return table
