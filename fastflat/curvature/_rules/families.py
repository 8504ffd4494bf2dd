# SPDX-License-Identifier: Apache-2.0
"""The other quantizers: binary weights, LIQ, bit planes, mixtures, dynamic scales. Their weights are small beside
activations, so one tangent after another goes through the derivatives of :mod:`fastflat.autograd`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastflat.autograd import binarize, bitplane, liq, mixquant
from fastflat.backends import dispatched_kernels
from fastflat.curvature._rules._table import Call, rule

ops = torch.ops.fastflat


def _pushed(c: Call, function: Any, order: Sequence[int], moving: Sequence[int], plan: Any, *constants: Any) -> Any:
    """The K tangents by the jvp of a Function whose inputs are these arguments in this order, then constants."""
    values = [c.primal(i) for i in order]
    tangents = {order.index(i): c.tangent(i) for i in moving if c.tangent(i) is not None}
    if not tangents:
        return None
    places = list(tangents)

    def value(*moved):
        inputs = list(values)
        for place, t in zip(places, moved, strict=True):
            inputs[place] = t
        return function.apply(*inputs, *constants, plan)

    primals = tuple(values[p] for p in places)
    rows = []
    for k in range(c.k):
        along = tuple(tangents[p][k].to(v.dtype).contiguous() for p, v in zip(places, primals, strict=True))
        found = torch.func.jvp(value, primals, along)[1]
        rows.append(found if isinstance(found, tuple) else (found,))
    results = [torch.stack(column).to(c.type_of(column[0].dtype)) for column in zip(*rows, strict=True)]
    return results[0] if isinstance(c.out_shape, torch.Size) else tuple(results)


def _partner(c: Call, op: Any, shared: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Arguments by name of the backward of the same call: the step of `op` that shares these arguments."""
    for step in c.program.steps:
        if step.op is op and all(step.args[theirs] == c.step.args[ours] for ours, theirs in shared):
            return dict(zip((a.name for a in op._schema.arguments), step.args, strict=True))
    return {}


@rule(ops.binarize.default)
def binarize_value(c: Call):
    found = _partner(c, ops.binarize_bwd.default, [(0, 2), (1, 3)])
    clip, through = found.get("clip", float("inf")), found.get("through_alpha", True)
    plan = binarize.Plan(clip, through, c.primal(2), c.primal(3), c.primal(4), dispatched_kernels())
    return _pushed(c, binarize.Value, (0, 1), (0,), plan)


@rule(ops.binarize_bwd.default)
def binarize_backward(c: Call):
    plan = binarize.Plan(*(c.primal(i) for i in range(5, 9)), None, dispatched_kernels())
    return _pushed(c, binarize.Gradient, (0, 1, 2, 3, 4), (0, 1, 2), plan)


@rule(ops.liq.default)
def liq_value(c: Call):
    plan = liq.Plan(*(c.primal(i) for i in range(4, 8)), dispatched_kernels())
    return _pushed(c, liq.Value, (0, 3, 1, 2), (0, 3), plan)


@rule(ops.liq_bwd.default)
def liq_backward(c: Call):
    plan = liq.Plan(*(c.primal(i) for i in range(5, 8)), None, dispatched_kernels())
    return _pushed(c, liq.Gradient, (0, 1, 4, 2, 3), (0,), plan)


@rule(ops.bitplane.default)
def bitplane_value(c: Call):
    plan = bitplane.Plan(*(c.primal(i) for i in range(5, 8)), dispatched_kernels())
    return _pushed(c, bitplane.Value, range(5), range(4), plan)


@rule(ops.bitplane_bwd.default)
def bitplane_backward(c: Call):
    plan = bitplane.Plan(c.primal(6), c.primal(7), None, dispatched_kernels())
    return _pushed(c, bitplane.Gradient, range(6), range(5), plan)


@rule(ops.mixquant.default)
def mixquant_value(c: Call):
    found = _partner(c, ops.mixquant_bwd.default, [(0, 1), (1, 2), (4, 5)])
    factor = c.once("factor", lambda: torch.ones_like(c.primal(4)))
    if "factor" in found:
        factor = c.value_of(found["factor"])
    plan = mixquant.Plan(tuple(c.primal(i) for i in range(5, 9)), True, c.primal(9), dispatched_kernels())
    return _pushed(c, mixquant.Value, (0, 1, 4, 2, 3), (0, 1, 4), plan, factor)


@rule(ops.mixquant_bwd.default)
def mixquant_backward(c: Call):
    plan = mixquant.Plan(tuple(c.primal(i) for i in range(7, 11)), True, None, dispatched_kernels())
    return _pushed(c, mixquant.Gradient, (0, 1, 2, 5, 3, 4, 6), (0, 1, 2, 5), plan)


@rule(ops.general_quantize_dynamic.default)
def general_quantize_dynamic(c: Call):
    # The scale is a constant of every derivative.
    x, state, nu, a = (c.primal(i) for i in range(4))
    ones = torch.ones_like(x)
    grid = [c.primal(i) for i in range(5, 11)]

    def mask():
        return ops.general_quantize_jvp(ones, None, None, x, c.out[1], None, state, nu, a, *grid, 1.0, None)

    return c.tangent(0) * c.once("m", mask), None
