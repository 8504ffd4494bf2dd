# SPDX-License-Identifier: Apache-2.0
"""Sums over the elements of each scale, as matrices of rows or columns (:class:`_launch.Plan`)."""

import torch
import triton
import triton.language as tl

from . import _launch
from ._common import program
from ._launch import Plan, Scales


@triton.jit
def place(chunks, WIDE: tl.constexpr):
    """The chunk and the line of tiles of this program."""
    pid = program(WIDE)
    return pid % chunks, pid // chunks


@triton.jit
def tile_of(
    tile, line, rows, width, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Rows, columns and mask of tile number `tile` of a line."""
    row = (line if BY_ROWS else tile) * ROWS + tl.arange(0, ROWS)
    column = (tile if BY_ROWS else line) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def store_sums(
    part_ptr, sums, chunk, chunks, line, rows, width, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The sums of this program's rows, or of its columns."""
    if BY_ROWS:
        row = line * ROWS + tl.arange(0, ROWS)
        tl.store(part_ptr + row * chunks + chunk, tl.sum(sums, 1), mask=row < rows)
    else:
        column = line * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(part_ptr + chunk * width + column, tl.sum(sums, 0), mask=column < width)


class Sums:
    """One sum a scale, in double: the plan, what kernels take of it, and the end."""

    def __init__(self, scales: Scales, x: torch.Tensor, *others: torch.Tensor) -> None:
        self.channels, self.device = scales.channels, x.device
        self.plan = plan = Plan.of(scales, _launch.vector(x, *others), _launch.block(x))
        self.grid = plan.grid
        self.layout = (plan.rows, plan.columns // plan.align, plan.steps, plan.chunks)
        self.tile = (plan.by_rows, plan.tile_rows, plan.tile_columns, plan.align, _launch.wide(x))

    def partials(self) -> torch.Tensor:
        """Room for what the programs leave."""
        return torch.empty(self.plan.partials, dtype=torch.float64, device=self.device)

    def join(self, partials: torch.Tensor) -> torch.Tensor:
        """The sums [channels]."""
        return partials.view(self.plan.outer, self.channels, self.plan.rest).sum((0, 2))
