# SPDX-License-Identifier: Apache-2.0
"""The networks that experiments and ``fastflat train`` share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Four 3x3 convolutions of 16, 32, 32 and 64 channels with batch norm, halving the side twice, and one linear
    layer; for small gray images. 3.8 M multiply-adds for one of 28x28."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        widths, strides = (16, 32, 32, 64), (1, 2, 1, 2)
        blocks, before = [], channels
        for width, stride in zip(widths, strides, strict=True):
            conv = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.blocks = nn.Sequential(*blocks)
        left = -(-side // 4)
        self.fc = nn.Linear(before * left * left, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).flatten(1))


class MLP(nn.Module):
    """Two hidden layers of 256 units."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * side * side, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


class _Basic(nn.Module):
    """Residual block of ResNet for CIFAR (He et al., 2016), identity shortcuts padded with zero channels."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        shortcut = x
        if self.stride > 1 or self.more:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for images of 32x32 (He et al., CVPR 2016, section 4.2): 0.27 M parameters."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.fc = nn.Linear(64, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    @staticmethod
    def _stage(before: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(_Basic(before, width, stride), _Basic(width, width, 1), _Basic(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {"convnet": ConvNet, "resnet20": ResNet20, "mlp": MLP}


def ends(model: nn.Module) -> tuple[str, str]:
    """Names of the first and the last layer with a weight, which low-bit training usually leaves in floats."""
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return names[0], names[-1]


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A model for images of `shape`, initialised from `seed` (which stays the state of the global generator).

    Raises:
        ValueError: the images are not square or too small for the model.
    """
    channels, height, width = shape
    if height != width or height < 8:
        raise ValueError(f"train: images must be square and at least 8x8, got {height}x{width}; --image-size resizes")
    torch.manual_seed(seed)
    return MODELS[name](channels, height, classes)
