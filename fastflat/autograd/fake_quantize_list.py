# SPDX-License-Identifier: Apache-2.0
"""Derivatives of fake-quantization of a list: one node and one kernel call each way for all tensors.

The rule of each tensor is that of :mod:`fastflat.autograd.fake_quantize`, whose Functions compute what the list has no
form of its own for: second order, forward mode and torch.func.
"""

from __future__ import annotations

from itertools import compress
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.autograd import fake_quantize as single
from fastflat.autograd._modes import below_autograd, is_batched_cotangent, transformed


class ListPlan(NamedTuple):
    """Everything about a call for a list that is not a tensor; sequences have an entry for each tensor."""

    grids: tuple[list, ...]  # qmin, qmax, axis, group, eps, rules
    factors: list[float]
    trains_scale: list[int]
    zeros: list[bool]  # where there is a zero-point; empty: nowhere
    frozen: list[int]  # tensors of which nothing requires a gradient
    dtype: torch.dtype | None
    kernels: SimpleNamespace
    plans: tuple[single.Plan, ...]

    def only(self, chosen: list[bool]) -> ListPlan:
        """The plan of the tensors that are chosen."""

        def cut(column):
            return list(compress(column, chosen))

        return self._replace(
            grids=tuple(map(cut, self.grids)),
            factors=cut(self.factors),
            trains_scale=cut(self.trains_scale),
            zeros=cut(self.zeros),
            plans=tuple(compress(self.plans, chosen)),
        )


class PlainList(Function):
    """ys of eager reverse mode. The tensors come flat: xs, scales, then the zero-points that there are."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        xs, scales, zero_points = split(plan, tensors)
        with below_autograd():
            ys = plan.kernels.fake_quantize_list(xs, scales, zero_points, *plan.grids, plan.dtype)
        if plan.frozen:
            ctx.mark_non_differentiable(*(ys[i] for i in plan.frozen))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *gys):
        xs, scales, zero_points = split(ctx.plan, ctx.saved_tensors)
        found = _gradients(gys, xs, scales, zero_points, ctx.plan)
        return None, *join(ctx.plan, *found)


class CompiledList(Function):
    """ys as torch.compile traces them, forward and one backward."""

    @staticmethod
    def forward(ctx, grids, factors, trains_scale, zeros, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.rest = (grids, factors, trains_scale, zeros)
        xs, scales, zero_points = _split(len(factors), zeros, tensors)
        return tuple(torch.ops.fastflat.fake_quantize_list(xs, scales, zero_points, *grids, dtype))

    @staticmethod
    def backward(ctx, *gys):
        grids, factors, trains_scale, zeros = ctx.rest
        n = len(factors)
        xs, scales, zero_points = _split(n, zeros, ctx.saved_tensors)
        gxs, gss, gzs = torch.ops.fastflat.fake_quantize_list_bwd(
            list(gys), xs, scales, zero_points, *grids, factors, trains_scale
        )
        gss = [gss[i] if trains_scale[i] else None for i in range(n)]
        gzs = [gzs[i] if trains_scale[i] else None for i in range(n) if zeros and zeros[i]]
        return None, None, None, None, None, *gxs, *gss, *gzs


def fake_quantize_list(
    xs: list[Tensor], scales: list[Tensor], zero_points: list[Tensor | None], plan: ListPlan
) -> list[Tensor]:
    """ys by what the mode in force needs; zero_points is empty where no tensor has one."""
    if torch.compiler.is_compiling():
        tensors = join(plan, xs, scales, zero_points)
        return list(CompiledList.apply(plan.grids, plan.factors, plan.trains_scale, plan.zeros, plan.dtype, *tensors))
    if transformed() or plan.kernels.backend == "dispatched":  # a trace shows each tensor's call
        zeros = zero_points or [None] * len(xs)
        calls = zip(xs, scales, zeros, plan.plans, strict=True)
        return [single.fake_quantize(*call) for call in calls]
    if len(plan.frozen) == len(xs) or not torch.is_grad_enabled():
        with below_autograd():
            return plan.kernels.fake_quantize_list(xs, scales, zero_points, *plan.grids, plan.dtype)
    return list(PlainList.apply(plan, *join(plan, xs, scales, zero_points)))


def split(plan: ListPlan, tensors: tuple) -> tuple[list, list, list]:
    """xs, scales and zero-points of the tensors of a Function."""
    return _split(len(plan.plans), plan.zeros, tensors)


def _split(n: int, zeros: list[bool], tensors: tuple) -> tuple[list, list, list]:
    given = iter(tensors[2 * n :])
    zero_points = [next(given) if zero else None for zero in zeros]
    return list(tensors[:n]), list(tensors[n : 2 * n]), zero_points


def join(plan: ListPlan, xs: list, scales: list, zero_points: list) -> list:
    """The arguments of a Function, or their gradients."""
    return [*xs, *scales, *compress(zero_points, plan.zeros)]


def _gradients(gys, xs, scales, zero_points, plan):
    """Gradients of xs, scales and zero-points as a backward returns them, with None for what has none."""
    n = len(xs)
    if torch.is_grad_enabled() or transformed() or any(is_batched_cotangent(g) for g in gys if g is not None):
        zeros = zero_points or [None] * n
        calls = zip(gys, xs, scales, zeros, plan.plans, strict=True)
        found = [(None,) * 3 if call[0] is None else single.gradients(*call)[:3] for call in calls]
        return [list(column) for column in zip(*found, strict=True)]
    used = [g is not None for g in gys]
    if not all(used):
        return _of_used(used, gys, xs, scales, zero_points, plan)
    with below_autograd():
        gxs, gss, gzs = plan.kernels.fake_quantize_list_bwd(
            list(gys), xs, scales, zero_points, *plan.grids, plan.factors, plan.trains_scale
        )
    return gxs, _trained(gss, plan), _trained(gzs, plan)


def _of_used(used, gys, xs, scales, zero_points, plan):
    """The same where some outputs have no cotangent: their tensors take no part."""
    if not any(used):
        return [[None] * len(used)] * 3
    of_used = [list(compress(column, used)) for column in (gys, xs, scales, zero_points)]
    found = [iter(column) for column in _gradients(*of_used, plan.only(used))]
    return [[next(column) if use else None for use in used] for column in found]


def _trained(gradients, plan):
    """None in place of the empty gradients of constants."""
    if not gradients:
        return [None] * len(plan.plans)
    return [g if trains else None for g, trains in zip(gradients, plan.trains_scale, strict=True)]
