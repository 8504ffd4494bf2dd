# SPDX-License-Identifier: Apache-2.0
"""What the launch functions share: layouts, grids, launch options. Plain Python; a grid depends on shapes only."""

from __future__ import annotations

import contextlib
import dataclasses
import struct

import torch
import triton

#: Elements of one tile: with 4 warps, 8 per thread, so one 16-byte access in 16 bits and two in 32.
BLOCK = 1024
#: Most elements of a row that the fused absmax kernel keeps in registers: 32 per thread; half in fp64.
FUSED = 4096
#: No contraction of a*b+c: the bits must be those of the other backends.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
#: Programs of a reduction: enough to fill any current GPU, few enough that the second pass is short.
PROGRAMS = 2048
#: Rows a program of the columns form sums at least, so that its partial sums are under 5 % of the traffic.
ROWS = 64
#: Offsets of 32 bits may run up to one tile beyond the end.
_NARROW_LIMIT = 2**31 - 2**16


def dense(x: torch.Tensor, group: int = 0) -> torch.Tensor:
    """x itself if its elements fill one block of memory (with `group`: in order), else a copy that does."""
    if group:
        return x.contiguous()
    # empty_like keeps the strides of dense tensors, and of those only.
    if x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride():
        return x
    return x.clone()


def like(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t (shaped like x) in the storage order of the dense tensor x."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def raw(t: torch.Tensor) -> torch.Tensor:
    """The tensor as kernels take it: bf16 as int16."""
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


def parameters(scale: torch.Tensor, zero_point: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point as kernels take them; the pointer of an absent zero-point is never read."""
    scale = scale.contiguous()
    return scale, scale if zero_point is None else zero_point.contiguous()


def vector(*tensors: torch.Tensor) -> int:
    """Elements in 16 bytes of the narrowest of the tensors."""
    return 16 // min(t.element_size() for t in tensors)


def on_device(x: torch.Tensor):
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def bits(value: float) -> int:
    """A double as the signed integer of its bits; see _common.double_from_bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def scale_shape(x: torch.Tensor, axis: int, group: int) -> tuple[int, ...]:
    """Shape of the scales of x: ``[]``, ``[C]`` or ``[..., K/group]``."""
    return (*x.shape[:-1], x.shape[-1] // group) if group else () if axis < 0 else (x.shape[axis],)


def zero_scales(x: torch.Tensor, axis: int, group: int) -> torch.Tensor:
    """A zero for each scale of x, in the arithmetic type."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_zeros(scale_shape(x, axis, group), dtype=dtype)


def wide(x: torch.Tensor) -> bool:
    """Whether offsets into x need 64 bits."""
    return x.numel() > _NARROW_LIMIT


def block(x: torch.Tensor) -> int:
    """Elements of a tile of x: half in fp64, whose values take two registers each."""
    return BLOCK // 2 if x.dtype == torch.float64 else BLOCK


@dataclasses.dataclass(frozen=True)
class Scales:
    """How scales lie over a dense tensor: storage offset o has scale ``(o // inner) % channels``."""

    outer: int
    channels: int
    inner: int

    @classmethod
    def of(cls, x: torch.Tensor, axis: int, group: int) -> Scales:
        if group:
            return cls(1, x.numel() // group, group)
        if axis < 0 or x.shape[axis] == 1:
            return cls(1, 1, x.numel())
        channels, inner = x.shape[axis], x.stride(axis)
        return cls(x.numel() // (channels * inner), channels, inner)

    def run(self, block: int) -> int:
        """Elements of a tile that share one index computation; a divisor of `inner`, three choices."""
        if self.channels == 1 or self.inner % block == 0:
            return block
        return 16 if self.inner % 16 == 0 else 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a reduction walks the data, a matrix [rows, columns] in storage order.

    ``by_rows``: a row lies within one scale; partial results are [rows, chunks] with chunks of columns.
    Otherwise a column does (the scale of column k is k // inner), and they are [chunks, columns] with chunks of rows.
    Either way they read as [outer, channels, rest]. A program takes ``steps`` tiles of [tile_rows, tile_columns].
    """

    by_rows: bool
    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    steps: int
    chunks: int
    align: int
    outer: int
    rest: int

    @classmethod
    def of(cls, scales: Scales, vector: int, block: int) -> Plan:
        """`vector`: elements of 16 bytes of the narrowest tensor; `block`: elements of a tile."""
        outer, channels, inner = scales.outer, scales.channels, scales.inner
        by_rows = outer == 1 or inner >= block or (outer < ROWS and inner >= ROWS)
        rows, columns = (outer * channels, inner) if by_rows else (outer, channels * inner)
        # Short tiles keep the columns form's loads contiguous and leave rows enough to add in registers.
        tile_columns = min(triton.next_power_of_2(columns), block if by_rows else 128)
        tile_rows = block // tile_columns
        across, along = (rows, columns) if by_rows else (columns, rows)
        tile_across, tile_along = (tile_rows, tile_columns) if by_rows else (tile_columns, tile_rows)
        tiles = triton.cdiv(along, tile_along)
        wanted = max(1, PROGRAMS // triton.cdiv(across, tile_across))
        least = 1 if by_rows else triton.cdiv(ROWS, tile_rows)
        steps = max(triton.cdiv(tiles, wanted), least)
        chunks = triton.cdiv(tiles, steps)
        align = vector if columns % vector == 0 else 1
        shape = (outer, chunks) if by_rows else (chunks, inner)
        return cls(by_rows, rows, columns, tile_rows, tile_columns, steps, chunks, align, *shape)

    @property
    def direct(self) -> bool:
        """Whether each of several rows is all of a scale and fits the tile of a program, which can finish its sum."""
        return self.by_rows and self.outer == 1 and self.chunks == self.steps == 1 and self.rows > 1

    @property
    def partials(self) -> int:
        return (self.rows if self.by_rows else self.columns) * self.chunks

    @property
    def grid(self) -> tuple[int]:
        across = triton.cdiv(*((self.rows, self.tile_rows) if self.by_rows else (self.columns, self.tile_columns)))
        return (across * self.chunks,)
