# SPDX-License-Identifier: Apache-2.0
"""An op without a rule: forward-mode AD of that op alone, over all K by vmap, or one tangent after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflat.curvature._program import Untraceable
from fastflat.curvature._rules._table import RULES, Call

_warned: set[Any] = set()


def tangent(call: Call) -> Any:
    """The K tangents of a step by its rule, or by the fallback with one warning for each op."""
    found = RULES.get(call.op)
    return found(call) if found is not None else by_autodiff(call)


def by_autodiff(call: Call, warn: bool = True) -> Any:
    """The K tangents of a step by differentiating the op itself.

    Raises:
        Untraceable: the op has neither a forward nor a double backward derivative, or a result that others read counts
            as constant in them.
    """
    if warn and call.op not in _warned:
        _warned.add(call.op)
        warnings.warn(
            f"fastflat.curvature: {call.op} has no rule for K tangents; it is differentiated alone, which is slower",
            stacklevel=2,
        )
    places, moving, primals = [], [], []
    for index, t in enumerate(call.tangents()):
        for item, part in enumerate(t) if isinstance(t, list) else ((None, t),):
            if part is not None:
                places.append((index, item))
                moving.append(part)
                value = call.primal(index)
                primals.append(value if item is None else value[item])
    settled = [call.primal(i) for i in range(len(call.step.args))]

    def function(*replaced):
        args = [list(a) if isinstance(a, list) else a for a in settled]
        for (index, item), value in zip(places, replaced, strict=True):
            if item is None:
                args[index] = value
            else:
                args[index][item] = value
        cut = len(args) - len(call.step.keywords)
        result = call.op(*args[:cut], **dict(zip(call.step.keywords, args[cut:], strict=True)))
        return tuple(result) if isinstance(result, (list, tuple)) else result

    moving = [t.to(p.dtype) for t, p in zip(moving, primals, strict=True)]
    _refuse_constants(call, function, tuple(primals))
    results = _differentiated(call.op, function, tuple(primals), tuple(moving))
    if isinstance(results, tuple):
        return tuple(t.to(call.type_of(t.dtype)) if t.is_floating_point() else None for t in results)
    return results.to(call.type_of(results.dtype))


def _differentiated(op: Any, function: Callable, primals: tuple, moving: tuple) -> Any:
    def forward(*tangents):
        return torch.func.jvp(function, primals, tangents)[1]

    def twice(*tangents):
        # J t is the derivative, by the cotangent c, of <J^T c, t>.
        value, pull = torch.func.vjp(function, *primals)
        zero = torch.utils._pytree.tree_map(torch.zeros_like, value)
        _, push = torch.func.vjp(pull, zero)
        return push(tangents)[0]

    reason: Exception | None = None
    for attempt in (torch.func.vmap(forward), _looped(forward), _looped(twice)):
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return attempt(*moving)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = reason or error
    raise Untraceable(f"{op} has no derivative to push tangents through") from reason


def _refuse_constants(call: Call, function: Callable, primals: tuple) -> None:
    """Results that the derivatives of an op hold constant must have no reader: they do move."""
    with torch.enable_grad():
        results = function(*(p.detach().requires_grad_() for p in primals))
    for index in call.wanted if isinstance(results, tuple) else ():
        if results[index].is_floating_point() and not results[index].requires_grad:
            raise Untraceable(f"result {index} of {call.op} has no derivative to push tangents through")


def _looped(function: Callable) -> Callable:
    def loop(*moving: Tensor):
        rows = [function(*(t[k] for t in moving)) for k in range(moving[0].shape[0])]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return torch.stack(rows)

    return loop
