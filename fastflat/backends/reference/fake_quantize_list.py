# SPDX-License-Identifier: Apache-2.0
"""The fake_quantize_list family in plain PyTorch: one tensor after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat.backends.reference.fake_quantize import fake_quantize, fake_quantize_bwd


def fake_quantize_list(
    xs: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor | None],
    qmin: list[int],
    qmax: list[int],
    axis: list[int],
    group: list[int],
    eps: list[float],
    rules: list[int],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    zeros = zero_points or [None] * len(xs)
    calls = zip(xs, scales, zeros, qmin, qmax, axis, group, eps, rules, strict=True)
    return [fake_quantize(*call, dtype) for call in calls]


def fake_quantize_list_bwd(
    gys: list[Tensor],
    xs: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor | None],
    qmin: list[int],
    qmax: list[int],
    axis: list[int],
    group: list[int],
    eps: list[float],
    rules: list[int],
    factor: list[float],
    need_scale: list[int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    zeros = zero_points or [None] * len(xs)
    calls = zip(gys, xs, scales, zeros, qmin, qmax, axis, group, eps, rules, factor, map(bool, need_scale), strict=True)
    found = [fake_quantize_bwd(*call) for call in calls]
    gxs, gss, gzs = ([each[k] for each in found] for k in range(3))
    any_zero = any(need and z is not None for need, z in zip(need_scale, zeros, strict=True))
    return gxs, gss if any(need_scale) else [], gzs if any_zero else []
