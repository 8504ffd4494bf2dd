# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware optimizers, and the fused base optimizers under them."""

from fastflat.optim._fused import FusedOptimizer
from fastflat.optim._rules import BASES
from fastflat.optim.bases import LAMB, LARS, SGD, Adam, AdamW, Gadam, GadamX, Padam
from fastflat.optim.eight_bit import AdamW8bit
from fastflat.optim.master import MasterWeights
from fastflat.optim.measure import sharpness
from fastflat.optim.sam import SAM
from fastflat.optim.variants import GNP, GSAM, HERO, SAQ

__all__ = [
    "BASES",
    "GNP",
    "GSAM",
    "HERO",
    "LAMB",
    "LARS",
    "SAM",
    "SAQ",
    "SGD",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "FusedOptimizer",
    "Gadam",
    "GadamX",
    "MasterWeights",
    "Padam",
    "sharpness",
]
