# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the general_quantize family: rules are constants of a compilation, so a few stand for all."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops
from fastflat._spec import RULES, TINY, QuantSpec

#: Each way of drawing and the longest code of each kind of grid.
_SPECS = {
    "stochastic": QuantSpec.torch(4, rounding="stochastic"),
    "normal": QuantSpec.lsq(4, noise="normal"),
    "temper": QuantSpec.torch(4, noise="temper"),
    "bypass": QuantSpec(format="e4m3", noise="bypass"),
    "input": QuantSpec.torch(8, compute="input", through="chain", rounding="away"),
    "pact": QuantSpec.lsq(4, estimator="pact"),
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


def _names(op: str, place: str, dtype: torch.dtype) -> list[str]:
    """The specs compiled for an op: all of them for fp32 data under one scale, few elsewhere."""
    if place == "tensor" and dtype == torch.float32:
        return [name for name in _SPECS if name not in ("input", "pact")]
    if op == "general_quantize_jvp":
        return []
    if place == "tensor" and dtype == torch.bfloat16:
        return ["stochastic", "input"]
    return ["stochastic", "normal"] if place == "columns" and dtype == torch.float32 else ["stochastic"]


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    x = torch.empty(shape, dtype=dtype)
    if op == "general_quantize_dynamic":
        yield from _dynamic(x, axis, group) if place == "groups" else ()
        return
    for name in _names(op, place, dtype):
        tensors, grid, scalar = _arguments(name, x, axis, group)
        _, scale, zero, *_ = tensors
        # EWGS goes with the draws that leave the most to keep.
        delta = scalar if name == "stochastic" else None
        if op == "general_quantize":
            yield *tensors, *grid
        elif op == "general_quantize_bwd":
            yield x, *tensors, delta, *grid, 0.5, True, delta is not None
            if place == "tensor":
                yield x, *tensors, delta, *grid, 0.5, False, False
        elif op == "general_quantize_jvp":
            yield x, scale, zero, *tensors, *grid, 0.5
        else:
            raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def _dynamic(x: torch.Tensor, axis: int, group: int) -> Iterator[tuple]:
    """A rule of powers of two, and e4m3 scales over an outer one."""
    for rule, outer in (("even", None), ("e4m3", torch.ones((), dtype=_ops.compute_dtype(x.dtype)))):
        spec = QuantSpec(format="e2m1", scale_rule=rule)
        yield x, None, None, None, outer, *spec.ends, axis, group, TINY, spec.rules | RULES[f"scale_{rule}"]


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, int]]:
    # Draws move nothing and are slow to make without a GPU: one place has them.
    tensors, grid, scalar = _arguments("stochastic" if place == "tensor" else "pact", x, axis, group)
    if op == "general_quantize":
        yield (*tensors, *grid), 2
    elif op == "general_quantize_bwd":
        yield (x, *tensors, scalar, *grid, 1.0, True, True), 3
    elif op == "general_quantize_jvp":
        yield (x, tensors[1], None, *tensors, *grid, 1.0), 3
