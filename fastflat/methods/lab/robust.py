# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a network under attack, for experiments on normalised images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import evaluate
from fastflat.evaluate import _runs
from fastflat.functional import softmax_kl
from fastflat.methods._hook import Hook
from fastflat.methods.lab.data import Split

#: ``attack(model, x, y, eps, lo, hi) -> x'``.
Attack = Callable[[nn.Module, Tensor, Tensor, float, float, float], Tensor]


def pixel_range(parts: Split) -> tuple[float, float]:
    """(lo, hi): black and white after the normalisation; their difference is that of [0, 1] in these units."""
    return float(parts.train[0].min()), float(parts.train[0].max())


def pgd_attack(steps: int, seed: int = 0) -> Attack:
    """PGD of so many steps in the ``linf`` ball, from random points of a seed."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, lo: float, hi: float) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return evaluate.pgd(model, x, y, eps, steps=steps, lo=lo, hi=hi, generator=g)

    return attack


def crafted(model: nn.Module, x: Tensor, y: Tensor, eps: float, **options: Any) -> Tensor:
    """Inputs of PGD for training, in evaluation mode; each call draws its own random start."""
    with _runs.evaluating(model):
        return evaluate.pgd(model, x, y, eps, **options)


class AdversarialTraining(Hook):
    """Cross-entropy at inputs of PGD (Madry et al. 2018), of the radius and options of :func:`crafted`."""

    def __init__(self, eps: float, **options: Any):
        self._options = {"eps": eps, **options}

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(crafted(model, x, y, **self._options))
        return F.cross_entropy(scores, y), scores


class TRADES(Hook):
    """Cross-entropy at x, and beta times the divergence from the scores at x to those at the inputs of PGD that makes
    it largest (Zhang et al., ICML 2019, equation 5)."""

    def __init__(self, eps: float, beta: float = 6.0, **options: Any):
        self._beta, self._options = beta, {"eps": eps, "loss": lambda logits, to: softmax_kl(to, logits), **options}

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), _runs.undisturbed(model, evaluating=True):
            clean = model(x)
        moved = crafted(model, x, clean, **self._options)
        scores = model(x)
        return F.cross_entropy(scores, y) + self._beta * softmax_kl(scores, model(moved)).mean(), scores


def robust_correct(model: nn.Module, parts: Split, part: str, eps: float, attack: Attack) -> Tensor:
    """Whether each example of a part is recognised after the attack, bool ``[N]``; in evaluation mode, within a radius
    ``eps`` in units of images in [0, 1] and within their range."""
    lo, hi = pixel_range(parts)
    found = []
    with _runs.evaluating(model):
        for x, y in parts.batches(part):
            moved = attack(model, x.clamp(lo, hi), y, eps * (hi - lo), lo, hi)
            with torch.no_grad():
                found.append(model(moved).argmax(1) == y)
    return torch.cat(found)
