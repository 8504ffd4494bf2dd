# SPDX-License-Identifier: Apache-2.0
"""A small network that the tests of quantized layers share."""

import pytest
import torch
from torch import nn

import fastflat as ff


class Net(nn.Module):
    """Two convolutions and two linear layers, with names worth a pattern."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.layer1 = nn.Sequential(nn.Conv2d(5, 7, 3, stride=2), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(7 * 9, 11), nn.ReLU())
        self.fc = nn.Linear(11, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x).flatten(1)))


WEIGHTS = ff.QuantSpec.lsq(bits=4, axis=0)
ACTIVATIONS = ff.QuantSpec.lsq(bits=4, signed=False)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(6, 3, 7, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(net, x):
    """The network with 4-bit weights and activations, calibrated."""
    ff.prepare(net, weights=WEIGHTS, activations=ACTIVATIONS, skip=("conv1",))
    return ff.calibrate(net, [x])
