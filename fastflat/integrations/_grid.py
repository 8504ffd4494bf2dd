# SPDX-License-Identifier: Apache-2.0
"""Integer grids of other libraries as fields of a spec, specs made once, and scales in the shapes that a spec knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastflat._spec import QuantSpec

#: Specs kept before they are forgotten: bounds the memory that changing shapes take.
_KEPT = 1024
_SPECS: dict[tuple, QuantSpec] = {}


def remembered(make: Callable[..., QuantSpec], *key: Any) -> QuantSpec:
    """``make(*key)``, made once. (A cache of functools would make torch.compile warn.)"""
    spec = _SPECS.get((make, key))
    if spec is None:
        if len(_SPECS) >= _KEPT:
            _SPECS.clear()
        spec = _SPECS[make, key] = make(*key)
    return spec


def grid(qmin: int, qmax: int) -> dict[str, Any] | None:
    """The fields ``bits``, ``signed`` and ``narrow`` of the grid [qmin, qmax]; None if no spec has it."""
    bits = (qmax - qmin + 1).bit_length() - 1
    if qmin == 0:
        narrow = qmax + 1 != 1 << bits
        bits += narrow
        fits = qmax == (1 << bits) - 1 - narrow
        signed = False
    else:
        narrow = qmin == -qmax
        bits += narrow
        fits = qmax == (1 << (bits - 1)) - 1 and qmin == -(1 << (bits - 1)) + narrow
        signed = True
    if not fits or not 1 <= bits <= 16 or (narrow and bits == 1):
        return None
    return {"bits": bits, "signed": signed, "narrow": narrow}


def axis_of(scale: Tensor, x: Tensor) -> int | str | None:
    """The axis of x whose channels have a scale each, for a scale that broadcasts against x; None if there is one scale
    for all, "" where the shape is another."""
    if scale.numel() == 1:
        return None if scale.dim() <= max(x.dim(), 1) else ""
    wide = [d for d, n in enumerate(scale.shape) if n != 1]
    fits = scale.dim() == x.dim() and len(wide) == 1 and scale.numel() == x.shape[wide[0]]
    return wide[0] if fits else ""


def flat(axis: int | None) -> tuple[int, ...]:
    """The shape to give a scale."""
    return () if axis is None else (-1,)
