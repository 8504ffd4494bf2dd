# SPDX-License-Identifier: Apache-2.0
"""Audited calls of the sharpness family: the tensor of a place, alone and in a list."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastflat import _ops

_ETA = 0.01
#: Storage of gradients and copies beside weights of a type: their own, and 16 bits beside fp32.
PARTNERS = {torch.float32: (torch.float32, torch.bfloat16)}


def compiled(op: str, place: str, shape, axis: int, group: int, dtype: torch.dtype) -> Iterator[tuple]:
    if place != "tensor":
        return
    if op == "sharpness_scale":
        if dtype == torch.float64:
            yield from ((*_scale(), linf) for linf in (False, True))
        return
    w = torch.empty(shape, dtype=dtype)
    for partner in PARTNERS.get(dtype, (dtype,)):
        g = torch.empty(shape, dtype=partner)
        for count in counts(dtype, partner):
            if op == "sharpness_sums":
                kinds = (0, 1, 2) if partner == torch.float32 else (2,)
                yield from (([g] * count, [w] * count, [kind], _ETA) for kind in kinds)
            elif op == "sharpness_ascent_":
                for kept in (True, False):
                    outs = [g] * count if partner != dtype and not kept else []
                    yield _ascent([w] * count, [g] * count, outs, kept, seeded=not kept and partner == torch.bfloat16)
            else:
                raise RuntimeError(f"fastflat audit: no launches are known for {op}; add them to {__name__}")


def measured(op: str, place: str, x: torch.Tensor, axis: int, group: int) -> Iterator[tuple[tuple, float]]:
    if place != "tensor" or op == "sharpness_scale":
        return
    others = torch.ones_like(x)
    if op == "sharpness_sums":
        calls = [([x], [others], [kind], _ETA) for kind in (0, 1, 2)]
    else:
        calls = [_ascent([x.clone()], [others], outs, not outs) for outs in ([], [torch.empty_like(x)])]
    yield from ((arguments, streams(op, arguments, x)) for arguments in calls)


def counts(dtype: torch.dtype, partner: torch.dtype) -> tuple[int, ...]:
    """Lengths of lists: kernels for one tensor differ from those for several in where addresses come from alone."""
    return (1, 2) if dtype == partner == torch.float32 else (2,)


def streams(op: str, arguments: tuple, x: torch.Tensor) -> float:
    """The bytes of a call by the op table, as a multiple of those of x."""
    return _ops.OPS[op].bytes_moved(*arguments) / (x.numel() * x.element_size())


def backup(ws: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Room for the bytes of all weights, and where those of each lie."""
    sizes = [-(-w.numel() * w.element_size() // 64) * 64 for w in ws]
    return torch.zeros(sum(sizes), dtype=torch.uint8), [sum(sizes[:t]) for t in range(len(sizes))]


def state() -> torch.Tensor:
    return torch.tensor([1, 0])


def _scale() -> tuple:
    return torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 1e-12


def _ascent(ws, gs, outs, kept: bool, seeded: bool = False) -> tuple:
    place = backup(ws) if kept else (None, [])
    scale = torch.full((len(ws),), 0.05, dtype=torch.float64)
    return ws, gs, outs, *place, scale, [1], _ETA, state() if seeded else None
