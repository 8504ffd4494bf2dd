# SPDX-License-Identifier: Apache-2.0
"""Scales of block formats from the largest magnitudes: csrc/math/block_scale.h operation by operation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _absmax, _rules
from ._common import divide
from ._general_grid import format_of, on_floats
from ._launch import OPTIONS, Scales

_BLOCK = 256
_POWERS = tl.constexpr(
    _rules.SCALE_FLOOR.value | _rules.SCALE_CEIL.value | _rules.SCALE_EVEN.value | _rules.SCALE_RCEIL.value
)


@triton.jit
def _floor_log2(v):
    """Exponent of the power of two at or below v, for fp32 v >= 0; -127 below the normal numbers."""
    return (v.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127


@triton.jit
def _ceil_log2(v):
    floor = _floor_log2(v)
    rest = (v.to(tl.uint32, bitcast=True) & 0x7FFFFF) != 0
    return floor + (rest & (floor > -127)).to(tl.int32)


@triton.jit(do_not_specialize=["channels", "qmax"])
def _block_scale_kernel(
    scale_ptr, outer_ptr, channels, qmax, RULES: tl.constexpr, HAS_OUTER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Replaces the largest magnitudes by scales."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < channels
    absmax = tl.load(scale_ptr + at, mask=mask, other=0.0)
    largest = tl.full([BLOCK], 1.0, absmax.dtype) * qmax.to(absmax.dtype)
    _, _, unit = format_of(largest, RULES)
    if (_rules.MINIFLOATS | _rules.BINARY) & RULES:
        largest, _, _ = format_of(largest, RULES)
    if _rules.SCALE_E4M3 & RULES:
        outer = tl.full([BLOCK], 1.0, absmax.dtype)
        if HAS_OUTER:
            outer = outer * tl.load(outer_ptr)
        wanted = divide(divide(absmax, largest), outer)
        held = tl.where(wanted < 0.015625, 0.015625, wanted)
        held = tl.where(held > 448.0, 448.0, held)
        scale = tl.where(wanted == wanted, outer * on_floats(held, held, _rules.E4M3), wanted)
    elif _POWERS & RULES:
        a = absmax.to(tl.float32)
        top = largest.to(tl.float32)
        if _rules.SCALE_RCEIL & RULES:
            e = _ceil_log2(divide(a, top))
        elif _rules.SCALE_CEIL & RULES:
            e = _ceil_log2(a) - _floor_log2(top)
        elif _rules.SCALE_EVEN & RULES:
            # Half of the last mantissa bit that the format keeps; the carry into the exponent is the rounding.
            half = (tl.full([BLOCK], 1, tl.int32) << (22 + _floor_log2(unit.to(tl.float32)))).to(tl.uint32)
            e = _floor_log2((a.to(tl.uint32, bitcast=True) + half).to(tl.float32, bitcast=True)) - _floor_log2(top)
        else:
            e = _floor_log2(a) - _floor_log2(top)
        e = tl.minimum(tl.maximum(e, -126), 127)
        power = ((e + 127) << 23).to(tl.float32, bitcast=True).to(absmax.dtype)
        scale = tl.where(absmax == absmax, power, absmax)
    else:
        scale = divide(absmax, tl.where(largest < 1.0, 1.0, largest))
    tl.store(scale_ptr + at, scale, mask=mask)


def scale_into(
    scale: torch.Tensor, x: torch.Tensor, scales: Scales, outer: torch.Tensor | None, qmax: int, rules: int
) -> None:
    """Fill scale from all of x by the rules."""
    _absmax.scale_into(scale, x, scales, 1)  # over 1: the largest magnitudes themselves
    from_absmax(scale, outer, qmax, rules)


def from_absmax(scale: torch.Tensor, outer: torch.Tensor | None, qmax: int, rules: int) -> None:
    """Replace the largest magnitudes in scale by scales."""
    if scale.numel() == 0:
        return
    _block_scale_kernel[(triton.cdiv(scale.numel(), _BLOCK),)](
        scale, scale if outer is None else outer, scale.numel(), qmax, rules, outer is not None, _BLOCK, **OPTIONS
    )
