# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the general_quantize family: rules are constants of a compilation, so a few stand for all."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops
from fastflat._spec import TINY, QuantSpec

#: Each way of drawing and the longest code of each kind of grid.
_SPECS = {
    "stochastic": QuantSpec.torch(4, rounding="stochastic"),
    "normal": QuantSpec.lsq(4, noise="normal"),
    "temper": QuantSpec.torch(4, noise="temper"),
    "bypass": QuantSpec(format="e4m3", noise="bypass"),
    "input": QuantSpec.torch(8, compute="input", through="chain", rounding="away"),
    "inverse": QuantSpec(bits=8, arithmetic="inverse", mask="absmax"),
}


def _arguments(name: str, x: torch.Tensor, axis: int, group: int) -> tuple[tuple, tuple, torch.Tensor]:
    """(x, scale), what follows them, and a scalar."""
    spec = _SPECS[name]
    scale = torch.full(_ops.scale_shape(x.shape, axis, group), 0.3, dtype=_ops.compute_dtype(x.dtype))
    scalar = torch.full((), 0.5, dtype=scale.dtype)
    zero = None if spec.symmetric else torch.ones_like(scale)
    drawn = (torch.zeros(2, dtype=torch.int64), scalar, scalar) if spec.draws else (None, None, None)
    return (x, scale, zero, *drawn), (*spec.ends, axis, group, TINY, spec.rules), scalar


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = torch.empty(shape, dtype=dtype)
    if op == "general_quantize_dynamic":  # no Triton kernels of its own
        return
    plain = place in ("tensor", "columns")
    for name in _SPECS if dtype in (torch.float32, torch.bfloat16) and plain else ("stochastic", "normal"):
        if name == "input" and dtype not in (torch.bfloat16, torch.float16):
            continue
        tensors, grid, scalar = _arguments(name, x, axis, group)
        _, scale, zero, *_ = tensors
        if op == "general_quantize":
            yield *tensors, *grid
        elif op == "general_quantize_bwd":
            delta = scalar if name == "stochastic" else None
            yield x, *tensors, delta, *grid, 0.5, True, delta is not None
            if plain:
                yield x, *tensors, delta, *grid, 0.5, False, False
        elif op == "general_quantize_jvp":
            if plain:
                yield x, scale, zero, *tensors, *grid, 0.5
        else:
            raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    tensors, grid, scalar = _arguments("stochastic", x, axis, group)
    if op == "general_quantize":
        yield (*tensors, *grid), 2
    elif op == "general_quantize_bwd":
        yield (x, *tensors, scalar, *grid, 1.0, True, True), 3
    elif op == "general_quantize_jvp":
        yield (x, tensors[1], None, *tensors, *grid, 1.0), 3
