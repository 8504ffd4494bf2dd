# SPDX-License-Identifier: Apache-2.0
"""Synthetic tones whose pitch is known: labelled data without end for a pitch tracker such as CREPE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Samples per second and in a frame.
RATE, FRAME = 16_000, 1024
#: Bins of 20 cents from this pitch on, in cents above 10 Hz.
BINS, LOWEST = 360, 1997.3794084376191


def tones(count: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Harmonic tones of 65 to 1000 Hz in white noise.

    Each has a pitch drawn evenly in cents, up to 12 harmonics below 7.6 kHz of amplitude ``u / h`` with u even in
    [0.2, 1], random phases, and noise of ``noise`` times its deviation; frames have mean 0 and deviation 1. Such tones
    are no speech.

    Args:
        count: how many.
        seed: of everything that is drawn.
        noise: deviation of the noise beside that of the tone.

    Returns:
        Frames fp32 ``[count, 1024]`` at 16 kHz and pitches in cents above 10 Hz, fp32 ``[count]``.
    """
    g = torch.Generator().manual_seed(seed)
    low, high = (1200 * math.log2(f / 10) for f in (65.0, 1000.0))
    cents = low + (high - low) * torch.rand(count, 1, generator=g, dtype=torch.float64)
    h = torch.arange(1, 13, dtype=torch.float64)
    frequency = 10 * 2 ** (cents / 1200) * h
    amplitude = (0.2 + 0.8 * torch.rand(count, 12, generator=g, dtype=torch.float64)) / h * (frequency < 7600)
    phase = 2 * math.pi * torch.rand(count, 12, generator=g, dtype=torch.float64)
    t = torch.arange(FRAME, dtype=torch.float64) / RATE
    x = torch.zeros(count, FRAME, dtype=torch.float64)
    for k in range(12):
        angle = 2 * math.pi * frequency[:, k, None] * t + phase[:, k, None]
        x += amplitude[:, k, None] * torch.sin(angle)
    x += noise * x.std(1, keepdim=True) * torch.randn(count, FRAME, generator=g, dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x.float(), cents[:, 0].float()


def bins(cents: Tensor) -> Tensor:
    """Targets of binary cross-entropy, fp32 ``[B, 360]``: a bell of deviation 25 cents over the bins.

    Source: Kim, Salamon, Li and Bello, CREPE, ICASSP 2018, equation 3.
    """
    centres = LOWEST + 20 * torch.arange(BINS, device=cents.device)
    return torch.exp(-((centres - cents[:, None]) ** 2) / (2 * 25.0**2)).float()


def pitch(scores: Tensor) -> Tensor:
    """Pitch in cents above 10 Hz of scores (logits) ``[B, 360]``: the mean of the nine bins about the highest, weighted
    by their probability."""
    p = scores.sigmoid()
    at = p.argmax(1, keepdim=True) + torch.arange(-4, 5, device=p.device)
    weight = p.gather(1, at.clamp(0, BINS - 1)) * ((at >= 0) & (at < BINS))
    return ((LOWEST + 20 * at) * weight).sum(1) / weight.sum(1).clamp(min=1e-12)


def within(scores: Tensor, cents: Tensor, most: float = 50.0) -> float:
    """Share of frames whose pitch is found within so many cents."""
    return float(((pitch(scores) - cents).abs() <= most).double().mean())
