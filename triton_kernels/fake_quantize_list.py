# SPDX-License-Identifier: Apache-2.0
"""``fake_quantize_list`` and its backward: maps of many tensors in a launch for each form that the kernels are compiled
for, sums of each tensor by the launches of :mod:`_sums`.

A row of the table of tensors (:mod:`_multi`) has addresses, layout of the scales and grid. While a CUDA graph is
captured, tensors are launched one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _sums
from ._common import program
from ._integer_grid import limits
from ._launch import OPTIONS, Scales
from ._multi import TYPES, aligned, captured, chunks, pointer, table
from .fake_quantize import _fake_quantize_block, _pass_block, fake_quantize, fake_quantize_bwd

#: Columns of a row of the table of tensors.
_COLUMNS = tl.constexpr(11)


@triton.jit
def _fake_quantize_list_kernel(
    tensors, chunks, BACKWARD: tl.constexpr, RULES: tl.constexpr, HAS_ZERO: tl.constexpr, X: tl.constexpr,
    Y: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y of x or, for BACKWARD, gx of gy and x; one program a chunk."""
    pid = program(True)
    row = tensors + tl.load(chunks + 2 * pid) * _COLUMNS
    start = tl.load(chunks + 2 * pid + 1)
    n, inner, channels = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    if not WIDE:
        start, n, inner, channels = start.to(tl.int32), n.to(tl.int32), inner.to(tl.int32), channels.to(tl.int32)
    start = tl.multiple_of(start, 16)
    x_ptr, y_ptr = pointer(row, 0, X), pointer(row, 1, Y)
    scale_ptr, zero_ptr = tl.load(row + 3).to(tl.pointer_type(C)), tl.load(row + 4).to(tl.pointer_type(C))
    grid = limits(tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), C)
    span = (start, n, inner, channels)
    if BACKWARD:
        gx_ptr = pointer(row, 2, X)
        if start + BLOCK <= n:
            _pass_block(gx_ptr, y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, False)
        else:
            _pass_block(gx_ptr, y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, True)
    elif start + BLOCK <= n:
        _fake_quantize_block(y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, False)
    else:
        _fake_quantize_block(y_ptr, x_ptr, scale_ptr, zero_ptr, span, grid, RULES, HAS_ZERO, BLOCK, RUN, True)


class _Maps:
    """Maps waiting to be launched, by the form of their kernel."""

    def __init__(self, backward: bool) -> None:
        self.backward = backward
        self.forms: dict[tuple, list] = {}
        self.alive: list[torch.Tensor] = []  # what the tables point at, until the launches are queued

    def add(self, x, y, gx, scale, zero, axis, group, qmin, qmax, eps, rules) -> None:
        if x.numel() == 0:
            return
        scales, block = Scales.of(x, axis, group), _launch.block(x)
        scale_, zero_ = _launch.parameters(scale, zero)
        form = (x.dtype, y.dtype, scale_.dtype, rules, zero is not None, block, scales.run(block), _launch.wide(x))
        addresses = [t.data_ptr() for t in (x, y, gx, scale_, zero_)]
        row = [*addresses, x.numel(), scales.inner, scales.channels, qmin, qmax, _launch.bits(eps)]
        self.forms.setdefault(form, []).append(row)
        self.alive += [x, y, gx, scale_, zero_]

    def launch(self) -> None:
        for (x, y, c, rules, has_zero, block, run, wide), rows in self.forms.items():
            device = self.alive[0].device
            programs, _ = chunks(tuple(row[5] for row in rows), block, device)
            with _launch.on_device(self.alive[0]):
                _fake_quantize_list_kernel[(len(programs),)](
                    table(rows, device), programs, self.backward, rules, has_zero, TYPES[x], TYPES[y], TYPES[c],
                    block, run, wide, **OPTIONS,
                )  # fmt: skip


def fake_quantize_list(
    xs: list[torch.Tensor],
    scales: list[torch.Tensor],
    zero_points: list[torch.Tensor | None],
    qmin: list[int],
    qmax: list[int],
    axis: list[int],
    group: list[int],
    eps: list[float],
    rules: list[int],
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    zeros = zero_points or [None] * len(xs)
    if captured(xs):
        calls = zip(xs, scales, zeros, qmin, qmax, axis, group, eps, rules, strict=True)
        return [fake_quantize(*call, dtype) for call in calls]
    maps, ys = _Maps(False), []
    for x, *call in zip(xs, scales, zeros, axis, group, qmin, qmax, eps, rules, strict=True):
        x = aligned(_launch.dense(x, call[3]))
        ys.append(torch.empty_like(x, dtype=dtype))
        maps.add(x, ys[-1], ys[-1], *call)
    maps.launch()
    return ys


def fake_quantize_list_bwd(
    gys: list[torch.Tensor],
    xs: list[torch.Tensor],
    scales: list[torch.Tensor],
    zero_points: list[torch.Tensor | None],
    qmin: list[int],
    qmax: list[int],
    axis: list[int],
    group: list[int],
    eps: list[float],
    rules: list[int],
    factor: list[float],
    need_scale: list[int],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    zeros = zero_points or [None] * len(xs)
    maps, gxs, gss, gzs = _Maps(True), [], [], []
    one_by_one = captured(xs)
    calls = zip(xs, gys, scales, zeros, axis, group, qmin, qmax, eps, rules, strict=True)
    for i, (x, gy, scale, zero, *call) in enumerate(calls):
        x = aligned(_launch.dense(x, group[i]))
        gy = aligned(_launch.like(gy, x))
        gxs.append(torch.empty_like(x))
        need_zero = need_scale[i] and zero is not None
        gss.append(
            torch.zeros_like(scale, memory_format=torch.contiguous_format) if need_scale[i] else scale.new_empty(0)
        )
        gzs.append(torch.zeros_like(gss[i]) if need_zero else scale.new_empty(0))
        if not need_scale[i] and one_by_one:
            grid = (qmin[i], qmax[i], axis[i], group[i], eps[i], rules[i])
            gxs[i] = fake_quantize_bwd(gy, x, scale, zero, *grid, factor[i], False)[0]
        elif not need_scale[i]:
            maps.add(x, gy, gxs[i], scale, zero, *call)
        elif x.numel():
            shared = (*_launch.parameters(scale, zero), qmin[i], qmax[i], _launch.bits(eps[i]))
            of = Scales.of(x, axis[i], group[i])
            with _launch.on_device(x):
                _sums.backward(
                    gxs[i], gss[i], gzs[i], gy, x, shared, of, _launch.bits(factor[i]), rules[i], zero is not None
                )
    maps.launch()
    any_zero = any(need and zero is not None for need, zero in zip(need_scale, zeros, strict=True))
    return gxs, gss if any(need_scale) else [], gzs if any_zero else []
