# SPDX-License-Identifier: Apache-2.0
"""The general_quantize family in plain PyTorch: csrc/math/general_quantize.h operation by operation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat._spec import MINIFLOATS, RULES
from fastflat.backends.reference import _noise
from fastflat.backends.reference.fake_quantize import absmax_of, group_parameters
from fastflat.backends.reference.layout import blocked, broadcast, finish, sum_to_scale

_ADDITIVE = RULES["noise_uniform"] | RULES["noise_normal"]
_DRAWS = _ADDITIVE | RULES["noise_temper"] | RULES["noise_bypass"] | RULES["round_stochastic"]


@dataclasses.dataclass
class _Call:
    """Data, draws and parameters of a call, broadcast against each other, in the compute type."""

    x: Tensor
    xi: Tensor | None
    s: Tensor
    mul: Tensor | None
    out: Tensor | None
    reach: Tensor
    u: Tensor
    z_in: Tensor | float
    z_out: Tensor | float
    z: Tensor | float
    nu: Tensor | float
    a: Tensor | float
    rounded: Callable[[Tensor], Tensor]


@dataclasses.dataclass
class _Code:
    """x in units of the scale, y in units of the scale, what rounding took away, masks; see the functor."""

    u: Tensor
    d: Tensor
    e: Tensor
    m: Tensor
    kept: Tensor | None


def _minifloat(rules: int) -> tuple[float, float, float] | None:
    """(largest value, smallest normal value, 2^-mantissa bits) of the format that the rules name."""
    for name, format in MINIFLOATS.items():
        if rules & RULES[name]:
            return format
    return None


def _draws(x: Tensor, state: Tensor | None, group: int, rules: int) -> Tensor | None:
    """One draw an element of x, by its place in the dense storage."""
    if not rules & _DRAWS:
        return None
    draw = _noise.normal if rules & RULES["noise_normal"] else _noise.uniform
    values = draw(state, x.numel())
    layout = torch.contiguous_format if group else torch.preserve_format
    like = torch.empty_like(x, dtype=torch.float32, memory_format=layout)
    torch.as_strided(like, (x.numel(),), (1,)).copy_(values)
    if rules & (RULES["noise_uniform"] | RULES["noise_temper"]):
        like = like - 0.5
    return blocked(like, group).to(compute_dtype(x.dtype))


def _prepare(x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules) -> _Call:
    data = blocked(x, group).to(compute_dtype(x.dtype))
    if rules & RULES["rectified"]:
        data = torch.where(data <= 0, 0.0, data)
    low = x.dtype if rules & RULES["compute_input"] else None

    def rounded(t: Tensor) -> Tensor:
        return t if low is None else t.to(low).to(data.dtype)

    g = group_parameters(scale, zero_point, qmin, qmax, eps, rules)
    s, inv, z_in, z_out, z, reach = (
        broadcast(p, x, axis, group) if isinstance(p, Tensor) else p for p in (g.s, g.inv, g.z_in, g.z_out, g.z, scale)
    )
    mul = out = None
    if rules & RULES["inverse"]:
        k, dead = torch.full_like(reach, qmax) / reach, reach <= eps
        mul, out, s = torch.where(dead, 0.0, k), torch.where(dead, 1.0, k), torch.ones_like(s)
    elif rules & RULES["reciprocal"]:
        mul = rounded(inv)
    u = rounded(data / s if mul is None else data * mul)
    xi = _draws(x, state, group, rules)
    nu, a = 1.0 if nu is None else nu, 0.0 if a is None else a
    return _Call(data, xi, s, mul, out, reach, u, z_in, z_out, z, nu, a, rounded)


def _whole(v: Tensor, xi: Tensor | None, rules: int) -> Tensor:
    """An integer beside v by the rounding of the rules."""
    even = torch.round(v)
    if rules & RULES["round_stochastic"]:
        floor = torch.where(even > v, even - 1, even)
        return torch.where(xi < v - floor, floor + 1, floor)
    if not rules & RULES["round_away"]:
        return even
    unit = torch.copysign(torch.ones_like(v), v)
    return torch.where((v - even) * unit == 0.5, even + unit, even)


def _sign(v: Tensor, xi: Tensor | None, rules: int) -> Tensor:
    one = torch.ones_like(v)
    if rules & RULES["round_stochastic"]:
        return torch.where(xi < (v + 1) * 0.5, one, -one)
    return torch.where(v < 0, -one, one)


def _on_floats(v: Tensor, xi: Tensor | None, format: tuple[float, float, float], rules: int) -> Tensor:
    largest, smallest, unit = format
    bound = torch.full_like(v, 2 * largest)
    lifted = torch.where(v > -bound, v, -bound)
    near = torch.where(lifted < bound, lifted, bound)
    bits, exponent = (torch.int64, 0x7FF << 52) if v.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    binade = (near.view(bits) & exponent).view(v.dtype)  # 2^floor(log2 |near|), 0 below the normal numbers
    step = torch.where(binade < smallest, torch.full_like(v, smallest), binade) * unit
    return _whole(near * (1 / step), xi, rules) * step


def _limits(qmin: int, qmax: int, rules: int) -> tuple[float, float]:
    if rules & RULES["binary"]:
        return -1.0, 1.0
    format = _minifloat(rules)
    return (qmin, qmax) if format is None else (-format[0], format[0])


def _code(c: _Call, qmin: int, qmax: int, rules: int) -> _Code:
    format = _minifloat(rules)
    low, high = _limits(qmin, qmax, rules)
    additive = rules & _ADDITIVE
    v = c.rounded(c.u + c.z_in)
    if additive:
        v = v + c.nu * c.xi
    w = c.rounded(v + c.z_out)
    if additive:
        r = w
    elif format is not None:
        r = _on_floats(v, c.xi, format, rules)
    elif rules & RULES["binary"]:
        r = _sign(v, c.xi, rules)
    else:
        r = c.rounded(_whole(v, c.xi, rules) + c.z_out)
    lowest, highest = torch.full_like(r, low), torch.full_like(r, high)

    def clamped(t: Tensor) -> Tensor:
        lifted = torch.where(t > low, t, lowest)
        return torch.where(lifted < high, lifted, highest)

    overflow = lowest if rules & RULES["inf_qmin"] else highest
    not_number = lowest if rules & RULES["nan_qmin"] else torch.full_like(r, float("nan"))
    beyond = torch.where(w == w, overflow, not_number)
    q = torch.where((r < 2.0**63) & (w == w), clamped(r), beyond)
    d = c.rounded(q - c.z) + (0.0 if rules & RULES["positive_zero"] else -0.0)
    e = c.u - d
    tested = r if rules & RULES["mask_after"] else w
    m = (tested >= low) & (tested <= high) & (w == w)
    if rules & RULES["mask_absmax"]:
        m = c.x.abs() <= c.reach
    if rules & RULES["nan_passes"]:
        m = m | w.isnan()
    if rules & RULES["mask_none"]:
        m = torch.ones_like(m)
    if rules & RULES["rectified"]:
        m = m & (c.x != 0)
    if rules & RULES["noise_temper"]:
        d = (d + c.a * ((clamped(w) - c.z) - d)) + c.nu * c.xi
    if not rules & RULES["noise_bypass"]:
        return _Code(c.u, d, e, m, None)
    kept = c.xi < c.nu
    return _Code(*(torch.where(kept, 0.0, t) for t in (c.u, d, e)), m | kept, kept)


def general_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    state: Tensor | None,
    nu: Tensor | None,
    a: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    c = _prepare(x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules)
    code = _code(c, qmin, qmax, rules)
    y = code.d * c.s
    y = y if c.out is None else y / c.out
    return finish(y if code.kept is None else torch.where(code.kept, c.x, y), x, group, dtype)


def general_quantize_bwd(
    gy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    state: Tensor | None,
    nu: Tensor | None,
    a: Tensor | None,
    delta: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    need_scale: bool,
    need_delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = _prepare(x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules)
    code = _code(c, qmin, qmax, rules)
    gy = blocked(gy, group).to(c.x.dtype)
    zero = torch.zeros((), dtype=gy.dtype, device=gy.device)
    returned = gy
    if rules & RULES["through_chain"]:
        h = (gy * c.s).to(x.dtype).to(gy.dtype)
        returned = h / c.s if c.mul is None else h * c.mul
    straight = torch.where(code.m, returned, zero)
    e, u = torch.where(code.m, code.e, zero), torch.where(code.m, code.u, zero)
    extra = zero
    if delta is not None:
        extra = torch.where(delta != 0, straight.abs() * (delta * e), zero)
    gx = straight if delta is None else torch.where(delta != 0, straight + extra, straight)
    gx = finish(gx, x, group, None)
    gd = scale.new_empty(0)
    if need_delta and delta is not None:
        gd = ((straight.abs() * e) * blocked(x, group).to(c.x.dtype)).double().sum().to(scale.dtype)
    empty = scale.new_empty(0)
    if not need_scale:
        return gx, empty, scale.new_empty(0), gd
    inner = torch.where(code.m, code.d, zero) if rules & RULES["pact"] else u
    share = gy * (code.d - inner) - extra * u
    gs = sum_to_scale(share, x, axis, group, scale.dtype) * factor
    if zero_point is None:
        return gx, gs, empty, gd
    outside = sum_to_scale(torch.where(code.m, zero, gy) - extra, x, axis, group, scale.dtype)
    s = torch.where(scale < eps, torch.full_like(scale, eps), scale)
    return gx, gs, -(s * (outside * factor)), gd


def general_quantize_jvp(
    tx: Tensor | None,
    ts: Tensor | None,
    tz: Tensor | None,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    state: Tensor | None,
    nu: Tensor | None,
    a: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    factor: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    c = _prepare(x, scale, zero_point, state, nu, a, qmin, qmax, axis, group, eps, rules)
    code = _code(c, qmin, qmax, rules)
    zero = torch.zeros((), dtype=c.x.dtype, device=x.device)
    tx = zero if tx is None else blocked(tx, group).to(c.x.dtype)
    ts = zero if ts is None else broadcast(ts, x, axis, group)
    tz = zero if tz is None else broadcast(tz, x, axis, group)
    inner = torch.where(code.m, code.d if rules & RULES["pact"] else code.u, zero)
    through = torch.where(code.m, tx, zero)
    by_scale = (code.d - inner) * (ts * factor)
    by_zero = torch.where(code.m, zero, c.s * (tz * factor))
    return finish((through + by_scale) - by_zero, x, group, dtype)


def _log2(v: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents of the powers of two at or below, and at or above, fp32 v >= 0; -127 below the normal numbers."""
    bits = v.view(torch.int32)
    floor = (bits >> 23) - 127
    return floor, floor + ((bits & 0x7FFFFF != 0) & (floor > -127)).int()


