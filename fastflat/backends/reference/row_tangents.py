# SPDX-License-Identifier: Apache-2.0
"""The row_tangents family in plain PyTorch: sums in fp64, the rest in the compute type."""

from __future__ import annotations

from torch import Tensor

from fastflat._ops import compute_dtype
from fastflat._ops.row_tangents import count_of
from fastflat.backends.reference import _elementary


def _values(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the compute type."""
    return [None if t is None else t.to(compute_dtype(t.dtype)) for t in tensors]


def _sum(*factors: Tensor) -> Tensor:
    """Of the products over a row, ``[..., 1]``."""
    product = factors[0].double()
    for factor in factors[1:]:
        product = product * factor.double()
    return product.sum(-1, keepdim=True).to(factors[0].dtype)


def _mean(*factors: Tensor) -> Tensor:
    return _sum(*factors) / max(factors[0].shape[-1], 1)


def _added(*terms: Tensor | None) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


def _column(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.unsqueeze(-1)


def row_tangents_norm(
    x: Tensor | None,
    normal: Tensor,
    inv: Tensor,
    weight: Tensor | None,
    along_weight: Tensor | None,
    along_bias: Tensor | None,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k, dtype = count_of("row_tangents_norm", x=x, along_weight=along_weight, along_bias=along_bias), normal.dtype
    x, normal, weight, along_weight, along_bias = _values(x, normal, weight, along_weight, along_bias)
    inv, own = _column(inv), None
    mean = scale = normal.new_zeros(k, len(normal))
    if x is not None:
        m = _mean(x) if centered else mean.unsqueeze(-1)
        s = _mean(x, normal)
        own = ((x - m) - normal * s) * inv
        own = own if weight is None else own * weight
        mean, scale = m.squeeze(-1), (-s * inv * inv).squeeze(-1)
    by_weight = None if along_weight is None else normal * along_weight[:, None]
    by_bias = None if along_bias is None else along_bias[:, None].expand(k, *normal.shape)
    out = _added(own, by_weight, by_bias)
    return out.to(dtype).contiguous(), mean.clone(), scale.clone()


def row_tangents_norm_bwd(
    g: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    along_weight: Tensor | None,
    normal: Tensor,
    grad: Tensor,
    inv: Tensor,
    weight: Tensor | None,
    centered: bool,
) -> Tensor:
    k = count_of("row_tangents_norm_bwd", g=g, x=x, mean=mean, scale=scale, along_weight=along_weight)
    dtype = normal.dtype
    g, x, along_weight, normal, grad, weight = _values(g, x, along_weight, normal, grad, weight)
    inv, mean, scale = map(_column, (inv, mean, scale))
    h = grad if weight is None else grad * weight
    a, b = _mean(h) if centered else 0.0, _mean(h, normal)
    from_x = x if mean is None else (-mean if x is None else x - mean)
    moved = _added(None if from_x is None else from_x * inv, None if scale is None else normal * (scale / inv))
    by_g = g if g is None or weight is None else g * weight
    rh = _added(by_g, None if along_weight is None else grad * along_weight[:, None])
    out = normal.new_zeros(k, *normal.shape)
    if rh is not None:
        out = out + (rh - _mean(rh) if centered else rh) - normal * _mean(rh, normal)
    if moved is not None:
        out = out - normal * _mean(moved.expand_as(out), h) - moved * b
    out = out * inv
    if scale is not None:
        out = out + (h - a - normal * b) * scale
    return out.to(dtype)


def row_tangents_softmax(t: Tensor, p: Tensor, scale: Tensor | None, log: bool) -> Tensor:
    dtype = t.dtype
    t, p = _values(t, p)
    q = _elementary.exp(p) if log else p
    weighted = q if scale is None else scale[:, None] * q
    return (weighted * (t - _sum(t, q))).to(dtype)


def row_tangents_softmax_bwd(g: Tensor | None, along: Tensor | None, p: Tensor, grad: Tensor) -> Tensor:
    count_of("row_tangents_softmax_bwd", g=g, along=along)
    dtype = p.dtype
    g, along, p, grad = _values(g, along, p, grad)
    by_p = None if along is None else along * (grad - _sum(grad, p)) - p * _sum(along, grad)
    by_g = None if g is None else p * (g - _sum(g, p))
    return _added(by_p, by_g).to(dtype)
