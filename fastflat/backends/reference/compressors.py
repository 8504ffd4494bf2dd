# SPDX-License-Identifier: Apache-2.0
"""The compressors family in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat._ops.compressors import NORMS, buckets_of, width
from fastflat.backends.reference import _noise


def _corrected(g: Tensor, error: Tensor | None) -> Tensor:
    p = g.to(compute_dtype(g.dtype)).flatten()
    return p if error is None else p + error.flatten()


def _padded(v: Tensor, multiple: int) -> Tensor:
    """[rows, multiple] with zeros at the end."""
    missing = -v.numel() % multiple
    return torch.cat([v, v.new_zeros(missing)]).view(-1, multiple)


def compressors_units(g: Tensor, error: Tensor | None, norm: int, levels: int, bucket: int, clip: float) -> Tensor:
    p = _corrected(g, error)
    bucket = min(bucket, max(p.numel(), 1))
    rows = _padded(p, bucket)
    v = rows.double()
    count = torch.full((len(rows), 1), bucket, dtype=torch.float64, device=g.device)
    if len(rows):
        count[-1] = p.numel() - (len(rows) - 1) * bucket
    if norm == NORMS["mean"]:
        size = v.abs().sum(1, keepdim=True) / count
    elif norm == NORMS["l2"]:
        size = v.square().sum(1, keepdim=True).sqrt()
    else:
        size = v.abs().amax(1, keepdim=True)
        if clip > 0:
            limit = clip * (v.square().sum(1, keepdim=True) / count).sqrt()
            size = torch.where(size > limit, limit, size)
    return (size / max(levels, 1)).flatten().to(p.dtype)


def _grid(levels: int) -> tuple[int, int]:
    """Step and offset of stored codes."""
    return (2, 1) if levels == 0 else (1, levels)


def _spread(units: Tensor, numel: int, bucket: int) -> Tensor:
    """Units ``[..., buckets]``, one an element."""
    bucket = min(bucket, max(numel, 1))
    return units.repeat_interleave(bucket, -1)[..., :numel]


def compressors_encode_(
    g: Tensor, error: Tensor | None, units: Tensor, state: Tensor | None, levels: int, bucket: int
) -> Tensor:
    p = _corrected(g, error)
    unit = _spread(units.flatten(), p.numel(), bucket)
    if levels == 0:
        stored = torch.where(p < 0, 0, 1)
    else:
        u = _noise.uniform(state, p.numel()).to(p.dtype)
        limit = torch.tensor(levels, dtype=p.dtype, device=p.device)
        ratio = p.abs() / unit
        a = torch.where(ratio < limit, ratio, limit)
        a = torch.where((unit > 0) & unit.isfinite(), a, 0.0)
        level = a.floor() + (u < a - a.floor()).to(p.dtype)
        stored = torch.where(p < 0, -level, level).to(torch.int64) + levels
    if error is not None:
        step, offset = _grid(levels)
        rest = p - unit * (stored * step - offset).to(p.dtype)
        error.copy_(torch.where(unit.isfinite(), rest, error.flatten()).view(error.shape))
    bits = width(levels)
    places = torch.arange(8 // bits, device=g.device) * bits
    return (_padded(stored, 8 // bits) << places).sum(1).to(torch.uint8)


def compressors_decode_(
    out: Tensor, codes: Tensor, units: Tensor, levels: int, bucket: int, factor: float, add: bool
) -> None:
    n, dtype, bits = out.numel(), compute_dtype(out.dtype), width(levels)
    step, offset = _grid(levels)
    places = torch.arange(8 // bits, device=out.device) * bits
    total = torch.zeros(n, dtype=dtype, device=out.device)
    of_workers = units.view(len(codes), buckets_of(n, bucket))
    for code, unit in zip(codes, of_workers, strict=True):
        stored = ((code.to(torch.int64)[:, None] >> places) & (2**bits - 1)).flatten()[:n]
        total = total + _spread(unit, n, bucket) * (stored * step - offset).to(dtype)
    total = total * torch.tensor(factor, dtype=dtype, device=out.device)
    if add:
        total = out.flatten().to(dtype) + total
    out.copy_(total.to(out.dtype).view(out.shape))


def compressors_topk_(g: Tensor, error: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    p = _corrected(g, error)
    # A stable sort keeps equals in their order and has NaN above all.
    order = torch.sort(p.abs(), descending=True, stable=True).indices
    at = order[:k].sort().values
    values = p[at].to(g.dtype)
    if error is not None:
        rest = p[at] - values.to(p.dtype)
        error.copy_(p.index_put((at,), torch.where(rest.isfinite(), rest, 0.0)).view(error.shape))
    return values, at.to(torch.int32)
