# SPDX-License-Identifier: Apache-2.0
"""The weight_norms family in plain PyTorch: sums in fp64, the rest in the compute type."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat.backends.reference import _elementary


def _value(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def weight_norms_reduce(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value = _value(w)
    dtype, columns = value.dtype, w.shape[1]
    mean = (value.double().sum(1) / columns).to(dtype)
    d = value - mean[:, None]
    m2, m3 = ((p.double().sum(1) / columns).to(dtype) for p in (d * d, (d * d) * d))
    skew = torch.where(m2 == 0, 0.0, m3 / (m2 * _elementary.sqrt(m2)))
    size = value.abs()
    rows, cols = (size.double().sum(axis).to(dtype) for axis in (1, 0))
    known = torch.where(size.isnan(), -1.0, size)
    most = known.amax() if known.numel() else known.new_zeros(())
    most = most.clamp(min=0.0)
    absmax = torch.stack([most, (known == most).sum().to(dtype)])
    return torch.stack([mean, m2, skew]), rows, cols, absmax


def weight_norms_reduce_bwd(
    g_moments: Tensor, g_row: Tensor, g_col: Tensor, g_absmax: Tensor, w: Tensor, moments: Tensor, absmax: Tensor
) -> Tensor:
    value, n = _value(w), w.shape[1]
    (g_mean, g_var, g_skew), (mean, var, skew) = g_moments.unbind(), moments.unbind()
    spread = var != 0
    by_root = torch.where(spread, g_skew / (var * _elementary.sqrt(var)), 0.0)
    by_var = torch.where(spread, (3.0 * (g_skew * skew)) / var, 0.0)
    a, b, c = (g_mean - 3.0 * (by_root * var)) / n, (2.0 * g_var - by_var) / n, (3.0 * by_root) / n
    d = value - mean[:, None]
    sign = torch.where(value > 0, 1.0, torch.where(value < 0, -1.0, 0.0)).to(value.dtype)
    largest = torch.where(value.abs() == absmax[0], g_absmax / absmax[1], 0.0)
    norms = (g_row[:, None] + g_col) + largest
    return ((a[:, None] + d * (b[:, None] + c[:, None] * d)) + sign * norms).to(w.dtype)


def _tanh(x: Tensor) -> Tensor:
    z = x * x
    above = x * (135135.0 + z * (17325.0 + z * (378.0 + z)))
    below = 135135.0 + z * (62370.0 + z * (3150.0 + z * 28.0))
    return torch.where(x.abs() < 0.5, above / below, _elementary.tanh(x))


def weight_norms_saturate(w: Tensor, alpha: Tensor) -> Tensor:
    return (alpha * _tanh(_value(w) / alpha)).to(w.dtype).contiguous()


def weight_norms_saturate_bwd(gy: Tensor, w: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    g, x = _value(gy), _value(w) / alpha
    t = _tanh(x)
    slope = 1.0 - t * t
    return (g * slope).to(w.dtype).contiguous(), (g * (t - x * slope)).double().sum().to(alpha.dtype)
