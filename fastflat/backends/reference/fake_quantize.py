# SPDX-License-Identifier: Apache-2.0
"""The fake_quantize family in plain PyTorch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import RULES
from fastflat.backends.reference.layout import blocked, broadcast, finish, sum_to_scale


@dataclasses.dataclass
class _Group:
    """Parameters of the scales, broadcast against the (blocked) data; the fields of csrc/math's QuantGroup."""

    s: Tensor
    inv: Tensor
    z_in: Tensor | float
    z_out: Tensor | float
    z: Tensor | float


def group_parameters(scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, eps: float, rules: int) -> _Group:
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


def _filled(r: Tensor, limit: int | Tensor) -> Tensor:
    return limit.expand_as(r) if isinstance(limit, Tensor) else torch.full_like(r, limit)


def _code(x: Tensor, g: _Group, qmin: int | Tensor, qmax: int | Tensor, rules: int) -> tuple[Tensor, Tensor, Tensor]:
    """u = x in units of the scale, d = q - z, and the mask m. Limits may be 0-dim tensors in the type of x."""
    u = x * g.inv if rules & RULES["reciprocal"] else x / g.s
    v = u + g.z_in
    r = torch.round(v) + g.z_out
    lowest, highest = _filled(r, qmin), _filled(r, qmax)
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
    data = blocked(x, group).to(compute_dtype(x.dtype))
    g = group_parameters(scale, zero_point, qmin, qmax, eps, rules)
    g = _Group(
        *(broadcast(p, x, axis, group) if isinstance(p, Tensor) else p for p in (g.s, g.inv, g.z_in, g.z_out, g.z))
    )
    return data, g


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
    data, g = _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules)
    _, d, _ = _code(data, g, qmin, qmax, rules)
    return finish(d * g.s, x, group, dtype)


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
    data, g = _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules)
    u, d, m = _code(data, g, qmin, qmax, rules)
    gy = blocked(gy, group).to(data.dtype)
    nothing = torch.zeros((), dtype=data.dtype, device=x.device)
    gx = finish(torch.where(m, gy, nothing), x, group, None)
    empty = scale.new_empty(0)
    if not need_scale:
        return gx, empty, scale.new_empty(0)
    gs = sum_to_scale(gy * torch.where(m, d - u, d), x, axis, group, scale.dtype) * factor
    if zero_point is None:
        return gx, gs, empty
    outside = sum_to_scale(torch.where(m, nothing, gy), x, axis, group, scale.dtype)
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
    data, g = _prepare(x, scale, zero_point, qmin, qmax, axis, group, eps, rules)
    u, d, m = _code(data, g, qmin, qmax, rules)
    zero = torch.zeros((), dtype=data.dtype, device=x.device)
    tx = zero if tx is None else blocked(tx, group).to(data.dtype)
    ts = zero if ts is None else broadcast(ts, x, axis, group)
    tz = zero if tz is None else broadcast(tz, x, axis, group)
    through = torch.where(m, tx, zero)
    by_scale = torch.where(m, d - u, d) * (ts * factor)
    by_zero = torch.where(m, zero, g.s * (tz * factor))
    return finish((through + by_scale) - by_zero, x, group, dtype)


def absmax_of(x: Tensor, axis: int, group: int) -> Tensor:
    """Largest magnitude of the elements of each scale, in the compute type; 0 where there are none."""
    magnitude = blocked(x, group).to(compute_dtype(x.dtype)).abs()
    shape = scale_shape(x.shape, axis, group)
    if x.numel() == 0:
        return magnitude.new_zeros(shape)
    if group:
        return magnitude.amax(-1)
    if axis < 0:
        return magnitude.amax()
    return magnitude.movedim(axis, 0).reshape(shape[0], -1).amax(-1)


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
    absmax = absmax_of(x, axis, group)
    scale = absmax / torch.full_like(absmax, max(qmax, 1))
    return fake_quantize(x, scale, None, qmin, qmax, axis, group, eps, rules, dtype), scale
