# SPDX-License-Identifier: Apache-2.0
"""What is measured: one module per op family, each with ``cases(...)``."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastflat import QuantSpec

from .. import operations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

#: ``forward`` runs without autograd; ``both`` is forward and backward for a fixed cotangent.
PASSES = ("forward", "both")


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        family: op family.
        shape, dtype: of the data.
        passes: one of :data:`PASSES`.
        spec: the quantizer; None for ops that have none.
        granularity: its name in reports.
        bytes: least DRAM traffic of a call, from the op table.
    """

    family: str
    shape: tuple[int, int]
    dtype: torch.dtype
    passes: str
    spec: QuantSpec | None
    granularity: str
    bytes: int

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def operations(self) -> int:
        """Arithmetic of a call; see :mod:`..operations`."""
        return operations.of(self)

    @property
    def copied_bytes(self) -> int:
        """Traffic of a copy of the data: one read, one write."""
        return 2 * self.elements * self.dtype.itemsize

    @property
    def label(self) -> str:
        exponent = self.elements.bit_length() - 1
        return f"{self.family} 2^{exponent} {name_of(self.dtype)} {self.granularity} {self.passes}"

    def data(self, device: torch.device) -> Data:
        """Normal data and cotangent from a fixed seed, and the scale that LSQ starts with."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator)
        gy = torch.randn(self.shape, generator=generator)
        scale = None
        if self.spec is not None:
            blocks = x.view(scale_count(self.spec, self.shape), -1)
            scale = blocks.abs().mean(1) * (2 / max(self.spec.qmax, 1) ** 0.5)
            scale = scale.reshape(scale_shape(self.spec, self.shape)).to(device)
        return Data(self, x.to(device, self.dtype), scale, gy.to(device, self.dtype))


@dataclasses.dataclass(frozen=True)
class DynamicCase(Case):
    """A case whose scale comes from the data in each call."""

    def data(self, device: torch.device) -> Data:
        return dataclasses.replace(super().data(device), scale=None)


@dataclasses.dataclass(frozen=True)
class Data:
    """The tensors of a case; x and scale require gradients where the case has a backward pass."""

    case: Case
    x: Tensor
    scale: Tensor | None
    gy: Tensor

    def __post_init__(self) -> None:
        if self.case.passes == "both":
            self.x.requires_grad_()
            if self.scale is not None:
                self.scale.requires_grad_()

    @functools.cached_property
    def factor(self) -> float:
        """Factor of the scale's gradient."""
        return self.case.spec.grad_factor(self.x.numel(), self.scale.numel())


def shape_of(elements: int, group: int | None = None) -> tuple[int, int]:
    """Rows and columns like those of a weight: 64 rows, or rows of 4096 where there are more than 2^18 elements."""
    columns = min(max(elements // 64, group or 1), 4096)
    return elements // columns, columns


def scale_count(spec: QuantSpec, shape: tuple[int, int]) -> int:
    if spec.group is not None:
        return shape[0] * shape[1] // spec.group
    return 1 if spec.axis is None else shape[0]


def scale_shape(spec: QuantSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    if spec.group is not None:
        return (shape[0], shape[1] // spec.group)
    return () if spec.axis is None else (shape[0],)


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)
