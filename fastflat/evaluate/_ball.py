# SPDX-License-Identifier: Apache-2.0
"""Geometry of an attack: balls about each sample, the box of the data, directions of steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastflat import _checks

NORMS = ("linf", "l2")


def data_range(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """(lo, hi) of images in [0, 1] after ``(x - mean) / std``: each ``[C, 1, 1]``, as the attacks take them."""
    return ((0 - mean) / std).view(-1, 1, 1), ((1 - mean) / std).view(-1, 1, 1)


def project(
    x: Tensor,
    centre: Tensor,
    eps: float | Tensor,
    *,
    norm: str = "linf",
    lo: float | Tensor | None = 0.0,
    hi: float | Tensor | None = 1.0,
) -> Tensor:
    """x brought into the ball about each sample of ``centre``, and then into the box.

    ``linf``: each element clamped to centre +- eps. ``l2``: ``centre + d min(1, eps / |d|)`` of a sample, with d = x -
    centre. Where centre lies in the box the result lies in both, to rounding; for ``linf`` it is the nearest point of
    both.

    Args:
        x, centre: ``[B, ...]``.
        eps: radius in the units of x; for ``linf`` a tensor that broadcasts to x, too.
        norm: ``"linf"`` or ``"l2"``.
        lo, hi: the box, numbers or tensors that broadcast to x; None for no bound.

    Raises:
        ValueError: an argument is not as above.
    """
    radius("evaluate.project", "eps", eps, norm, x)
    bounds("evaluate.project", lo, hi, x)
    return into_box(into_ball(x, centre, eps, norm), lo, hi)


def into_ball(x: Tensor, centre: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return torch.minimum(torch.maximum(x, centre - eps), centre + eps)
    d = x - centre
    length = lengths(d)
    return torch.where(length > eps, centre + d * (eps / length), x)


def into_box(x: Tensor, lo: float | Tensor | None, hi: float | Tensor | None) -> Tensor:
    if lo is not None:
        x = torch.maximum(x, _like(lo, x))
    return x if hi is None else torch.minimum(x, _like(hi, x))


def ascent(g: Tensor, norm: str) -> Tensor:
    """The direction of length 1 in which a linear loss of gradient g grows most; 0 where g is."""
    if norm == "linf":
        return g.sign()
    # Divided by the largest element first: squares of small gradients would be 0.
    g = g / g.abs().flatten(1).amax(1).clamp(min=torch.finfo(g.dtype).tiny).view(per_sample(g))
    return g / lengths(g).clamp(min=0.5)


def start(x: Tensor, eps: float | Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    """A step to a point drawn evenly from the ball, drawn where the generator is."""
    device = x.device if generator is None else generator.device
    options = {"dtype": x.dtype, "device": device, "generator": generator}
    if norm == "linf":
        return (2 * torch.rand(x.shape, **options).to(x.device) - 1) * eps
    direction = ascent(torch.randn(x.shape, **options).to(x.device), norm)
    share = torch.rand(len(x), **options).to(x.device) ** (1 / max(x[0].numel(), 1))
    return direction * (eps * share.view(per_sample(x)))


def lengths(d: Tensor) -> Tensor:
    """Euclidean length of each sample, ``[B, 1, ...]``."""
    return torch.linalg.vector_norm(d.flatten(1), dim=1).view(per_sample(d))


def per_sample(x: Tensor) -> tuple[int, ...]:
    return (-1, *(1,) * (x.dim() - 1))


def radius(name: str, argument: str, value: Any, norm: str, x: Tensor) -> None:
    """Refuse what is no radius of this norm: a finite number of at least 0, a tensor of such for linf."""
    if norm not in NORMS:
        _checks.fail(name, "norm", "be 'linf' or 'l2'", repr(norm))
    if isinstance(value, Tensor) and norm == "linf":
        broadcasts(name, argument, value, x)
        if not bool(((value >= 0) & value.isfinite()).all()):
            _checks.fail(name, argument, "be finite and at least 0", f"{float(value.min())}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _checks.fail(name, argument, "be a number" + (" or a tensor" if norm == "linf" else ""), type(value))
    if not 0 <= value < math.inf:
        _checks.fail(name, argument, "be finite and at least 0", value)


def bounds(name: str, lo: Any, hi: Any, x: Tensor) -> None:
    """Refuse a box that is none."""
    for argument, value in (("lo", lo), ("hi", hi)):
        if isinstance(value, Tensor):
            broadcasts(name, argument, value, x)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            _checks.fail(name, argument, "be a number, a tensor or None", type(value))
    if lo is None or hi is None:
        return
    below = lo < hi
    if not bool(below.all() if isinstance(below, Tensor) else below):
        _checks.fail(name, "lo", "be below hi everywhere", f"lo {_short(lo)}, hi {_short(hi)}")


def within_range(name: str, eps: Any, norm: str, lo: Any, hi: Any, x: Tensor) -> None:
    """Refuse a radius from beyond which the box cannot be seen: it is in other units than the data."""
    if lo is None or hi is None:
        return
    span = hi - lo
    if not isinstance(span, Tensor):
        most = span if norm == "linf" else span * math.sqrt(x[0].numel())
    else:
        most = float(span.max() if norm == "linf" else lengths(span.double().expand(x.shape)[:1]))
    largest = float(eps.max()) if isinstance(eps, Tensor) else eps
    if largest > most * (1 + 1e-6):
        want = f"be at most the range of the data ({most:.6g})"
        _checks.fail(name, "eps", want, f"{largest:.6g}", "; eps is in the units of the inputs: 8/255, not 8")


def broadcasts(name: str, argument: str, value: Tensor, x: Tensor) -> None:
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits or (value.device != x.device and value.dim()):
        want = f"broadcast to {list(x.shape)} on {x.device}"
        _checks.fail(name, argument, want, f"{list(value.shape)} on {value.device}")


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _short(value: float | Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}"
    return f"of {float(value.min()):.4g} to {float(value.max()):.4g}"
