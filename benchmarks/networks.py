# SPDX-License-Identifier: Apache-2.0
"""The networks of the benchmarks of whole steps and of curvature."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        stages = []
        for before, width in itertools.pairwise(widths):
            stages += [_Block(before, width, 1 if before == width else 2), _Block(width, width, 1)]
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.fc(self.blocks(x).mean((2, 3)))


class ConvNet(nn.Module):
    """3x3 convolutions with batch norm, the side halved by each after the first, then one linear layer."""

    def __init__(self, channels: int, widths: tuple[int, ...], classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for number, (before, width) in enumerate(itertools.pairwise((channels, *widths))):
            conv = nn.Conv2d(before, width, 3, stride=1 if number == 0 else 2, padding=1, bias=False)
            blocks += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


class SmallResNet18(nn.Module):
    """ResNet-18 for images of 32x32: a 3x3 stem without pooling."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        whole = ResNet18()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1, self.blocks = whole.bn1, whole.blocks
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class TransformerLayer(nn.Module):
    """Attention and a feed-forward net of four times the width, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attended(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    @staticmethod
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in plain operations, of which every tool has derivatives."""
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Transformer(nn.Module):
    """Two layers over vectors, and a class for each sequence."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(TransformerLayer(width, heads) for _ in range(layers)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.layers(x)).mean(1))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for before, size in itertools.pairwise(sizes):
        layers += [nn.Linear(before, size), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
