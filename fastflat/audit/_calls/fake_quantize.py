# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the fake_quantize family."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops
from fastflat._spec import TINY, QuantSpec


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = torch.empty(shape, dtype=dtype)
    if op == "fake_quantize_absmax":
        yield x, -8, 7, axis, group, 1e-9, 0
        return
    scale = torch.empty(_ops.scale_shape(x.shape, axis, group), dtype=_ops.compute_dtype(dtype))
    # The heaviest form for every type, the lightest for fp32 alone: they differ by a few instructions.
    forms = [(QuantSpec.torch(4), scale)] + ([(QuantSpec.lsq(4), None)] if dtype == torch.float32 else [])
    for spec, zero in forms:
        common = (x, scale, zero, spec.qmin, spec.qmax, axis, group, spec.eps, spec.rules)
        if op == "fake_quantize":
            yield common
        elif op == "fake_quantize_bwd":
            yield (x, *common, 0.5, True)
            if place in ("tensor", "columns"):
                yield (x, *common, 0.5, False)
        elif op == "fake_quantize_jvp":
            if place in ("tensor", "columns"):
                yield (x, scale, zero, *common, 0.5)
        else:
            raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    scale = torch.full(_ops.scale_shape(x.shape, axis, group), 0.3)
    args = (x, scale, None, -8, 7, axis, group, TINY, 0)
    if op == "fake_quantize":
        yield args, 2
    elif op == "fake_quantize_bwd":
        yield (x, *args, 1.0, True), 3
    elif op == "fake_quantize_jvp":
        yield (x, scale, None, *args, 1.0), 3
    elif op == "fake_quantize_absmax":
        # Where scales span more than one program's data, the dynamic form must read twice.
        yield (x, -8, 7, axis, group, TINY, 0), 3 if place in ("tensor", "images", "columns") else 2
