# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization of many tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.autograd import fake_quantize_list as rule
from fastflat.backends import forced_backend
from fastflat.functional import _fake_quantize as single

__all__ = ["fake_quantize_list"]

#: Plans kept before they are forgotten: bounds the memory that changing lists take.
_PLANS = 64

_metadata = attrgetter("shape", "dtype", "device", "requires_grad", "layout")


class _Plan(NamedTuple):
    """A checked list. Positions are those of the list."""

    specs: tuple[QuantSpec, ...]  # kept alive: the cache knows them by identity
    fused: list[int]  # tensors that one call computes; the others need one each
    changed: list[int]  # those of them whose scale or zero-point is not yet what the kernels take
    rule: rule.ListPlan | None  # of the fused ones


_plans: dict[tuple, _Plan] = {}


def fake_quantize_list(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    specs: QuantSpec | Sequence[QuantSpec],
    zero_points: Sequence[Tensor | None] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Quantize and dequantize many tensors, such as all weights of a network, in one kernel call forward and one
    backward::

        ys[i] = fake_quantize(xs[i], scales[i], zero_points[i], spec=specs[i], dtype=dtype)

    Values and gradients have the same bits as these calls, on every backend; formulas and tie rule are theirs, see
    :func:`fake_quantize`. What the call saves is the cost of a call for each tensor, and threads that share small
    tensors. Specs with noise, stochastic rounding, another format than integers or a peer's convention
    (``spec.general``) are computed by a call each, in the order of the list. In double backward, forward mode and
    under ``torch.func`` all are. Nothing but the inputs is saved; outputs that are not used cost nothing in backward.
    The graph has one node for the list: its backward runs when the gradients of all used outputs are there, and a
    second backward through other outputs needs ``retain_graph=True`` in the first.

    Args:
        xs: tensors of any shapes and dense layouts, in float32, bfloat16, float16 or float64, mixed at will; all on one
            device.
        scales: one tensor each, shaped and typed as :func:`fake_quantize` says.
        specs: one spec each, or one for all.
        zero_points: one tensor or None each; None: no tensor has one.
        dtype: storage type of all results, to cast fp32 tensors to bfloat16 or float16 in the same pass.

    Returns:
        ys, a list as long as xs.

    Raises:
        TypeError, ValueError: lists of different lengths, tensors on different devices, or what :func:`fake_quantize`
            raises for one of the tensors; the message starts with its place, ``fastflat::fake_quantize_list[3]``.
    """
    op = "fake_quantize_list"
    if isinstance(specs, QuantSpec):
        specs = (specs,) * len(xs)
    plan = _plan(op, xs, scales, specs, zero_points, dtype)
    if _checks.VALUES_WANTED:
        for i, scale in enumerate(scales):
            _checks.scale_values(op, scale, f"scales[{i}]")
    if plan.rule is not None and len(plan.fused) == len(xs) and not plan.changed:
        return rule.fake_quantize_list(xs, scales, zero_points if plan.rule.zeros else (), plan.rule)
    return _mixed(xs, scales, specs, zero_points or [None] * len(xs), dtype, plan)


def _mixed(xs, scales, specs, zero_points, dtype, plan):
    """A list with tensors that need a call of their own, or with scales that come in another form."""
    ready, zeros = list(scales), list(zero_points)
    for i in plan.changed:
        compute = compute_dtype(xs[i].dtype)
        ready[i] = scales[i].to(compute)
        if specs[i].scale_is != "s":
            ready[i] = single.scale_value(ready[i], specs[i])
        zeros[i] = None if zeros[i] is None else zeros[i].to(compute)
    ys: list[Tensor | None] = [None] * len(xs)
    if plan.rule is not None:
        of_fused = [[column[i] for i in plan.fused] for column in (xs, ready, zeros)]
        if not plan.rule.zeros:
            of_fused[2] = []
        for i, y in zip(plan.fused, rule.fake_quantize_list(*of_fused, plan.rule), strict=True):
            ys[i] = y
    fused = set(plan.fused)
    for i, x in enumerate(xs):
        if i not in fused:
            ys[i] = single.fake_quantize(x, scales[i], zero_points[i], spec=specs[i], dtype=dtype)
    return ys


def _plan(op: str, xs, scales, specs, zero_points, dtype) -> _Plan:
    """The checked, cached description of a list; a second call with the same metadata costs one look-up."""
    if torch.compiler.is_compiling():
        return _checked_plan(op, xs, scales, specs, zero_points, dtype)
    try:
        zeros = None if zero_points is None else tuple([z if z is None else _metadata(z) for z in zero_points])
        key = (tuple(map(id, specs)), tuple(map(_metadata, xs)), tuple(map(_metadata, scales)), zeros)
        key = (*key, dtype, forced_backend())
    except (AttributeError, TypeError):  # not even lists of tensors: the checks say which
        return _checked_plan(op, xs, scales, specs, zero_points, dtype)
    plan = _plans.get(key)
    if plan is None:
        plan = _checked_plan(op, xs, scales, specs, zero_points, dtype)
        if len(_plans) >= _PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _checked_plan(op: str, xs, scales, specs, zero_points, dtype) -> _Plan:
    n = len(xs)
    for name, given in (("xs", xs), ("scales", scales), ("specs", specs), ("zero_points", zero_points)):
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            if given is not None or name != "zero_points":
                _checks.fail(op, name, "be a list", type(given))
        elif len(given) != n:
            _checks.fail(op, name, f"be as long as xs ({n})", len(given))
    zeros = zero_points or [None] * n
    fused, changed, plans, frozen = [], [], [], []
    for i, (x, scale, spec, zero) in enumerate(zip(xs, scales, specs, zeros, strict=True)):
        plan = single.checked_plan(f"{op}[{i}]", x, scale, zero, spec, dtype)
        if x.device != xs[0].device:
            hint = "; call it once for each device"
            _checks.fail(op, f"xs[{i}]", f"be on the device of xs[0] ({xs[0].device})", x.device, hint)
        if single.is_general(spec, plan):
            continue
        if not (x.requires_grad or scale.requires_grad or (zero is not None and zero.requires_grad)):
            frozen.append(len(fused))
        compute = compute_dtype(x.dtype)
        if spec.scale_is != "s" or scale.dtype != compute or (zero is not None and zero.dtype != compute):
            changed.append(i)
        fused.append(i)
        plans.append(plan)
    of_list = None
    if plans:
        of_list = rule.ListPlan(
            tuple(list(column) for column in zip(*(plan.grid for plan in plans), strict=True)),
            [plan.factor for plan in plans],
            [int(plan.trains_scale) for plan in plans],
            [zeros[i] is not None for i in fused] if any(zeros[i] is not None for i in fused) else [],
            frozen,
            dtype,
            plans[0].kernels,
            tuple(plans),
        )
    return _Plan(tuple(specs), fused, changed, of_list)
