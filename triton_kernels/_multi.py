# SPDX-License-Identifier: Apache-2.0
"""What the families over lists of tensors share: tables on the device, and launches over them.

Tensors with the same storage types and the same set of streams are one form, and a form is one launch. It gets two
tables. Tensors: a row each with their numbers and addresses, written anew for each call. Chunks: the tensor and first
element of each program; a function of the sizes, cached. A single tensor needs no table, nor does any tensor while a
CUDA graph is captured: a replay would read a table that is gone.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import bfloat16_bits, narrow
from ._noise import uniform_run

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.float16, torch.float64: tl.float64}
#: Tiles of a program that leaves sums: fewer partial sums. Programs of maps take one, and need fewer registers.
STEPS = tl.constexpr(4)
#: Lanes that add up the partial sums of a tensor.
_LANES = 256


@triton.jit
def pointer(row, COLUMN: tl.constexpr, TYPE: tl.constexpr):
    """A column of a row of the table as a pointer; all storage starts on 16 bytes."""
    address = tl.load(row + COLUMN)
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def place(backup_ptr, at, like):
    """The weights that lie in a backup from byte `at`, a multiple of 64, on: a pointer like `like`."""
    return tl.multiple_of((backup_ptr + at).to(tl.pointer_type(like.dtype.element_ty), bitcast=True), 16)


@triton.jit
def extent(start, n, ELEMENTS: tl.constexpr, WIDE: tl.constexpr):
    """Where the elements of a program begin and end, at most ELEMENTS of n; in 64 bits where offsets need them."""
    if WIDE:
        start, n = start.to(tl.int64), n.to(tl.int64)
    else:
        start, n = start.to(tl.int32), n.to(tl.int32)
    return tl.multiple_of(start, 16), tl.minimum(n, start + ELEMENTS)


@triton.jit
def bfloat16_stochastic_bits(v, u):
    """fp32 to the bits of bf16, up where u is below the fraction that is cut (csrc/math/sharpness.h)."""
    bits = v.to(tl.uint32, bitcast=True)
    fraction = (bits & 0xFFFF).to(tl.int32).to(tl.float32) * 1.52587890625e-05
    rounded = (bits >> 16) + tl.where(u < fraction, 1, 0).to(tl.uint32)
    special = (bits & 0x7F800000) == 0x7F800000
    return tl.where(special, bfloat16_bits(v), rounded.to(tl.int16))


@triton.jit
def deliver(ptr, start, end, v, seed, first, SEEDED: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Write a tile in the storage type of the pointer; with SEEDED bfloat16 by the draws of the elements from `first`
    on, the number of the tensor's first one."""
    if SEEDED and ptr.dtype.element_ty == tl.int16:
        raw = bfloat16_stochastic_bits(v, uniform_run(seed, first.to(tl.int64) + start, BLOCK))
    else:
        raw = narrow(v, ptr.dtype.element_ty)
    put(ptr, start, end, raw, BLOCK, MASKED)


