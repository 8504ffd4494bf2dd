# SPDX-License-Identifier: Apache-2.0
"""What :func:`fastflat.accelerate` gives a training step with another library's quantizers: the step with them, the
same step with them accelerated, and without any, which is the most that could be had.

With their times T, A and N: ``share = 1 - N/T`` of the step are quantizers, ``cap = T/N``, ``speedup = T/A``,
``reached = speedup / cap = N/A``, ``removed = (T - A) / (T - N)`` of the quantizers' time.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastflat

from . import measure
from .measure import Effort


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
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        self.blocks = nn.Sequential(*(_Residual(a, b) for a, b in itertools.pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.quant(x))))
        return self.dequant(self.fc(self.blocks(x).mean((2, 3))))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward net of four times the width, each after a layer norm and beside a shortcut."""

    def __init__(self, dim: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def torch_ao(version: int = 1, batch: int = 32) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
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
    # Batches differ, as in training: the range of one and the same would be known after a few steps.
    batches = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))) for _ in range(16)]
    return model, _in_turn(batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))


def torchao_block(group: int = 32) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A transformer block of width 512 with 8 heads over 16 x 128 tokens: activations in int8, dynamic per token,
    weights in int4 by groups."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    torch.manual_seed(0)
    model = TransformerBlock().train()
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=group)
    quantize_(model, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    batches = [torch.randn(16, 128, 512) for _ in range(4)]
    return model, _in_turn(batches, lambda m, x: m(x).square().mean())


def _in_turn(batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Callable[[nn.Module], Tensor]:
    """The loss of a model on the next batch; each model has its own place in the cycle."""
    places: dict[int, Iterator[Any]] = {}

    def on_the_next(model: nn.Module) -> Tensor:
        return loss(model, next(places.setdefault(id(model), itertools.cycle(batches))))

    return on_the_next


#: Models with another library's quantizers and their losses, by name.
CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "torch.ao ResNet-20": torch_ao,
    "torch.ao ResNet-20, not fused": lambda: torch_ao(version=0),
    "torchao transformer block": torchao_block,
}


def without(model: nn.Module) -> nn.Module:
    """A copy in which the quantizers that fastflat would compute hand on what they are given."""
    found = {e.names[0] for e in fastflat.accelerate(copy.deepcopy(model)).swapped}
    plain = copy.deepcopy(model)
    for name in found:
        plain.get_submodule(name).forward = lambda x: x
    return plain


def compare(name: str, effort: Effort, threads: int = 1) -> dict[str, Any]:
    """One row: seconds of a step of SGD in the three forms, taking turns, and what follows from them."""
    with warnings.catch_warnings(), measure.threads(threads):
        warnings.simplefilter("ignore")
        model, loss = CASES[name]()
        for _ in range(16):  # averages settle
            loss(model)
        ours = copy.deepcopy(model)
        report = fastflat.accelerate(ours)
        models = {"theirs": model, "accelerated": ours, "without": without(model)}
        taken = measure.interleaved({key: _step(m, loss) for key, m in models.items()}, effort)
    share = 1 - 1 / taken["theirs"].over(taken["without"])
    seconds = {key: t.median for key, t in taken.items()}
    gained = [(t - a) / (t - n) for t, a, n in zip(*(taken[k].samples for k in models), strict=True)]
    return {
        "case": name,
        "threads": threads,
        "rounds": taken["theirs"].rounds,
        "swapped": len(report.swapped),
        "left": len(report.left),
        **{f"seconds_{key}": value for key, value in seconds.items()},
        "share": share,
        "cap": taken["theirs"].over(taken["without"]),
        "speedup": taken["theirs"].over(taken["accelerated"]),
        "reached": taken["without"].over(taken["accelerated"]),
        "removed": sorted(gained)[len(gained) // 2],
    }


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    # A rate this small keeps every model where it began, however often it is timed.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model).backward()
        optimizer.step()

    return step


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    heads = f"{'theirs':>9} {'ours':>9} {'without':>9} {'share':>7} {'cap':>6} {'speedup':>8} {'of cap':>7}"
    lines = [f"{'step':32} {heads}"]
    for row in rows:
        times = " ".join(f"{row[f'seconds_{key}'] * 1e3:6.1f} ms" for key in ("theirs", "accelerated", "without"))
        rest = f"{row['share']:7.1%} {row['cap']:5.2f}x {row['speedup']:7.2f}x {row['reached']:7.1%}"
        lines.append(f"{row['case']:32} {times} {rest}")
    return "\n".join(lines)
