# SPDX-License-Identifier: Apache-2.0
"""``general_quantize`` with its backward and tangent: the maps, and the functions that launch everything.

The rules are constants of a compilation, so that each kernel holds the code of its own rules alone. Draws are made
where they are used, from the element's number in storage, and never written. The sums are in :mod:`_general_sums`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _block_scale, _general_sums, _launch
from ._common import double_from_bits, load, program, run_tile, store
from ._general_gradient import passed, scaled_by_error, tangent
from ._general_grid import DELTA, code, draws, general_limits, load_group, load_scalars, value
from ._launch import OPTIONS, Scales

#: Arguments whose values must not lead to another compilation.
_RUNTIME = ["n", "inner", "channels", "qmin", "qmax", "eps_bits", "factor_bits"]


@triton.jit
def _forward_block(
    y_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, span, grid,
    RULES: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = x_ptr.dtype.element_ty
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    group = load_group(scale_ptr, zero_ptr, index, grid, RULES, PRESENT, storage)
    x = load(x_ptr, offsets, mask, group[0].dtype, MASKED)
    xi = draws(state_ptr, span[0], offsets, x.dtype, RULES, BLOCK)
    _, d, _, _, kept = code(x, xi, group, scalars, grid, RULES, PRESENT, storage)
    store(y_ptr, offsets, value(x, d, kept, group, RULES), mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_kernel(
    y_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, nu_ptr, a_ptr, n, inner, channels, qmin, qmax, eps_bits,
    RULES: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    grid = general_limits(qmin, qmax, eps_bits, dtype, RULES)
    scalars = load_scalars(nu_ptr, a_ptr, dtype, PRESENT)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    # Whole blocks carry no mask, so that their accesses are 16 bytes wide whatever n is.
    if start + BLOCK <= n:
        _forward_block(y_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, span, grid,
                       RULES, PRESENT, BLOCK, RUN, False)  # fmt: skip
    else:
        _forward_block(y_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, span, grid,
                       RULES, PRESENT, BLOCK, RUN, True)  # fmt: skip


@triton.jit
def _tangent_block(
    y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, span, grid, factor,
    RULES: tl.constexpr, PRESENT: tl.constexpr, HAS_TX: tl.constexpr, HAS_TS: tl.constexpr, HAS_TZ: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = x_ptr.dtype.element_ty
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    group = load_group(scale_ptr, zero_ptr, index, grid, RULES, PRESENT, storage)
    x = load(x_ptr, offsets, mask, group[0].dtype, MASKED)
    xi = draws(state_ptr, span[0], offsets, x.dtype, RULES, BLOCK)
    u, d, _, m, _ = code(x, xi, group, scalars, grid, RULES, PRESENT, storage)
    # Absent tangents count as 0 and are multiplied like present ones: 0 times infinity must stay NaN.
    tx, ts, tz = tl.zeros_like(x), factor * 0.0, factor * 0.0
    if HAS_TX:
        tx = load(tx_ptr, offsets, mask, x.dtype, MASKED)
    if HAS_TS:
        ts = tl.load(ts_ptr + index) * factor
    if HAS_TZ:
        tz = tl.load(tz_ptr + index) * factor
    store(y_ptr, offsets, tangent(tx, ts, tz, u, d, m, group, RULES), mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_jvp_kernel(
    y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, nu_ptr, a_ptr, n, inner, channels,
    qmin, qmax, eps_bits, factor_bits,
    RULES: tl.constexpr, PRESENT: tl.constexpr, HAS_TX: tl.constexpr, HAS_TS: tl.constexpr, HAS_TZ: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    grid = general_limits(qmin, qmax, eps_bits, dtype, RULES)
    scalars = load_scalars(nu_ptr, a_ptr, dtype, PRESENT)
    factor = double_from_bits(factor_bits, dtype)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    if start + BLOCK <= n:
        _tangent_block(y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, span, grid,
                       factor, RULES, PRESENT, HAS_TX, HAS_TS, HAS_TZ, BLOCK, RUN, False)  # fmt: skip
    else:
        _tangent_block(y_ptr, tx_ptr, ts_ptr, tz_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, span, grid,
                       factor, RULES, PRESENT, HAS_TX, HAS_TS, HAS_TZ, BLOCK, RUN, True)  # fmt: skip


@triton.jit
def _pass_block(
    gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, delta, span, grid,
    RULES: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = x_ptr.dtype.element_ty
    offsets, index, mask = run_tile(span, BLOCK, RUN)
    group = load_group(scale_ptr, zero_ptr, index, grid, RULES, PRESENT, storage)
    x = load(x_ptr, offsets, mask, group[0].dtype, MASKED)
    gy = load(gy_ptr, offsets, mask, x.dtype, MASKED)
    xi = draws(state_ptr, span[0], offsets, x.dtype, RULES, BLOCK)
    _, _, e, m, _ = code(x, xi, group, scalars, grid, RULES, PRESENT, storage)
    gx, _ = scaled_by_error(passed(gy, m, group, RULES, storage), e, m, delta, PRESENT)
    store(gx_ptr, offsets, gx, mask, MASKED)


@triton.jit(do_not_specialize=_RUNTIME)
def _general_quantize_pass_kernel(
    gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, nu_ptr, a_ptr, delta_ptr, n, inner, channels,
    qmin, qmax, eps_bits,
    RULES: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The backward pass that wants no sums: a map."""
    dtype: tl.constexpr = scale_ptr.dtype.element_ty
    grid = general_limits(qmin, qmax, eps_bits, dtype, RULES)
    scalars = load_scalars(nu_ptr, a_ptr, dtype, PRESENT)
    delta = grid[2]
    if DELTA & PRESENT:
        delta = tl.load(delta_ptr).to(dtype)
    start = program(WIDE) * BLOCK
    span = (start, n, inner, channels)
    if start + BLOCK <= n:
        _pass_block(gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, delta, span, grid,
                    RULES, PRESENT, BLOCK, RUN, False)  # fmt: skip
    else:
        _pass_block(gx_ptr, gy_ptr, x_ptr, scale_ptr, zero_ptr, state_ptr, scalars, delta, span, grid,
                    RULES, PRESENT, BLOCK, RUN, True)  # fmt: skip


