# SPDX-License-Identifier: Apache-2.0
"""Training and accuracy of a network under attack, for experiments on normalised images."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import evaluate
from fastflat.evaluate import _runs
from fastflat.functional import softmax_kl
from fastflat.methods._contract import Settings
from fastflat.methods._hook import Hook
from fastflat.methods.lab import training
from fastflat.methods.lab.data import Split, images
from fastflat.methods.lab.networks import MLP
from fastflat.optim import SGD

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


def fgsm_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, lo: float, hi: float) -> Tensor:
    """FGSM in the ``linf`` ball."""
    return evaluate.fgsm(model, x, y, eps, lo=lo, hi=hi)


def margin_attack(steps: int, seed: int = 0) -> Attack:
    """PGD on the margin of the logits, whose gradient does not vanish where the network is sure, from random points."""

    def margin(logits: Tensor, y: Tensor) -> Tensor:
        own = F.one_hot(y, logits.shape[1]).bool()
        return logits.masked_fill(own, -math.inf).amax(1) - logits[own]

    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, lo: float, hi: float) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return evaluate.pgd(model, x, y, eps, steps=steps, loss=margin, lo=lo, hi=hi, generator=g)

    return attack


def ball(eps: float, settings: Settings) -> tuple[float, float, float]:
    """(radius, lo, hi) in units of the normalised images, for a radius in units of images in [0, 1]."""
    lo, hi = pixel_range(images(settings.images, settings.test_images))
    return eps * (hi - lo), lo, hi


def fit(hook: Hook, seed: int, settings: Settings) -> tuple[Split, training.Fit]:
    """Fashion-MNIST, and a network of two hidden layers that a hook trains on its images, clamped to
    :func:`pixel_range`, by SGD with momentum."""
    parts = images(settings.images, settings.test_images)
    train = (parts.train[0].clamp(*pixel_range(parts)), parts.train[1])

    def make(m: nn.Module) -> torch.optim.Optimizer:
        return SGD(m.parameters(), lr=settings.choice["lr"], momentum=0.9, weight_decay=5e-4)

    net = functools.partial(MLP, 1, 28, parts.classes)
    return parts, training.fit(net, make, train, settings.steps, seed, batch=settings.batch, hook=hook)


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
