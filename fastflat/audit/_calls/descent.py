# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the descent family: the tensor of a place, alone and in a list."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops
from fastflat._ops.descent import HYPER, ROW, RULES
from fastflat.audit._calls import sharpness

#: Numbers of a step that does all there is to do; those that are not named are 0.
_ROW = {"c1": 0.5, "c2": 0.5, "rate": 0.1, "beta1": 0.9, "gain1": 0.1, "beta2": 0.99, "gain2": 0.01, "root": 0.5}
_ROW |= {"unbias": 2.0, "eps": 1e-8, "decay": 0.01, "shrink": 1.0, "power": 0.5, "gain": 1.0, "average": 0.5}


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place != "tensor":
        return
    if op == "descent_rows_":
        if dtype == torch.float64:
            yield from (_rows_call(rule) for rule in RULES.values())
        return
    w = torch.empty(shape, dtype=dtype)
    for partner in sharpness.PARTNERS.get(dtype, (dtype,)):
        g = torch.empty(shape, dtype=partner)
        for count in sharpness.counts(dtype, partner):
            yield from _calls(op, [w] * count, [g] * count, full=False)
            yield from _calls(op, [w] * count, [g] * count, full=True)


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    if place != "tensor" or op == "descent_rows_":
        return
    for full in (False, True):
        for arguments in _calls(op, [x.clone()], [torch.ones_like(x)], full):
            yield arguments, sharpness.streams(op, arguments, x)


def _calls(op: str, ws: list[torch.Tensor], gs: list[torch.Tensor], full: bool) -> Iterator[tuple]:
    """With the streams that every step has, or all of them; rounding to bfloat16 is drawn with all of them."""

    def states() -> list[torch.Tensor]:
        return [torch.ones_like(w, dtype=_ops.compute_dtype(w.dtype)) for w in ws]

    mixed = gs[0].dtype != ws[0].dtype
    restored = sharpness.backup(ws) if full else (None, [])
    outs = [torch.empty_like(g) for g in gs] if mixed else []
    firsts = [torch.ones_like(g) for g in gs] if full else []
    averages, rows = states() if full else [], _rows(len(ws))
    state = sharpness.state() if full and gs[0].dtype == torch.bfloat16 else None
    if op == "descent_sgd_":
        yield ws, outs, *restored, gs, firsts, states() if full else [], averages, rows, state
    elif op == "descent_adam_":
        largest = states() if full else []
        yield ws, outs, *restored, gs, firsts, states(), states(), largest, averages, rows, full, state
    elif op == "descent_lamb_moments_":
        yield ws, *restored, gs, firsts, states(), states(), rows
    elif op == "descent_lamb_":
        sums = torch.ones(len(ws), 3, dtype=torch.float64)
        yield ws, outs, *restored, states(), states(), averages, rows, sums, state
    else:
        raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def _rows(count: int) -> torch.Tensor:
    return torch.tensor([[_ROW.get(name, 0.0) for name in ROW]] * count, dtype=torch.float64)


def _rows_call(rule: int) -> tuple:
    two = torch.ones(2, dtype=torch.float64)
    sums = torch.ones(2, 3, dtype=torch.float64)
    hyper = torch.full((1, len(HYPER)), 0.5, dtype=torch.float64)
    mix = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    return hyper, torch.zeros(2, dtype=torch.int64), two, mix, sums, sums, rule
