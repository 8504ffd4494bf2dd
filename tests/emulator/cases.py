# SPDX-License-Identifier: Apache-2.0
"""Inputs for the emulated kernels: layouts that reach every regime, data with every special value, all rules."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import RULES, TINY


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape, where its scales are, and the regime of the backward that it is there for."""

    shape: tuple[int, ...]
    axis: int = -1
    group: int = 0
    channels_last: bool = False

    def __str__(self) -> str:
        scales = f"group{self.group}" if self.group else f"axis{self.axis}"
        return "x".join(map(str, self.shape)) + f"-{scales}" + ("-channels_last" if self.channels_last else "")


LAYOUTS = [
    # one scale: empty, shorter than a pack, around packs, blocks and chunks
    *(Layout((n,)) for n in (0, 1, 3, 4, 5, 8, 9, 17, 1023, 1024, 1025, 2047, 4099, 8193, 16385, 40003)),
    Layout((3, 5, 7)),
    Layout(()),
    # channel first: one run a channel
    Layout((1, 9), axis=0),
    Layout((5, 3, 3, 3), axis=0),
    Layout((7, 129), axis=0),
    Layout((3, 2049), axis=0),
    Layout((2, 8200), axis=0),
    Layout((2, 20011), axis=0),
    Layout((9,), axis=0),
    # channel in the middle: runs of one channel that come back
    Layout((2, 6, 5, 5), axis=1),
    Layout((2, 16, 8, 8), axis=1),
    Layout((33, 5, 3), axis=1),
    Layout((16, 8, 7, 7), axis=1),
    Layout((3, 4, 33, 33), axis=1),
    Layout((2, 3, 1500), axis=1),
    Layout((300, 3, 9), axis=1),
    Layout((4, 2, 4100), axis=1),
    # channel last: neighbours have different scales
    Layout((9, 5), axis=1),
    Layout((300, 3), axis=1),
    Layout((100, 64), axis=1),
    Layout((17, 1025), axis=1),
    Layout((40, 2048), axis=1),
    Layout((2, 5, 3, 4), axis=1, channels_last=True),
    Layout((3, 16, 9, 9), axis=1, channels_last=True),
    Layout((0, 5), axis=1),
    Layout((5, 0), axis=0),
    # groups along the last axis
    Layout((4, 32), group=16),
    Layout((6, 96), group=32),
    Layout((3, 33), group=11),
    Layout((5, 7), group=1),
    Layout((2, 5000), group=2500),
    Layout((3, 1024), group=1024),
    Layout((0, 32), group=16),
]

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]

LSQ = 0
TORCH = RULES["reciprocal"] | RULES["mask_after"] | RULES["nan_qmin"] | RULES["inf_qmin"] | RULES["positive_zero"]
INSIDE = RULES["zero_inside"] | RULES["zero_float"]
RULE_SETS = [LSQ, TORCH, INSIDE, RULES["zero_inside"] | RULES["mask_none"], TORCH | RULES["zero_inside"]]


def special_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, info.tiny, -info.tiny, info.smallest_normal / 2]
    values += [info.max, info.min, 0.5, 1.5, -0.5, -1.5, 2.5, 0.25, 1e-3]
    return torch.tensor(values, dtype=dtype)


def data(layout: Layout, dtype: torch.dtype, seed: int, special: bool = True) -> Tensor:
    """Values over a few grid widths; with `special`, every tenth is one that quantizers get wrong."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(layout.shape, generator=g, dtype=torch.float64) * 3).to(dtype)
    if special and x.numel():
        flat = x.view(-1)
        values = special_values(dtype)
        at = torch.randperm(flat.numel(), generator=g)[: max(1, flat.numel() // 10)]
        flat[at] = values[torch.randint(len(values), at.shape, generator=g)]
    return x.contiguous(memory_format=torch.channels_last) if layout.channels_last else x


def parameters(layout: Layout, dtype: torch.dtype, seed: int, zero: bool) -> tuple[Tensor, Tensor | None]:
    """Scales (one of them below eps, one exactly a power of two) and, with `zero`, fractional zero-points."""
    g = torch.Generator().manual_seed(seed + 1)
    shape, compute = scale_shape(torch.Size(layout.shape), layout.axis, layout.group), compute_dtype(dtype)
    scale = torch.rand(shape, generator=g, dtype=compute) * 0.8 + 0.1
    if scale.numel() > 2:
        scale.view(-1)[0], scale.view(-1)[1] = 0.5, -1.0
    zero_point = torch.randn(shape, generator=g, dtype=compute) * 4 if zero else None
    return scale, zero_point


def grid(layout: Layout, rules: int, bits: int = 4, signed: bool = True) -> tuple:
    """qmin, qmax, axis, group, eps, rules of the raw ops."""
    qmin, qmax = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return qmin, qmax, layout.axis, layout.group, TINY, rules


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values with equal signs of zero, any NaN equal to any NaN; and equal dtype, shape, strides."""
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.view(integer) == b.view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())


def sum_over_scale(t: Tensor, layout: Layout) -> Tensor:
    """Sum of t over the elements of each scale, in fp64."""
    t = t.double()
    if layout.group:
        return t.unflatten(-1, (t.shape[-1] // layout.group, layout.group)).sum(-1)
    if layout.axis < 0:
        return t.sum()
    return t.movedim(layout.axis, 0).flatten(1).sum(1) if t.dim() > 1 else t