def _optional(scale: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[list[torch.Tensor], int]:
    """The optional tensors of a call, in the order of the bits of PRESENT, and those bits. The pointer of an absent one
    is never read: the scale stands in."""
    present = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    return [scale if t is None else t.contiguous() for t in tensors], present


def general_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    state: torch.Tensor | None,
    nu: torch.Tensor | None,
    a: torch.Tensor | None,
    qmin: int,
    qmax: int,
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
    scales, block, scale = Scales.of(x, axis, group), _launch.block(x), scale.contiguous()
    (zero, nu, a), present = _optional(scale, zero_point, nu, a)
    with _launch.on_device(x):
        _general_quantize_kernel[(triton.cdiv(x.numel(), block),)](
            _launch.raw(y), _launch.raw(x), scale, zero, scale if state is None else state, nu, a,
            x.numel(), scales.inner, scales.channels, qmin, qmax, _launch.bits(eps),
            rules, present, block, scales.run(block), _launch.wide(x), **OPTIONS,
        )  # fmt: skip
    return y


def general_quantize_bwd(
    gy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    state: torch.Tensor | None,
    nu: torch.Tensor | None,
    a: torch.Tensor | None,
    delta: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    need_scale: bool,
    need_delta: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _launch.dense(x, group)
    gy = _launch.like(gy, x)
    gx = torch.empty_like(x)
    need_delta = need_delta and delta is not None
    gs = torch.zeros_like(scale, memory_format=torch.contiguous_format) if need_scale else scale.new_empty(0)
    gz = torch.zeros_like(gs) if need_scale and zero_point is not None else scale.new_empty(0)
    gd = scale.new_zeros(()) if need_delta else scale.new_empty(0)
    if x.numel() == 0:
        return gx, gs, gz, gd
    scales, block, scale = Scales.of(x, axis, group), _launch.block(x), scale.contiguous()
    (zero, nu, a, delta), present = _optional(scale, zero_point, nu, a, delta)
    parameters = (scale, zero, scale if state is None else state, nu, a, delta)
    grid = (qmin, qmax, _launch.bits(eps))
    with _launch.on_device(x):
        if need_scale or need_delta:
            _general_sums.backward(
                (gx, gs, gz, gd), gy, x, parameters, grid, scales, _launch.bits(factor), rules, present
            )
        else:
            _general_quantize_pass_kernel[(triton.cdiv(x.numel(), block),)](
                _launch.raw(gx), _launch.raw(gy), _launch.raw(x), *parameters,
                x.numel(), scales.inner, scales.channels, *grid,
                rules, present, block, scales.run(block), _launch.wide(x), **OPTIONS,
            )  # fmt: skip
    return gx, gs, gz, gd


def general_quantize_jvp(
    tx: torch.Tensor | None,
    ts: torch.Tensor | None,
    tz: torch.Tensor | None,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    state: torch.Tensor | None,
    nu: torch.Tensor | None,
    a: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    x = _launch.dense(x, group)
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return y
    scales, block, scale = Scales.of(x, axis, group), _launch.block(x), scale.contiguous()
    (zero, nu, a), present = _optional(scale, zero_point, nu, a)
    tangents = (
        _launch.raw(x if tx is None else _launch.like(tx, x)),
        scale if ts is None else ts.contiguous(),
        scale if tz is None else tz.contiguous(),
    )
    with _launch.on_device(x):
        _general_quantize_jvp_kernel[(triton.cdiv(x.numel(), block),)](
            _launch.raw(y), *tangents, _launch.raw(x), scale, zero, scale if state is None else state, nu, a,
            x.numel(), scales.inner, scales.channels, qmin, qmax, _launch.bits(eps), _launch.bits(factor),
            rules, present, tx is not None, ts is not None, tz is not None,
            block, scales.run(block), _launch.wide(x), **OPTIONS,
        )  # fmt: skip
    return y


def general_quantize_dynamic(
    x: torch.Tensor,
    state: torch.Tensor | None,
    nu: torch.Tensor | None,
    a: torch.Tensor | None,
    outer: torch.Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = _launch.dense(x, group)
    scale = _launch.zero_scales(x, axis, group)
    if x.numel() == 0:
        with _launch.on_device(x):
            _block_scale.from_absmax(scale, outer, qmax, rules)
        return torch.empty_like(x, dtype=dtype), scale
    with _launch.on_device(x):
        _block_scale.scale_into(scale, x, Scales.of(x, axis, group), outer, qmax, rules)
    return general_quantize(x, scale, None, state, nu, a, qmin, qmax, axis, group, eps, rules, dtype), scale