@triton.jit
def put(ptr, start, end, raw, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Write a tile as it is."""
    offsets = start + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(ptr + offsets, raw, mask=offsets < end)
    else:
        tl.store(ptr + offsets, raw)


@triton.jit
def fetch(ptr, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile as it is stored; 0 beyond the end."""
    offsets = start + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(ptr + offsets, mask=offsets < end, other=0)
    else:
        return tl.load(ptr + offsets)


@triton.jit
def pairs(v, BLOCK: tl.constexpr):
    """Sums of neighbours in a tile: half the registers of a running sum."""
    return tl.sum(tl.reshape(v, [BLOCK // 2, 2]), 1)


@triton.jit(do_not_specialize=["t", "count"])
def _gather_sums_kernel(
    sums, partials, tensors, firsts, t, count, COLUMNS: tl.constexpr, TABLE: tl.constexpr, LANES: tl.constexpr
):
    """The partial sums of each tensor of a form, lane by lane in their order, to its row of `sums`."""
    pid = tl.program_id(0)
    begin, end = count * 0, count
    if TABLE:
        t = tl.load(tensors + pid.to(tl.int64) * COLUMNS)
        begin, end = tl.load(firsts + pid), tl.load(firsts + pid + 1)
    lanes, columns = tl.arange(0, LANES)[:, None], tl.arange(0, 4)[None, :]
    total = tl.zeros([LANES, 4], tl.float64)
    at = begin
    while at < end:
        mask = (at + lanes < end) & (columns < 3)
        total += tl.load(partials + 3 * (at + lanes) + columns, mask=mask, other=0.0)
        at += LANES
    columns = tl.arange(0, 4)
    tl.store(sums + 3 * t + columns, tl.sum(total, 0), mask=columns < 3)


@functools.lru_cache(maxsize=64)
def chunks(sizes: tuple[int, ...], elements: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tensor, first element) of each program, [programs, 2], and the number of each tensor's first program."""
    counts = (torch.tensor(sizes) + (elements - 1)) // elements
    firsts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    of = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    starts = (torch.arange(len(of)) - firsts[of]) * elements
    return torch.stack((of, starts), 1).to(device), firsts.to(device)


def table(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    """The rows on the device; through pinned memory, so that the host does not wait."""
    made = torch.tensor(rows, dtype=torch.int64)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


def captured(ts: list[torch.Tensor]) -> bool:
    """Whether a CUDA graph is being captured on the stream of the tensors."""
    return bool(ts) and ts[0].is_cuda and torch.cuda.is_current_stream_capturing()


def aligned(t: torch.Tensor) -> torch.Tensor:
    """A dense tensor that starts on 16 bytes: t itself, or a copy."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _same_order(t: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether both have their elements in the same places; the stride of an axis of one element says nothing."""
    strides, wanted = t.stride(), like.stride()
    return strides == wanted or all(a == b for a, b, n in zip(strides, wanted, t.shape, strict=True) if n > 1)


@dataclasses.dataclass
class Group:
    """Tensors of one form, launched together: for each its numbers and its streams, the first of them its weights."""

    form: tuple
    block: int
    steps: int
    wide: bool
    entries: list[tuple[list[int], list[torch.Tensor]]]

    def __post_init__(self) -> None:
        self.anchor = self.entries[0][1][0]
        self._listed = len(self.entries) > 1
        elements = self.block * self.steps
        if self._listed:
            device = self.anchor.device
            rows = [[*numbers, *(t.data_ptr() for t in streams)] for numbers, streams in self.entries]
            self._table = table(rows, device)
            self._chunks, self._firsts = chunks(tuple(numbers[1] for numbers, _ in self.entries), elements, device)
            self.programs = len(self._chunks)
        else:
            self.programs = triton.cdiv(self.entries[0][0][1], elements)

    def launch(self, listed, single, *shared) -> None:
        """``listed(tensors, chunks, *shared, *types, *form)`` for several tensors, ``single(*streams, *numbers,
        *shared, *form)`` for one."""
        constants = (*self.form, self.block, self.wide)
        with _launch.on_device(self.anchor):
            if self._listed:
                types = [TYPES[t.dtype] for t in self.entries[0][1]]
                listed[(self.programs,)](self._table, self._chunks, *shared, *types, *constants, **_launch.OPTIONS)
            else:
                numbers, streams = self.entries[0]
                single[(self.programs,)](*map(_launch.raw, streams), *numbers, *shared, *constants, **_launch.OPTIONS)

    def launch_sums(self, sums: torch.Tensor, listed, single, *shared) -> None:
        """The same for kernels whose programs leave three numbers each, the first argument after the numbers; adds them
        up in the rows of `sums`."""
        partials = sums.new_empty((self.programs, 3))
        self.launch(listed, single, partials, *shared)
        tables = (self._table, self._firsts) if self._listed else (partials, partials)
        columns = self._table.shape[1] if self._listed else 0
        with _launch.on_device(self.anchor):
            _gather_sums_kernel[(len(self.entries),)](
                sums, partials, *tables, self.entries[0][0][0], self.programs, columns, self._listed, _LANES,
                **_launch.OPTIONS,
            )  # fmt: skip


class Work:
    """The tensors of a list, waiting for their launches by form. What kernels change and cannot reach as it lies is
    copied, and copied back by :meth:`finish`."""

    def __init__(self, ws: list[torch.Tensor]) -> None:
        self._captured = captured(ws)
        self._forms: dict[tuple, list[tuple[list[int], list[torch.Tensor]]]] = {}
        self._changed: list[tuple[torch.Tensor, torch.Tensor]] = []

    def weights(self, w: torch.Tensor, changed: bool) -> torch.Tensor:
        """w, dense and aligned."""
        return self._noted(w, aligned(_launch.dense(w)), changed)

    def partner(self, t: torch.Tensor, like: torch.Tensor, changed: bool) -> torch.Tensor:
        """t, aligned and in the storage order of the dense tensor `like`."""
        if t.data_ptr() % 16 == 0 and _same_order(t, like):
            return t
        return self._noted(t, torch.empty_like(like, dtype=t.dtype).copy_(t), changed)

    def flat(self, t: torch.Tensor, changed: bool) -> torch.Tensor:
        """A backup, aligned."""
        return self._noted(t, aligned(t), changed)

    def _noted(self, t: torch.Tensor, used: torch.Tensor, changed: bool) -> torch.Tensor:
        if changed and used is not t:
            self._changed.append((t, used))
        return used

    def add(self, numbers: list[int], streams: list[torch.Tensor], *form) -> None:
        """`numbers` begin with the place in the list and the number of elements, which is not 0; `form` are constants
        of the kernel."""
        types = tuple(t.dtype for t in streams)
        wide = _launch.wide(streams[0])
        self._forms.setdefault((types, form, wide), []).append((numbers, streams))

    def groups(self, steps: int = 1) -> list[Group]:
        """One a launch, whose programs take `steps` tiles each."""
        made = []
        for (_, form, wide), entries in self._forms.items():
            block = _launch.block(entries[0][1][0])
            parts = [[entry] for entry in entries] if self._captured else [entries]
            made += [Group(form, block, steps, wide, part) for part in parts]
        return made

    def finish(self) -> None:
        for t, used in self._changed:
            t.copy_(used)


def draws(ws: list[torch.Tensor]) -> list[int]:
    """Number of each tensor's first random element."""
    firsts, after = [], 0
    for w in ws:
        firsts.append(after)
        after += -(-w.numel() // 8) * 8
    return firsts
