# SPDX-License-Identifier: Apache-2.0
"""``mixquant`` with its tangent: the maps, and the functions that launch everything. What adds over the elements of a
scale is in :mod:`_mixed_sums`.

The number of candidates is a constant of compilation (as the next power of two, the rest with weight 0), what they are
is read on the device: nothing about them reaches the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _mixed_sums
from ._common import load, program, run_tile, store
from ._launch import Scales
from ._mixture import candidate, epsilon, passed, term, weighted

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["n", "inner", "channels", "candidates", "eps_bits"]


@triton.jit
def _mixquant_block(
    y_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, span, candidates, eps,
    RULES: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    x = load(x_ptr, offsets, mask, eps.dtype, MASKED)
    y = tl.zeros_like(x)
    for j in tl.static_range(MOST):
        s, grid, w = candidate(scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, index, span[3], j, candidates, eps)
        value, _, _ = term(x, s, grid, RULES)
        part = weighted(value, w)
        y = part if j == 0 else y + part
    store(y_ptr, offsets, y, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _mixquant_kernel(
    y_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, n, inner, channels, candidates, eps_bits,
    RULES: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    eps = epsilon(eps_bits, scale_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    # Whole blocks carry no mask, so that their accesses are 16 bytes wide whatever n is.
    if start + BLOCK <= n:
        _mixquant_block(y_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, span, candidates, eps,
                        RULES, MOST, BLOCK, RUN, False)  # fmt: skip
    else:
        _mixquant_block(y_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, span, candidates, eps,
                        RULES, MOST, BLOCK, RUN, True)  # fmt: skip


@triton.jit
def _tangent_block(
    y_ptr, tx_ptr, ts_ptr, tw_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, factor_ptr, span, candidates, eps,
    RULES: tl.constexpr, MOST: tl.constexpr, HAS_TX: tl.constexpr, HAS_TS: tl.constexpr, HAS_TW: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    x = load(x_ptr, offsets, mask, eps.dtype, MASKED)
    passing, rest = tl.zeros_like(x), tl.zeros_like(x)
    for j in tl.static_range(MOST):
        s, grid, w = candidate(scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, index, span[3], j, candidates, eps)
        value, by_scale, m = term(x, s, grid, RULES)
        passing += tl.where(m, w, 0.0)
        present = j < candidates
        # Absent tangents count as 0, and terms with a factor of 0 are left out.
        ts, tw = eps * 0.0, eps * 0.0
        if HAS_TS:
            f = tl.load(factor_ptr + j, mask=present, other=0.0)
            ts = tl.load(ts_ptr + tl.where(present, j, 0).to(index.dtype) * span[3] + index) * (w * f)
        if HAS_TW:
            tw = tl.load(tw_ptr + j, mask=present, other=0.0)
        part = weighted(by_scale, ts)
        rest = (part if j == 0 else rest + part) + weighted(value, tw)
    through = tl.zeros_like(x)
    if HAS_TX:
        through = load(tx_ptr, offsets, mask, eps.dtype, MASKED)
    store(y_ptr, offsets, passed(through, passing) + rest, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _mixquant_jvp_kernel(
    y_ptr, tx_ptr, ts_ptr, tw_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, factor_ptr,
    n, inner, channels, candidates, eps_bits,
    RULES: tl.constexpr, MOST: tl.constexpr, HAS_TX: tl.constexpr, HAS_TS: tl.constexpr, HAS_TW: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    eps = epsilon(eps_bits, scale_ptr.dtype.element_ty)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    if start + BLOCK <= n:
        _tangent_block(y_ptr, tx_ptr, ts_ptr, tw_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, factor_ptr,
                       span, candidates, eps, RULES, MOST, HAS_TX, HAS_TS, HAS_TW, BLOCK, RUN, False)  # fmt: skip
    else:
        _tangent_block(y_ptr, tx_ptr, ts_ptr, tw_ptr, x_ptr, scale_ptr, qmin_ptr, qmax_ptr, weight_ptr, factor_ptr,
                       span, candidates, eps, RULES, MOST, HAS_TX, HAS_TS, HAS_TW, BLOCK, RUN, True)  # fmt: skip


def mixquant(
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: torch.Tensor,
    qmax: torch.Tensor,
    weight: torch.Tensor,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    x = _launch.dense(x, group)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        scales, block, most = Scales.of(x, axis, group), _launch.block(x), triton.next_power_of_2(len(weight))
        with _launch.on_device(x):
            _mixquant_kernel[(triton.cdiv(x.numel(), block),)](
                _launch.raw(y), _launch.raw(x), *_contiguous(scale, qmin, qmax, weight),
                x.numel(), scales.inner, scales.channels, len(weight), _launch.bits(eps),
                rules, most, block, scales.run(block), _launch.wide(x), **_mixed_sums.options(most),
            )  # fmt: skip
    return y


def mixquant_bwd(
    gy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: torch.Tensor,
    qmax: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    axis: int,
    group: int,
    eps: float,
    rules: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _launch.dense(x, group)
    gy = _launch.like(gy, x)
    gx = torch.empty_like(x)
    gs = torch.zeros_like(scale, memory_format=torch.contiguous_format)
    gw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if x.numel():
        with _launch.on_device(x):
            parameters = _contiguous(scale, qmin, qmax, weight, factor)
            _mixed_sums.backward(gx, gs, gw, gy, x, parameters, Scales.of(x, axis, group), _launch.bits(eps), rules)
    return gx, gs, gw


def mixquant_jvp(
    tx: torch.Tensor | None,
    ts: torch.Tensor | None,
    tw: torch.Tensor | None,
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: torch.Tensor,
    qmax: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    x = _launch.dense(x, group)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return y
    scales, block, most = Scales.of(x, axis, group), _launch.block(x), triton.next_power_of_2(len(weight))
    parameters = _contiguous(scale, qmin, qmax, weight, factor)
    # The pointer of an absent tangent is never read: any tensor stands in.
    tangents = (
        _launch.raw(x if tx is None else _launch.like(tx, x)),
        parameters[0] if ts is None else ts.contiguous(),
        parameters[0] if tw is None else tw.contiguous(),
    )
    with _launch.on_device(x):
        _mixquant_jvp_kernel[(triton.cdiv(x.numel(), block),)](
            _launch.raw(y), *tangents, _launch.raw(x), *parameters,
            x.numel(), scales.inner, scales.channels, len(weight), _launch.bits(eps),
            rules, most, tx is not None, ts is not None, tw is not None,
            block, scales.run(block), _launch.wide(x), **_mixed_sums.options(most),
        )  # fmt: skip
    return y


def _contiguous(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.contiguous() for t in tensors)
