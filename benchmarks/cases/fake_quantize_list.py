# SPDX-License-Identifier: Apache-2.0
"""Weights of a network, 4 bits with a learned scale each: one call for all against a call for each.

``small``: tensors of 4096 elements. ``resnet18``: the shapes of its convolutions and of its last layer, whatever sizes
are asked for. All tensors are leaves, as parameters are, and receive their gradients as ``backward()`` gives them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastflat import QuantSpec
from fastflat._ops import OPS, compute_dtype

from . import Case, Data

#: Elements of a small tensor.
LENGTH = 4096
#: The spec of each tensor.
SPEC = QuantSpec.lsq(bits=4)
GRANULARITIES = ("small", "resnet18")

#: Channels of the four stages of ResNet-18, two blocks of two convolutions each.
_STAGES = (64, 128, 256, 512)


def _resnet18() -> Iterator[tuple[int, ...]]:
    yield (64, 3, 7, 7)
    for before, now in zip((64, *_STAGES), _STAGES, strict=False):
        yield (now, before, 3, 3)
        yield from [(now, now, 3, 3)] * 3
        if before != now:
            yield (now, before, 1, 1)
    yield (1000, 512)


RESNET18 = tuple(_resnet18())


@dataclasses.dataclass(frozen=True)
class ListCase(Case):
    """A case of many tensors; `shape` is that of all their elements together.

    Attributes:
        shapes: of the tensors.
    """

    shapes: tuple[tuple[int, ...], ...] = ()

    def data(self, device: torch.device) -> ListData:
        whole = super().data(device)

        def apart(flat: Tensor) -> list[Tensor]:
            pieces = flat.detach().view(-1).split([math.prod(shape) for shape in self.shapes])
            return [piece.view(shape).clone() for piece, shape in zip(pieces, self.shapes, strict=True)]

        xs = apart(whole.x)
        starts = [(x.abs().mean(dtype=torch.float32) * (2 / SPEC.qmax**0.5)).to(compute_dtype(x.dtype)) for x in xs]
        return ListData(self, whole.x.detach(), None, whole.gy, xs, starts, apart(whole.gy))


@dataclasses.dataclass(frozen=True)
class ListData(Data):
    """The tensors of a list, their scales and cotangents; x and gy are all elements in one."""

    xs: list[Tensor]
    scales: list[Tensor]
    gys: list[Tensor]

    def __post_init__(self) -> None:
        if self.case.passes == "both":
            for leaf in itertools.chain(self.xs, self.scales):
                leaf.requires_grad_()


def cases(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    granularities: Sequence[str] = GRANULARITIES,
    passes: Sequence[str] = ("both",),
) -> Iterator[Case]:
    """One case per type, size and pass; a size is that of all tensors together."""
    for dtype in dtypes:
        for granularity in granularities:
            lists = [RESNET18]
            if granularity == "small":
                lists = [((min(size, LENGTH),),) * max(size // LENGTH, 1) for size in sizes]
            for shapes in lists:
                forward, backward = traffic(shapes, dtype)
                shape = (1, sum(map(math.prod, shapes)))
                for which in passes:
                    total = forward + backward if which == "both" else forward
                    yield ListCase("fake_quantize_list", shape, dtype, which, None, granularity, total, shapes)


def traffic(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that forward and backward must move: the op table's, which reads the arguments' sizes only."""
    count = len(shapes)
    xs = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    scales = [torch.empty((), dtype=compute_dtype(dtype), device="meta")] * count
    grids = [[value] * count for value in (SPEC.qmin, SPEC.qmax, -1, 0, SPEC.eps, SPEC.rules)]
    forward = OPS["fake_quantize_list"].bytes_moved(xs, scales, [], *grids)
    return forward, OPS["fake_quantize_list_bwd"].bytes_moved(xs, xs, scales, [], *grids, [1.0] * count, [1] * count)
