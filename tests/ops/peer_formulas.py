# SPDX-License-Identifier: Apache-2.0
"""What other libraries' quantizers compute, forward and backward, operation by operation in plain PyTorch.

Written from their behaviour and proved against the installed packages by test_peers.py; here so that the conventions
are tested where no package is installed. Scales are ``[rows, 1]`` or 0-dim, gradients come back in that shape. Types
follow PyTorch's promotion at each operation, as in the libraries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


def torchao(x: Tensor, s: Tensor, z: Tensor, g: Tensor, qmin: int, qmax: int) -> Results:
    """Affine fake-quantization, integer domain: y, dx, ds, dz. A zero-point in floating point is not rounded."""
    inverse = 1.0 / s
    u = x * inverse
    code = u.round() + z
    kept = (code >= qmin) & (code <= qmax)
    d = code.clamp(qmin, qmax).to(x.dtype) - z.to(x.dtype)
    scaled = d * s
    g_scaled = g.to(scaled.dtype)
    all_of_it = (g_scaled * s).to(d.dtype)
    passed = torch.where(kept, all_of_it.to(code.dtype), 0.0)
    dx = (passed.to(u.dtype) * inverse).to(x.dtype)
    ds = (g_scaled * d).sum_to_size(s.shape) - (passed.to(u.dtype) * x).sum_to_size(s.shape) * (inverse * inverse)
    dz = passed.sum_to_size(s.shape) - all_of_it.sum_to_size(s.shape)
    return scaled.to(x.dtype), dx, ds, dz


def torchao_scale(x: Tensor, bits: int) -> Tensor:
    """The symmetric dynamic scale of the last axis, in the type of x and then in fp32; the grid has 7.5 steps a side at
    4 bits, and the smallest normal number of the type of x is the least scale."""
    zero = torch.zeros((), dtype=x.dtype)
    low, high = torch.minimum(x.amin(-1, keepdim=True), zero), torch.maximum(x.amax(-1, keepdim=True), zero)
    scale = torch.maximum(-low, high) / ((2**bits - 1) / 2)
    return scale.clamp(min=torch.finfo(x.dtype).smallest_normal).float()


def brevitas(x: Tensor, s: Tensor, z: Tensor, g: Tensor, qmin: int, qmax: int, straight: bool) -> Results:
    """The integer quantizer: y, dx, ds. ``straight`` lets clamped elements pass their gradient; NaN always passes."""
    u = x / s
    code = (u + z).round()
    clamped = torch.where(code > qmax, torch.full_like(code, qmax), code)
    clamped = torch.where(clamped < qmin, torch.full_like(code, qmin), clamped)
    d = clamped - z
    y = d * s
    h = g.to(y.dtype) * s
    passed = h if straight else torch.where((code > qmax) | (code < qmin), torch.zeros_like(h), h)
    ds = (g.to(y.dtype) * d).sum_to_size(s.shape) + (-passed * ((x / s) / s)).sum_to_size(s.shape)
    return y, (passed / s).to(x.dtype), ds


def modelopt(x: Tensor, amax: Tensor, g: Tensor, qmin: int, qmax: int, straight: bool = False) -> Results:
    """Integer fake-quantization by the largest magnitude: y, dx. An amax of 2**-24 and less gives zeros."""
    dead = amax.float() <= 2.0**-24
    k = torch.tensor(float(qmax)) / amax.float()
    code = (x.float() * torch.where(dead, 0.0, k)).round().clamp(qmin, qmax)
    y = (code / torch.where(dead, 1.0, k)).to(x.dtype)
    return y, g if straight else torch.where(x.abs() <= amax, g, torch.zeros_like(g))


def modelopt_block(x: Tensor, amax: Tensor, g: Tensor, qmin: int, qmax: int) -> Results:
    """Blocks with a learned amax: y, dx, gradient of amax; the mask is taken before rounding."""
    s = (amax / qmax).clamp(min=1e-8)
    u = x / s
    d = u.round().clamp(qmin, qmax)
    passed = torch.where((u >= qmin) & (u <= qmax), g * s, 0.0)
    ds = (g * d).sum(-1, keepdim=True) + (-passed * ((x / s) / s)).sum(-1, keepdim=True)
    return d * s, passed / s, ds / qmax


# Block formats -------------------------------------------------------------------------------------------------------

#: exponent bits, mantissa bits, largest value
FORMATS = {"e4m3": (4, 3, 448.0), "e5m2": (5, 2, 57344.0), "e3m2": (3, 2, 28.0), "e2m3": (2, 3, 7.5)}
FORMATS["e2m1"] = (2, 1, 6.0)


def nearest(u: Tensor, format: str) -> Tensor:
    """Round to the nearest of all codes of the format, written out; ties to the even code, saturating. fp64 u."""
    exponent_bits, mantissa_bits, largest = FORMATS[format]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    subnormal = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    normal = [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 2**exponent_bits) for m in range(steps)]
    codes = torch.tensor([v for v in subnormal + normal if v <= largest], dtype=torch.float64)
    borders = (codes[1:] + codes[:-1]) / 2
    a = u.abs().contiguous()
    below, above = torch.searchsorted(borders, a), torch.searchsorted(borders, a, right=True)
    rounded = codes[torch.where(below % 2 == 0, below, above)]
    return torch.copysign(torch.where(u.isnan(), u, rounded), u)


def mx_exponent(a: Tensor, format: str, rule: str) -> Tensor:
    """Exponent of the shared scale for largest magnitudes a in fp32 (finite): OCP MX "floor" and its three variants."""
    _, mantissa_bits, largest = FORMATS[format]
    if rule == "rceil":
        mantissa, exponent = torch.frexp((a / largest).double())
        return torch.where(mantissa == 0.5, exponent - 1, exponent)
    mantissa, exponent = torch.frexp(a.double())  # a = mantissa 2**exponent, 1/2 <= mantissa < 1
    if rule == "even":
        steps = 2.0 ** (mantissa_bits + 1)
        exponent = exponent + ((mantissa * steps + 0.5).floor() / steps >= 1)
    if rule == "ceil":
        exponent = exponent + (mantissa > 0.5)
    return exponent - 1 - math.floor(math.log2(largest))


def mx(x: Tensor, format: str, rule: str) -> Results:
    """Blocks of 32 along the last axis: y, scale."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    a = blocks.abs().amax(-1, keepdim=True).float()
    exponent = mx_exponent(a, format, rule).double()
    exponent = torch.where(a == 0, -126.0, exponent).clamp(-126, 127)
    scale = torch.where(a.isnan(), math.nan, torch.exp2(exponent))
    y = nearest(blocks.double() / scale, format).to(x.dtype) * scale.to(x.dtype)
    return y.reshape(x.shape), scale.squeeze(-1).float()


