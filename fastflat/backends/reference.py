# SPDX-License-Identifier: Apache-2.0
"""Every raw op in plain PyTorch: the oracle of the tests, and what runs where no compiled kernel does.

Step by step the same IEEE operations as ``csrc/math``, so that map ops agree with it bit for bit; sums run in fp64.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import RULES


def identity(x: Tensor) -> Tensor:
    return x.clone()


@dataclasses.dataclass
class _Group:
    """Parameters of the scales, broadcast against the (blocked) data; the fields of csrc/math's QuantGroup."""

    s: Tensor
    inv: Tensor
    z_in: Tensor | float
    z_out: Tensor | float
    z: Tensor | float


def _blocked(x: Tensor, group: int) -> Tensor:
    return x.unflatten(-1, (x.shape[-1] // group, group)) if group else x


def _broadcast(p: Tensor, x: Tensor, axis: int, group: int) -> Tensor:
    """A per-scale tensor in the shape that multiplies the blocked x."""
    if group:
        return p.unsqueeze(-1)
    return p if axis < 0 else p.view([-1 if d == axis else 1 for d in range(x.dim())])


def _group(scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, eps: float, rules: int) -> _Group:
    s = torch.where(scale < eps, torch.full_like(scale, eps), scale)
    inv = torch.ones_like(s) / s
    if zero_point is None:
        return _Group(s, inv, -0.0, -0.0, 0.0)
    rounded = torch.round(zero_point)
    lifted = torch.where(rounded < qmin, torch.full_like(s, qmin), rounded)
    code = torch.where(lifted > qmax, torch.full_like(s, qmax), lifted)
    z = (zero_point if rules & RULES["zero_float"] else code) + 0.0
    absent = torch.full_like(z, -0.0)
    inside = rules & RULES["zero_inside"]
    return _Group(s, inv, z if inside else absent, absent if inside else z, z)


def _code(x: Tensor, g: _Group, qmin: int, qmax: int, rules: int) -> tuple[Tensor, Tensor, Tensor]:
    """u = x in units of the scale, d = q - z, and the mask m."""
    u = x * g.inv if rules & RULES["reciprocal"] else x / g.s
    v = u + g.z_in
    r = torch.round(v) + g.z_out
    lowest, highest = torch.full_like(r, qmin), torch.full_like(r, qmax)
    lifted = torch.where(r > qmin, r, lowest)
    clamped = torch.where(lifted < qmax, lifted, highest)
    overflow = lowest if rules & RULES["inf_qmin"] else highest
    not_number = lowest if rules & RULES["nan_qmin"] else torch.full_like(r, float("nan"))
    q = torch.where(r < 2.0**63, clamped, torch.where(r == r, overflow, not_number))
    tested = r if rules & RULES["mask_after"] else v + g.z_out
    d = (q - g.z) + (0.0 if rules & RULES["positive_zero"] else -0.0)
    if rules & RULES["mask_none"]:
        return u, d, torch.ones_like(r, dtype=torch.bool)
    return u, d, (tested >= qmin) & (tested <= qmax)


def _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules):
    blocked = _blocked(x, group).to(compute_dtype(x.dtype))
    g = _group(scale, zero_point, qmin, qmax, eps, rules)
    g = _Group(
        *(_broadcast(p, x, axis, group) if isinstance(p, Tensor) else p for p in (g.s, g.inv, g.z_in, g.z_out, g.z))
    )
    return blocked, g


def _finish(y: Tensor, x: Tensor, group: int, dtype: torch.dtype | None) -> Tensor:
    """y in the shape, strides and storage type that the op promises."""
    layout = torch.contiguous_format if group else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout).copy_(y.reshape(x.shape))


def _sum_to_scale(t: Tensor, x: Tensor, axis: int, group: int, dtype: torch.dtype) -> Tensor:
    """Sum of t over the elements of each scale, in fp64, rounded once to dtype."""
    t = t.double()
    if group:
        return t.sum(-1).to(dtype)
    if axis < 0:
        return t.sum().to(dtype)
    return t.sum([d for d in range(x.dim()) if d != axis]).to(dtype) if x.dim() > 1 else t.to(dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    blocked, g = _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules)
    _, d, _ = _code(blocked, g, qmin, qmax, rules)
    return _finish(d * g.s, x, group, dtype)


def fake_quantize_bwd(
    gy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    blocked, g = _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules)
    u, d, m = _code(blocked, g, qmin, qmax, rules)
    gy = _blocked(gy, group).to(blocked.dtype)
    nothing = torch.zeros((), dtype=blocked.dtype, device=x.device)
    gx = _finish(torch.where(m, gy, nothing), x, group, None)
    empty = scale.new_empty(0)
    if not need_scale:
        return gx, empty, scale.new_empty(0)
    gs = _sum_to_scale(gy * torch.where(m, d - u, d), x, axis, group, scale.dtype) * factor
    if zero_point is None:
        return gx, gs, empty
    outside = _sum_to_scale(torch.where(m, nothing, gy), x, axis, group, scale.dtype)
    s = torch.where(scale < eps, torch.full_like(scale, eps), scale)
    return gx, gs, -(s * (outside * factor))


def fake_quantize_jvp(
    tx: Tensor | None,
    ts: Tensor | None,
    tz: Tensor | None,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    blocked, g = _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules)
    u, d, m = _code(blocked, g, qmin, qmax, rules)
    zero = torch.zeros((), dtype=blocked.dtype, device=x.device)
    tx = zero if tx is None else _blocked(tx, group).to(blocked.dtype)
    ts = zero if ts is None else _broadcast(ts, x, axis, group)
    tz = zero if tz is None else _broadcast(tz, x, axis, group)
    through = torch.where(m, tx, zero)
    by_scale = torch.where(m, d - u, d) * (ts * factor)
    by_zero = torch.where(m, zero, g.s * (tz * factor))
    return _finish((through + by_scale) - by_zero, x, group, dtype)


def fake_quantize_absmax(
    x: Tensor,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    magnitude = _blocked(x, group).to(compute_dtype(x.dtype)).abs()
    shape = scale_shape(x.shape, axis, group)
    if x.numel() == 0:
        absmax = magnitude.new_zeros(shape)
    elif group:
        absmax = magnitude.amax(-1)
    elif axis < 0:
        absmax = magnitude.amax()
    else:
        absmax = magnitude.movedim(axis, 0).reshape(shape[0], -1).amax(-1)
    scale = absmax / torch.full_like(absmax, max(qmax, 1))
    return fake_quantize(x, scale, None, qmin, qmax, axis, group, eps, rules, dtype), scale
