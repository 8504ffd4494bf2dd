# SPDX-License-Identifier: Apache-2.0
"""The rows of numbers that the optimizers' steps read: ``fill_row`` of ``csrc/math/descent.h``, a lane a tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _updates
from ._common import divide, square_root
from ._launch import OPTIONS

_SGD, _ADAM, _PADAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LARS, _LAMB = tl.constexpr(3), tl.constexpr(4)
#: Columns of a group's numbers.
_HYPER = tl.constexpr(12)
#: Tensors of a program.
_BLOCK = 128


@triton.jit
def _whole_power(base, exponent):
    """base^exponent for whole exponents, by squaring: the same bits everywhere."""
    result = tl.full(base.shape, 1.0, tl.float64)
    left = tl.max(exponent, 0)
    while left > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
        left = left >> 1
    return result


@triton.jit
def _norm_ratio(trust, ww, uu, decay, eps):
    """LARS: trust |w| / (|u| + decay |w| + eps), 1 where |w| or |u| is 0."""
    w, u = square_root(ww), square_root(uu)
    ratio = divide(trust * w, u + decay * w + eps)
    return tl.where((w > 0.0) & (u > 0.0) & (trust > 0.0), ratio, 1.0)


@triton.jit(do_not_specialize=["tensors"])
def _descent_rows_kernel(
    rows, hyper, group, steps, mix, gradients, weights, tensors, RULE: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows of BLOCK tensors, one a lane, in the order of csrc/math/descent.h."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < tensors
    of = hyper + _HYPER * tl.load(group + t, mask=mask, other=0)
    lr, beta1 = tl.load(of, mask=mask, other=0.0), tl.load(of + 1, mask=mask, other=0.0)
    beta2, eps = tl.load(of + 2, mask=mask, other=0.0), tl.load(of + 3, mask=mask, other=0.0)
    decay, decoupled = tl.load(of + 4, mask=mask, other=0.0), tl.load(of + 5, mask=mask, other=0.0) != 0.0
    nesterov, partial = tl.load(of + 6, mask=mask, other=0.0) != 0.0, tl.load(of + 7, mask=mask, other=0.0)
    trust, average = tl.load(of + 8, mask=mask, other=0.0), tl.load(of + 9, mask=mask, other=0.0)
    ascend = tl.load(of + 10, mask=mask, other=0.0) != 0.0
    c1, c2, skip = tl.load(mix), tl.load(mix + 1), tl.load(mix + 2) != 0.0
    step = tl.load(steps + t, mask=mask, other=0.0) + tl.where(skip, 0.0, 1.0)
    tl.store(steps + t, step, mask=mask)
    one = tl.full([BLOCK], 1.0, tl.float64)
    sign = tl.where(ascend, -1.0, one)
    shrink = tl.where(decoupled, 1.0 - lr * decay, 1.0)
    decay = tl.where(decoupled, 0.0, decay)
    rate, root, unbias, gain, gain1 = lr, one, one, one, 1.0 - beta2
    if RULE != _SGD and RULE != _LARS:
        count = step.to(tl.int64)
        bias1 = 1.0 - _whole_power(beta1, count)
        root = square_root(1.0 - _whole_power(beta2, count))
        unbias = divide(one, bias1)
        gain1 = 1.0 - beta1
        if RULE == _ADAM:
            rate = divide(lr, bias1)
        elif RULE == _PADAM:
            rate = divide(lr * root, bias1)
            root = one
        else:
            gain = tl.where(trust == 0.0, 0.0, one)
    if RULE == _LARS:
        gg, gf = tl.load(gradients + 3 * t, mask=mask, other=0.0), tl.load(gradients + 3 * t + 1, mask=mask, other=0.0)
        ff, ww = tl.load(gradients + 3 * t + 2, mask=mask, other=0.0), tl.load(weights + 3 * t, mask=mask, other=0.0)
        uu = (c2 * c2) * gg + (2.0 * (c1 * c2)) * gf + (c1 * c1) * ff
        gain = lr * _norm_ratio(trust, ww, uu, decay, eps)
        rate = one
    flags = (
        tl.where(skip, _updates.SKIP, 0)
        + tl.where(step <= 1.0, _updates.FIRST, 0)
        + tl.where(nesterov, _updates.NESTEROV, 0)
    )
    row = rows + _updates.COLUMNS * t
    tl.store(row + _updates.C1, sign * c1, mask=mask)
    tl.store(row + _updates.C2, sign * c2, mask=mask)
    tl.store(row + _updates.RATE, rate, mask=mask)
    tl.store(row + _updates.BETA1, beta1, mask=mask)
    tl.store(row + _updates.GAIN1, gain1, mask=mask)
    tl.store(row + _updates.BETA2, beta2, mask=mask)
    tl.store(row + _updates.GAIN2, 1.0 - beta2, mask=mask)
    tl.store(row + _updates.ROOT, root, mask=mask)
    tl.store(row + _updates.UNBIAS, unbias, mask=mask)
    tl.store(row + _updates.EPS, eps, mask=mask)
    tl.store(row + _updates.DECAY, decay, mask=mask)
    tl.store(row + _updates.SHRINK, shrink, mask=mask)
    tl.store(row + _updates.POWER, 2.0 * partial, mask=mask)
    tl.store(row + _updates.GAIN, gain, mask=mask)
    tl.store(row + _updates.AVERAGE, average, mask=mask)
    tl.store(row + _updates.FLAGS, flags.to(tl.float64), mask=mask)


def make_rows(
    hyper: torch.Tensor,
    group: torch.Tensor,
    steps: torch.Tensor,
    mix: torch.Tensor,
    of_gradients: torch.Tensor | None,
    of_weights: torch.Tensor | None,
    rule: int,
) -> torch.Tensor:
    rows = hyper.new_empty((group.numel(), _updates.COLUMNS.value))
    lars = rule == _LARS.value
    sums = [of_gradients.contiguous(), of_weights.contiguous()] if lars else [rows, rows]
    counted = steps.contiguous()
    if group.numel():
        with _launch.on_device(hyper):
            _descent_rows_kernel[(triton.cdiv(group.numel(), _BLOCK),)](
                rows, hyper.contiguous(), group.contiguous(), counted, mix.contiguous(), *sums, group.numel(),
                rule, _BLOCK, **OPTIONS,
            )  # fmt: skip
        if counted is not steps:
            steps.copy_(counted)
    return rows
