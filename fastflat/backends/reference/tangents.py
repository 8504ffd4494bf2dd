# SPDX-License-Identifier: Apache-2.0
"""The tangents family in plain PyTorch: the operations of csrc/math/tangents.h, one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference import _elementary


def tangents_combine(
    t0: Tensor | None,
    p0: Tensor | None,
    t1: Tensor | None,
    p1: Tensor | None,
    f0: Tensor | None,
    r0: Tensor | None,
    f1: Tensor | None,
    r1: Tensor | None,
    shift: Tensor | None,
    mask: Tensor | None,
    kind: int,
) -> Tensor:
    dtype = next(t for t in (t0, t1, f0) if t is not None).dtype
    wide = compute_dtype(dtype)
    t0, t1, f0, f1, mask = (t if t is None else t.to(wide) for t in (t0, t1, f0, f1, mask))
    a0, a1 = (_factor(p0, wide), _factor(p1, wide)) if kind == 0 else _FACTORS[kind](p0.to(wide), _wide(p1, wide))
    r0, r1, shift = (r if r is None else r[:, None, :, None] for r in (r0, r1, shift))
    products = [(a0, t0), (a1, t1), (f0, r0), (f1, r1), (None, shift)]
    terms = [t if a is None else a * t for a, t in products if t is not None]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    out = total if mask is None else total * mask
    return _stored(out, dtype)


def _stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor, whatever strides axes of one element have."""
    return t.new_empty(t.shape, dtype=dtype).copy_(t)


def _wide(p: Tensor | None, wide: torch.dtype) -> Tensor | None:
    return p if p is None else p.to(wide)


def _factor(p: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """An element-wise factor, or one a channel."""
    return p[:, None] if p is not None and p.dim() == 1 else _wide(p, wide)


def _of_sigmoid(y: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return y * (1 - y), None if g is None else g * (1 - (y + y))


def _of_tanh(y: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return 1 - y * y, None if g is None else (-2 * g) * y


def _held(z: Tensor) -> Tensor:
    return z.clamp(-1000, 1000)


def _of_silu(z: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    z = _held(z)
    s = _elementary.sigmoid(z)
    rest = 1 - s
    slope = s * (1 + z * rest)
    return slope, None if g is None else ((s * rest) * (2 + z * (1 - (s + s)))) * g


def _of_gelu(z: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    z = _held(z)
    below, density = _elementary.normal(z)
    return below + z * density, None if g is None else (density * (2 - z * z)) * g


def _of_gelu_tanh(z: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    z = _held(z)
    c = torch.tensor(0.7978845608028654, dtype=z.dtype, device=z.device)
    square = z * z
    t = _elementary.tanh(c * (z + 0.044715 * (square * z)))
    q = 1 - t * t
    half = 0.5 * z
    first = c * (1 + 0.134145 * square)
    second = (0.26829 * c) * z
    slope = 0.5 * (1 + t) + (half * q) * first
    bend = q * first + half * (q * second - ((2 * t) * q) * (first * first))
    return slope, None if g is None else bend * g


def _of_relu(p: Tensor, g: Tensor | None) -> tuple[Tensor, None]:
    return torch.where(p <= 0, torch.zeros_like(p), torch.ones_like(p)), None


#: phi'(p) and phi''(p) g by the number of the activation.
_FACTORS = {1: _of_sigmoid, 2: _of_tanh, 3: _of_silu, 4: _of_gelu, 5: _of_gelu_tanh, 6: _of_relu}


def tangents_sums(
    t0: Tensor, p0: Tensor | None, t1: Tensor | None, p1: Tensor | None, mask: Tensor | None, total: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = compute_dtype(t0.dtype)

    def sums(terms: Tensor) -> Tensor:
        return _stored(terms.sum((1, 3), dtype=torch.float64), wide)

    none = t0.new_empty(0)
    mapped = none if mask is None else _stored(t0.to(wide) * mask.to(wide), t0.dtype)
    dots = none.to(wide)
    if p0 is not None:
        terms = t0.double() * p0.double()
        dots = sums(terms if t1 is None else terms + t1.double() * p1.double())
    return mapped, dots, sums(t0) if total else none.to(wide)
