# SPDX-License-Identifier: Apache-2.0
"""The inputs family in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat._ops.inputs import LAWS, NORMS
from fastflat.backends.reference import _elementary, _noise


def _stream(state: Tensor, number: int) -> Tensor:
    return torch.stack([state[0], state[1] + number])


def _strengths(state: Tensor, count: int, law: int, most: float) -> Tensor:
    """fp32 [count]"""
    if law == LAWS["const"]:
        return torch.full((count,), most, dtype=torch.float32, device=state.device)
    drawn = torch.stack(_noise.words(_stream(state, 2), (count + 3) // 4), 1).flatten()[:count]
    u = ((drawn >> 9).to(torch.float32) + 0.5) * 2.0**-23
    limit = torch.tensor(most, dtype=torch.float32, device=state.device)
    return limit * u if law == LAWS["uniform"] else limit * -_elementary.log_of_normal(u)


def inputs_noise(x: Tensor, state: Tensor, K: int, law: int, most: float, keep: float) -> tuple[Tensor, Tensor]:
    n, samples = x.numel(), x.shape[0]
    value = x.to(compute_dtype(x.dtype)).reshape(samples, n // max(samples, 1))
    sigma = _strengths(state, K * samples, law, most).view(K, samples)
    copies, per_copy = [], (n + 7) // 8 * 8
    for k in range(K):
        draw = _noise.normal(state, n, k * per_copy).view(value.shape)
        noise = ((sigma[k] * 3.4641016)[:, None] * draw).to(value.dtype)
        noisy = value + noise
        if keep < 1:
            limit = torch.tensor(keep, dtype=torch.float32, device=x.device)
            kept = _noise.uniform(_stream(state, 1), n, k * per_copy).view(value.shape) < limit
            noisy = torch.where(kept, noisy, value)
        copies.append(noisy.to(x.dtype).view(x.shape))
    return torch.stack(copies) if K else x.new_empty((0, *x.shape)), sigma


def _held(v: Tensor, low, high) -> Tensor:
    v = torch.where(v < low, low, v)
    return torch.where(v > high, high, v)


def _length(v: Tensor) -> Tensor:
    return _elementary.sqrt(v.double().square().sum(1, keepdim=True)).to(v.dtype)


def inputs_pgd_step(
    xa: Tensor,
    x0: Tensor,
    g: Tensor,
    active: Tensor | None,
    step: float,
    eps: float,
    norm: int,
    low: float,
    high: float,
) -> Tensor:
    samples = xa.shape[0]
    a, o, d = (t.to(compute_dtype(t.dtype)).reshape(samples, t.numel() // max(samples, 1)) for t in (xa, x0, g))
    step, eps, low, high = (torch.tensor(v, dtype=a.dtype, device=a.device) for v in (step, eps, low, high))
    if norm == NORMS["linf"]:
        sign = torch.where(d > 0, 1.0, torch.where(d < 0, -1.0, d))
        moved = _held((a + step * sign) - o, -eps, eps)
    else:
        length = _length(d)
        moved = (a + torch.where(length == 0, 0.0, step / length) * d) - o
        distance = _length(moved)
        moved = torch.where(distance > eps, eps / distance, distance * 0.0 + 1.0) * moved
    out = _held(o + moved, low, high)
    if active is not None:
        out = torch.where(active[:, None], out, a)
    return out.to(xa.dtype).view(xa.shape)
