# SPDX-License-Identifier: Apache-2.0
"""Quadratic forms ``v_k^T H v_k`` from the forward pass alone, summed within groups of vectors.

Along a line the loss is ``L(w + t v) = L + t L_1 + t^2 L_2 / 2`` with ``L_2 = v^T H v``. Each value carries K
first-order tangents and, for each group of vectors, the sum of their second-order ones: F + (3 K + G) F multiply-adds
for G groups, where products with H take 2F + 6F K, and no activation is kept.

Source: Griewank and Walther, Evaluating Derivatives, 2008, chapter 13; Dangel et al., Collapsing Taylor Mode Automatic
Differentiation, 2025.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflat.curvature import _rules
from fastflat.curvature._interpreter import Linear
from fastflat.curvature._rules import Call


def summed_forms(linear: Linear, seeds: dict[int, Tensor], loss: int, groups: int) -> Tensor | None:
    """``sum_k v_k^T H v_k`` within groups of equally many neighbours, ``[G]``; None where the loss does not move.

    Raises:
        Untraceable: an op has no second derivative that could be had.
    """
    plan = linear.plan(seeds, [loss])
    k = len(next(iter(seeds.values())))
    first: dict[int, Any] = dict(seeds)
    second: dict[int, Any] = {}
    with torch.no_grad():
        for i in plan.active:
            step, wanted = linear.program.steps[i], plan.wanted.get(i, set())
            moves = any(first.get(r) is not None for r in plan.reads[i])
            bent = pushed = None
            if moves:
                call = Call(step, i, linear, first, k, wanted)
                bent = _rules.bend(call, groups)
                first[i] = _rules.tangent(call)
            if any(second.get(r) is not None for r in plan.reads[i]):
                pushed = _rules.settled(_rules.tangent(Call(step, i, linear, second, groups, wanted)))
            if bent is not None or pushed is not None:
                second[i] = _plus(bent, pushed)
            for r in plan.freed.get(i, ()):
                first.pop(r, None)
                second.pop(r, None)
    linear.drop_unasked()
    return second.get(loss)


def _plus(a: Any, b: Any) -> Any:
    if isinstance(a, tuple) and isinstance(b, tuple | list):
        return tuple(_plus(x, y) for x, y in zip(a, b, strict=True))
    return a if b is None else b if a is None else a + b
