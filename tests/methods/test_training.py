# SPDX-License-Identifier: Apache-2.0
"""The training that experiments share: what ends it."""

import pytest
import torch
from torch import nn

from fastflat import evaluate
from fastflat.methods import lab
from fastflat.methods._hook import Hook


class Attacks(Hook):
    """Trains on attacked inputs, after the weights took a value."""

    def __init__(self, weight):
        self.weight = weight

    def loss(self, model, x, y):
        with torch.no_grad():
            model.weight.fill_(self.weight)
        return super().loss(model, evaluate.fgsm(model, x, y, 0.1, lo=None, hi=None), y)


def train(weight, **data):
    x, y = torch.randn(32, 4), data.get("y", torch.arange(32) % 3)
    return lab.fit(nn.Linear(4, 3), lambda m: torch.optim.SGD(m.parameters(), 0.1), (x, y), 3, 0, hook=Attacks(weight))


def test_an_attack_on_a_network_without_numbers_is_a_training_that_diverged():
    with pytest.raises(ArithmeticError, match="the loss is nan at step 0; try a smaller rate"):
        train(float("nan"))


def test_other_refusals_are_no_divergence():
    with pytest.raises(ValueError, match=r"labels|y must"):
        train(0.5, y=torch.full((32,), 7))
