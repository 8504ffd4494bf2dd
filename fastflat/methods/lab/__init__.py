# SPDX-License-Identifier: Apache-2.0
"""What experiments share: networks, data, a training loop, measures, and the study that runs all arms and seeds."""

from fastflat.methods.lab.data import Split, images, long_tailed, noisy_labels, two_moons, with_noisy_labels
from fastflat.methods.lab.measures import loss_accuracy, measure, top_eigenvalue
from fastflat.methods.lab.training import Fit, constant, cosine, fit

__all__ = [
    "Fit",
    "Split",
    "constant",
    "cosine",
    "fit",
    "images",
    "long_tailed",
    "loss_accuracy",
    "measure",
    "noisy_labels",
    "top_eigenvalue",
    "two_moons",
    "with_noisy_labels",
]
