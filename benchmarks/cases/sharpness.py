# SPDX-License-Identifier: Apache-2.0
"""Steps of sharpness-aware minimisation over the parameters of a network, without its forward and backward passes.

``resnet18``, ``resnet50``, ``vit_b``: the shapes of all their parameters. ``small``: 1,000 tensors of 1,000 elements.
In bf16 the optimizers keep an fp32 master of each parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat._ops import OPS

from . import Case

Shapes = tuple[tuple[int, ...], ...]


def _norm(width: int) -> Iterator[tuple[int, ...]]:
    yield from [(width,)] * 2


def _resnet(blocks: Sequence[int], bottleneck: bool) -> Iterator[tuple[int, ...]]:
    yield (64, 3, 7, 7)
    yield from _norm(64)
    before = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                kernels = [(width, before, 1, 1), (width, width, 3, 3), (out, width, 1, 1)]
            else:
                kernels = [(width, before, 3, 3), (width, width, 3, 3)]
            for kernel in kernels:
                yield kernel
                yield from _norm(kernel[0])
            if block == 0 and before != out:
                yield (out, before, 1, 1)
                yield from _norm(out)
            before = out
    yield (1000, before)
    yield (1000,)


def _vit_b() -> Iterator[tuple[int, ...]]:
    width, layers = 768, 12
    yield from [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    for _ in range(layers):
        yield from _norm(width)
        yield from [(3 * width, width), (3 * width,), (width, width), (width,)]
        yield from _norm(width)
        yield from [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    yield from _norm(width)
    yield from [(1000, width), (1000,)]


LISTS: dict[str, Shapes] = {
    "resnet18": tuple(_resnet((2, 2, 2, 2), False)),
    "resnet50": tuple(_resnet((3, 4, 6, 3), True)),
    "vit_b": tuple(_vit_b()),
    "small": ((1000,),) * 1000,
}


@dataclasses.dataclass(frozen=True)
class StepCase(Case):
    """A case of an optimizer's step.

    Attributes:
        shapes: of the parameters.
        base: the base optimizer.
    """

    shapes: Shapes = ()
    base: str = "sgd"

    @property
    def label(self) -> str:
        return f"{self.family} {self.granularity}"

    def data(self, device: torch.device) -> StepData:
        generator = torch.Generator().manual_seed(0)

        def draw(size: float) -> list[Tensor]:
            drawn = (torch.randn(shape, generator=generator) * size for shape in self.shapes)
            return [x.to(device, self.dtype) for x in drawn]

        flat = torch.zeros(self.elements, dtype=self.dtype, device=device)
        return StepData(self, flat, draw(0.05), draw(1e-3), draw(1e-3))


@dataclasses.dataclass(frozen=True)
class StepData:
    """Initial weights, gradients of both passes; x has as many elements as all of them, for the copy."""

    case: StepCase
    x: Tensor
    weights: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(w.clone()) for w in self.weights]


def cases(
    lists: Sequence[str] = tuple(LISTS),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    bases: Sequence[str] = ("sgd", "adamw"),
    family: str = "sharpness",
) -> Iterator[StepCase]:
    for name in lists:
        for dtype in dtypes:
            for base in bases:
                shapes = LISTS[name]
                total = traffic(shapes, dtype, base, family == "sharpness")
                shape = (1, sum(map(math.prod, shapes)))
                yield StepCase(family, shape, dtype, "step", None, f"{name} {base}", total, shapes, base)


def traffic(shapes: Shapes, dtype: torch.dtype, base: str, two_passes: bool) -> int:
    """Least bytes of a step, by the op table: with two passes, those of storage 'swap' (16 bits: 'master')."""
    master = dtype.itemsize < 4
    ws = [torch.empty(shape, dtype=torch.float32 if master else dtype, device="meta") for shape in shapes]
    gs = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    outs = gs if master else []
    rows = torch.empty((len(ws), 16), dtype=torch.float64, device="meta")
    total = 0
    if two_passes:
        total += OPS["sharpness_sums"].bytes_moved(gs, [], [0], 0.0)
        total += OPS["sharpness_ascent_"].bytes_moved(ws, gs, outs or ws, None, [], rows, [0], 0.0)
    kept = (ws, outs, None, [])
    if base == "lars":
        total += OPS["sharpness_sums"].bytes_moved(gs, [], [0], 0.0) + OPS["sharpness_sums"].bytes_moved(
            ws, [], [0], 0.0
        )
    if base in ("sgd", "lars"):
        return total + OPS["descent_sgd_"].bytes_moved(*kept, gs, [], ws, [], rows)
    if base == "lamb":
        total += OPS["descent_lamb_moments_"].bytes_moved(ws, None, [], gs, [], ws, ws, rows)
        return total + OPS["descent_lamb_"].bytes_moved(*kept, ws, ws, [], rows, rows)
    largest = ws if base == "padam" else []
    return total + OPS["descent_adam_"].bytes_moved(*kept, gs, [], ws, ws, largest, [], rows, base == "padam")
