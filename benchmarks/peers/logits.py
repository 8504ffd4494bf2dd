# SPDX-License-Identifier: Apache-2.0
"""Losses and statistics over logits: ours, and the same in torch's operations as training code has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastflat

from ..cases.logits import NAMES


def ours(data):
    classes = dict(zip(NAMES, data.classes, strict=True))
    return {
        "kl": lambda x, z0: fastflat.softmax_kl(z0, x),
        "js": lambda x, z0: fastflat.softmax_js(z0, x),
        "ce": lambda x, _: fastflat.rebalanced_ce(x, data.y, s=2.0, **classes),
        "stats": lambda x, _: tuple(fastflat.softmax_stats(x, data.y)),
        "scan": lambda x, a: fastflat.affine_logit_scan(a, x, data.y, data.t),
    }[data.case.work]


def eager(data):
    y, (mult, add, margin, weight) = data.y, data.classes

    def kl(x: Tensor, z0: Tensor) -> Tensor:
        log_p, log_q = z0.log_softmax(-1), x.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(0)

    def js(x: Tensor, z0: Tensor) -> Tensor:
        every = torch.cat([z0[None], x]).log_softmax(-1)
        p = every.exp()
        return (p * (every - p.mean(0).clamp(min=1e-12).log())).sum(-1).mean(0)

    def ce(x: Tensor, _: None) -> Tensor:
        a = x * mult + add - F.one_hot(y, x.shape[1]) * margin
        return F.cross_entropy(2.0 * a, y, weight)

    def stats(x: Tensor, _: None) -> tuple[Tensor, ...]:
        p = x.softmax(-1)
        of_label = p.gather(1, y[:, None])
        other = p.scatter(1, y[:, None], 0.0).amax(1)
        curvature = 2 * (p * (1 - p)).amax(1)
        return F.cross_entropy(x, y, reduction="none"), of_label.squeeze(1), other - of_label.squeeze(1), curvature

    def scan(x: Tensor, a: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(a - t * x, y) for t in data.t])

    return {"kl": kl, "js": js, "ce": ce, "stats": stats, "scan": scan}[data.case.work]
