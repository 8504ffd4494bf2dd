# SPDX-License-Identifier: Apache-2.0
"""Networks with other libraries' quantizers, as their users make them, for measuring :func:`fastflat.accelerate`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastflat

from . import networks

_HOME_MADE = "LSQ of benchmarks/peer_models.py"

#: Of the stages of ResNet-20 for CIFAR-10 (He et al., CVPR 2016), before and after each block.
WIDTHS = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network with another library's quantizers.

    Attributes:
        model: in training mode, its scales not yet settled.
        loss: of a model on the next batch. Batches differ, as in training: the range of one and the same would be known
            after a few steps.
        without: a copy of a model in which the quantizers hand on what they are given.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    without: Callable[[nn.Module], nn.Module]


class _Residual(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        from torch.ao.nn.quantized import FloatFunctional

        super().__init__()
        stride = 1 if before == width else 2
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu1, self.relu2, self.sum = nn.ReLU(), nn.ReLU(), FloatFunctional()
        self.shortcut = nn.Identity() if before == width else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.sum.add(y, self.shortcut(x)))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al. 2016), with the stubs and sums that torch.ao's eager mode asks for."""

    def __init__(self) -> None:
        from torch.ao.quantization import DeQuantStub, QuantStub

        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in itertools.pairwise(WIDTHS)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.quant(x))))
        return self.dequant(self.fc(self.blocks(x).mean((2, 3))))


class TransformerBlock(networks.TransformerLayer):
    """With PyTorch's fused attention."""

    attended = staticmethod(F.scaled_dot_product_attention)


def torch_ao(version: int, batch: int) -> Subject:
    """ResNet-20 by ``prepare_qat`` with torch.ao's default configuration for x86: 8 bits, weights by channel; version 0
    has the modules that are not fused."""
    from torch.ao import quantization as tq

    torch.manual_seed(0)
    model = ResNet20().train()
    model.qconfig = tq.get_default_qat_qconfig("x86", version=version)
    pairs = [["conv1", "bn1", "relu"]]
    for i in range(9):
        block = f"blocks.{i}."
        pairs += [[block + "conv1", block + "bn1", block + "relu1"], [block + "conv2", block + "bn2"]]
    tq.fuse_modules_qat(model, pairs, inplace=True)
    tq.prepare_qat(model, inplace=True)
    return Subject(model, _in_turn(_images(batch), _classes), _passed_on)


def torchao_block(batch: int, group: int = 32) -> Subject:
    """A transformer block of width 512 with 8 heads over sequences of 128 tokens: activations in int8, dynamic per
    token, weights in int4 by groups."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    torch.manual_seed(0)
    model = TransformerBlock(512, 8).train()
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=group)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    batches = [torch.randn(batch, 128, 512) for _ in range(4)]
    return Subject(model, _in_turn(batches, lambda m, x: m(x).square().mean()), _passed_on)


class _Sum(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, before: int, width: int, conv: Callable[..., nn.Module], relu: Callable[[], nn.Module]) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1, self.bn1 = conv(before, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = relu(), relu()
        self.shortcut = nn.Identity() if before == width else conv(before, width, 1, stride, 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def _resnet(
    conv: Callable[..., nn.Module], relu: Callable[[], nn.Module], first: nn.Module, last: nn.Module
) -> nn.Sequential:
    """ResNet-20 of these layers."""
    blocks = [_Sum(a, b, conv, relu) for a, b in itertools.pairwise(WIDTHS)]
    stem = [first, nn.BatchNorm2d(16), relu()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).train()


def brevitas_resnet(batch: int) -> Subject:
    """ResNet-20 of Brevitas' layers, 4 bits for weights and activations, 8 at both ends; statistics of activations are
    collected and over."""
    from brevitas import nn as qnn

    torch.manual_seed(0)
    model = _resnet(
        functools.partial(qnn.QuantConv2d, bias=False, weight_bit_width=4),
        functools.partial(qnn.QuantReLU, bit_width=4),
        qnn.QuantConv2d(3, 16, 3, 1, 1, bias=False, weight_bit_width=8),
        qnn.QuantLinear(64, 10, bias=True, weight_bit_width=8),
    )
    batches = _images(batch)
    model(batches[0][0])
    for module in model.modules():
        if hasattr(module, "collect_stats_steps"):
            module.counter = module.collect_stats_steps
    return Subject(model, _in_turn(batches, _classes), _disabled)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class LearnedStep(nn.Module):
    """LSQ as scripts have it: its gradient factor comes by a sum (Esser et al., ICLR 2020, section 2.2)."""

    def __init__(self, low: int, high: int, channels: int = 0) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.step = nn.Parameter(torch.full((channels, 1, 1, 1) if channels else (), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0 / (x.numel() * self.high) ** 0.5
        step = (self.step - self.step * factor).detach() + self.step * factor
        return _Round.apply((x / step).clamp(self.low, self.high)) * step


class _LearnedConv(nn.Conv2d):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.of_weight, self.of_input = LearnedStep(-8, 7, self.out_channels), LearnedStep(0, 15)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.of_input(x), self.of_weight(self.weight), self.bias)


def lsq_resnet(batch: int) -> Subject:
    """ResNet-20 with a home-made LSQ, 4 bits, behind an adapter made of its attributes' names; both ends in floats."""
    from fastflat.integrations import Plain, register

    if not any(adapter.name == _HOME_MADE for adapter in fastflat.integrations.registered()):
        register(Plain(_HOME_MADE, [LearnedStep], scale="step", grid=("low", "high")))
    torch.manual_seed(0)
    conv = functools.partial(_LearnedConv, bias=False)
    model = _resnet(conv, nn.ReLU, nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.Linear(64, 10))
    return Subject(model, _in_turn(_images(batch), _classes), _passed_on)


def _in_turn(batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module], Tensor]:
    """The loss of a model on the next batch; each model has its own place in the cycle."""
    places: dict[int, Iterator[Any]] = {}

    def on_the_next(model: nn.Module) -> Tensor:
        return loss(model, next(places.setdefault(id(model), itertools.cycle(batches))))

    return on_the_next


def _images(batch: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(16)]


def _classes(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _passed_on(model: nn.Module) -> nn.Module:
    """What fastflat would compute hands on its input."""
    plain = copy.deepcopy(model)
    for entry in fastflat.accelerate(copy.deepcopy(model)).swapped:
        plain.get_submodule(entry.names[0]).forward = lambda x: x
    return plain


def _disabled(model: nn.Module) -> nn.Module:
    """By Brevitas' own switch; activation functions stay."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "disable_quant"):
            module.disable_quant = True
    return plain


#: Subjects of a number of samples, by name, with the package that each needs.
SUBJECTS: dict[str, tuple[str, Callable[[int], Subject]]] = {
    "torch.ao": ("torch", lambda batch: torch_ao(1, batch)),
    "torch.ao-unfused": ("torch", lambda batch: torch_ao(0, batch)),
    "torchao": ("torchao", torchao_block),
    "brevitas": ("brevitas", brevitas_resnet),
    "lsq": ("torch", lsq_resnet),
}