def _block_scale(absmax: Tensor, outer: Tensor | None, qmax: int, rules: int) -> Tensor:
    """The scale of a block from its largest magnitude: csrc/math/block_scale.h."""
    largest, unit = float(_limits(0, qmax, rules)[1]), (_minifloat(rules) or (0, 0, 1.0))[2]
    if rules & RULES["scale_e4m3"]:
        wanted = (absmax / torch.full_like(absmax, largest)) / (1.0 if outer is None else outer)
        held = torch.where(wanted < 2.0**-6, 2.0**-6, wanted)
        held = torch.where(held > 448.0, 448.0, held).to(absmax.dtype)
        rounded = _on_floats(held, None, MINIFLOATS["e4m3"], 0)
        return rounded if outer is None else outer * torch.where(held.isnan(), held, rounded)
    if not rules & (RULES["scale_floor"] | RULES["scale_ceil"] | RULES["scale_even"] | RULES["scale_rceil"]):
        return absmax / torch.full_like(absmax, max(largest, 1.0))
    a = absmax.to(torch.float32)
    emax = math.floor(math.log2(largest))
    if rules & RULES["scale_rceil"]:
        e = _log2(a / torch.full_like(a, largest))[1]
    elif rules & RULES["scale_ceil"]:
        e = _log2(a)[1] - emax
    elif rules & RULES["scale_even"]:
        half = 1 << (22 + int(math.log2(unit)))
        e = _log2((a.view(torch.int32) + half).view(torch.float32))[0] - emax
    else:
        e = _log2(a)[0] - emax
    power = ((e.clamp(-126, 127) + 127) << 23).view(torch.float32).to(absmax.dtype)
    return torch.where(absmax.isnan(), absmax, power)


def general_quantize_dynamic(
    x: Tensor,
    state: Tensor | None,
    nu: Tensor | None,
    a: Tensor | None,
    outer: Tensor | None,
    qmin: int,
    qmax: int,
    axis: int,
    group: int,
    eps: float,
    rules: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    scale = _block_scale(absmax_of(x, axis, group), outer, qmax, rules)
    y = general_quantize(x, scale, None, state, nu, a, qmin, qmax, axis, group, eps, rules, dtype)
    return y, scale
