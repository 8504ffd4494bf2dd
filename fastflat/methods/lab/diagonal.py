# SPDX-License-Identifier: Apache-2.0
"""Diagonal linear networks ``<x, u * v>`` on sparse regression, where SAM's steps have closed forms."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_regression(
    seeds: int, count: int = 20, size: int = 30, nonzero: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noiseless problems with fewer examples than weights: X ``[S, n, d]`` of unit Gaussians, y ``[S, n]``, and the
    true weights ``[S, d]``, ``nonzero`` of which are 1 or -1; float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(seeds, count, size, generator=g, dtype=torch.float64)
    w = torch.zeros(seeds, size, dtype=torch.float64)
    w[:, :nonzero] = torch.randint(0, 2, (seeds, nonzero), generator=g).double() * 2 - 1
    return x, (x @ w[..., None])[..., 0], w


def slopes(x: Tensor, y: Tensor, u: Tensor, v: Tensor, rho: float = 0.0, m: int | None = None) -> tuple[Tensor, Tensor]:
    """(direction in u, direction in v), ``[S, d]`` each, of a SAM step whose ascent is not normalised.

    The loss of one example is ``r^2 / 2``, ``r_k = <x_k, u v> - y_k``; that of several their mean::

        n-SAM, m = n    grad L at (u + rho a v, v + rho a u),   a = X'r / n
        1-SAM, m = 1    mean over k of grad l_k at (u + rho r_k x_k v, v + rho r_k x_k u)

    Args:
        x, y: ``[S, n, d]``, ``[S, n]``.
        u, v: ``[S, d]``.
        rho: radius; 0 is gradient descent.
        m: 1, or None for all n.
    """
    u, v = u[:, None], v[:, None]
    r = (x * (u * v)).sum(-1, keepdim=True) - y[..., None]
    slope = r * x
    if m is None:
        slope = slope.mean(1, keepdim=True)
    elif m != 1:
        raise ValueError(f"methods: m must be 1 or None, got {m!r}")
    if rho:
        u, v = u + rho * slope * v, v + rho * slope * u
        slope = ((x * (u * v)).sum(-1, keepdim=True) - y[..., None]) * x
        if m is None:
            slope = slope.mean(1, keepdim=True)
    return (slope * v).mean(1), (slope * u).mean(1)


def recover(
    x: Tensor, y: Tensor, steps: int, rho: float = 0.0, m: int | None = None, lr: float | None = None
) -> Tensor:
    """The weights ``u v``, ``[S, d]``, after so many steps from ``u = 0.1, v = 0``; rate ``5 / d`` by default."""
    lr = 5.0 / x.shape[-1] if lr is None else lr
    u = torch.full((x.shape[0], x.shape[-1]), 0.1, dtype=x.dtype)
    v = torch.zeros_like(u)
    for _ in range(steps):
        du, dv = slopes(x, y, u, v, rho, m)
        u, v = u - lr * du, v - lr * dv
    return u * v
