# SPDX-License-Identifier: Apache-2.0
"""Noise and attack steps: ours, and in torch's operations as training code has them."""

from __future__ import annotations

import torch
from torch import Tensor

import fastflat

from ..cases.inputs import COPIES, STEPS, STRENGTH


def ours(data):
    case = data.case
    if case.norm is None:
        return lambda x, _: fastflat.noise_batch(x, COPIES, smax=STRENGTH, keep_prob=case.keep)
    step, eps = STEPS[case.norm]
    return lambda x, _: fastflat.pgd_step(x, data.x0, data.g, step=step, eps=eps, norm=case.norm, active=data.active)


def eager(data):
    case, x0, g = data.case, data.x0, data.g

    def noise(x: Tensor, _: None) -> Tensor:
        sigma = STRENGTH * torch.rand(COPIES, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
        xi = torch.randn(COPIES, *x.shape, device=x.device, dtype=x.dtype) * sigma
        if case.keep < 1:
            xi = xi * torch.bernoulli(torch.full_like(xi, case.keep))
        return x + xi

    def length(v: Tensor) -> Tensor:
        return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def linf(x: Tensor, _: None) -> Tensor:
        step, eps = STEPS["linf"]
        moved = (x + step * g.sign() - x0).clamp(-eps, eps)
        return torch.where(data.active.view(-1, 1, 1, 1), (x0 + moved).clamp(0, 1), x)

    def l2(x: Tensor, _: None) -> Tensor:
        step, eps = STEPS["l2"]
        moved = x + step * g / length(g).clamp(min=1e-12) - x0
        moved = moved * (eps / length(moved).clamp(min=1e-12)).clamp(max=1)
        return torch.where(data.active.view(-1, 1, 1, 1), (x0 + moved).clamp(0, 1), x)

    return {None: noise, "linf": linf, "l2": l2}[case.norm]
