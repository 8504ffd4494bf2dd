# SPDX-License-Identifier: Apache-2.0
"""What a row of the op table is, and what fake kernels and byte counts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Op:
    """One raw operator.

    Attributes:
        name: operator name inside the namespace.
        family: file stem in csrc/cpu, csrc/cuda, triton_kernels, tests/ops and benchmarks/cases.
        schema: arguments and results in the dispatcher's language.
        fake: shape, dtype and stride inference.
        bytes_moved: least DRAM traffic of a call, from the same arguments.
        doc: formula, tie rule, errors.
    """

    name: str
    family: str
    schema: str
    fake: Callable
    bytes_moved: Callable[..., int]
    doc: str


def like(x: torch.Tensor, group: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty result for x: its strides, contiguous with groups."""
    layout = torch.contiguous_format if group else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def scale_shape(shape: torch.Size, axis: int, group: int) -> tuple[int, ...]:
    """Shape of the scale tensor of data of `shape`: ``[]``, ``[C]`` or ``[..., K/group]``."""
    if group:
        return (*shape[:-1], shape[-1] // group)
    return () if axis < 0 else (shape[axis],)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the arithmetic, the scale and the zero-point for data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def size_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def out_size(x: torch.Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a result of x's shape."""
    return x.numel() * (dtype or x.dtype).itemsize