def nvfp4(x: Tensor) -> Results:
    """Blocks of 16 in e2m1, their scales in e4m3 over one scale of the tensor: y, scale."""
    outer = x.float().abs().max() / (448.0 * 6.0)
    blocks = x.float().reshape(*x.shape[:-1], -1, 16)
    held = ((blocks.abs().amax(-1, keepdim=True) / 6.0) / outer).clamp(2.0**-6, 448.0)
    held = nearest(held.double(), "e4m3").float()
    code = nearest((blocks * ((1.0 / outer) / held)).double(), "e2m1").float()
    scale = outer * held
    return (code * scale).to(x.dtype).reshape(x.shape), scale.squeeze(-1)


# Data ----------------------------------------------------------------------------------------------------------------

_SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 2.0**-126, 2.0**-24, 1e30, -1e30, 65504.0, 3e38, -3e38)
_SPECIAL += (math.inf, -math.inf, math.nan)


def scales(rows: int, seed: int) -> Tensor:
    """[rows, 1] positive scales, every second one a power of two: its ties are exact in 16 bit as well."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(rows, 1, generator=generator) * 0.05 + 0.02
    s[::2] = torch.exp2(torch.log2(s[::2]).round())
    return s


def data(s: Tensor, dtype: torch.dtype, seed: int, columns: int = 64, special: bool = True) -> Tensor:
    """[rows, columns]: normal values of some six steps, half of them moved to ties of the row's scale and to the two
    numbers beside each; zeros, subnormals, huge values, infinities and NaN strewn in."""
    generator = torch.Generator().manual_seed(seed)
    rows = s.expand(48, 1).float() if s.dim() == 0 else s.float()
    shape = (len(rows), columns)
    x = (torch.randn(shape, generator=generator) * 6 * rows).to(dtype)
    tie = ((torch.randint(-12, 12, shape, generator=generator) + 0.5) * rows).to(dtype)
    kind = torch.randint(0, 6, shape, generator=generator)
    x = torch.where(kind <= 2, tie, x)
    x = torch.where(kind == 1, torch.nextafter(x, x + 1), torch.where(kind == 2, torch.nextafter(x, x - 1), x))
    if special:
        values = torch.tensor(_SPECIAL, dtype=torch.float64).to(dtype)
        at = torch.randperm(x.numel(), generator=generator)[: x.numel() // 10]
        x.view(-1)[at] = values[torch.randint(len(values), at.shape, generator=generator)]
    return x


def blocks(dtype: torch.dtype, size: int = 32, seed: int = 0) -> Tensor:
    """[rows, size] blocks of every magnitude that has a scale of 2**-126 and more in all formats; borders of codes,
    blocks of zeros, powers of two as maxima."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.exp2(torch.arange(-110, 128).double())[:, None]
    normal = torch.randn(len(power), size, generator=generator, dtype=torch.float64) * power
    border = torch.randint(-15, 16, normal.shape, generator=generator) / 4 * power
    border[:, 0] = power[:, 0] * torch.where(torch.arange(len(power)) % 2 == 0, 4.0, -3.75)
    top = torch.finfo(dtype).max
    x = torch.cat([normal, border, torch.zeros(1, size)]).clamp(-top, top)
    return x.to(dtype)
