# SPDX-License-Identifier: Apache-2.0
"""K products with a network's Hessian or Gauss-Newton matrix at one batch, or quadratic forms, in fp32, at parameters
that have moved: linearisation and graphs are part of the call, what a tool does once for a model and a shape (tracing,
compiling) is not.

Networks are in eval mode (batch norm with its running statistics), plain or with quantizers of 4 bits for weights and
activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import fastflat
from fastflat import QuantSpec

from . import networks


@dataclasses.dataclass(frozen=True)
class Network:
    """How to make a network, and the shape of a batch for it."""

    make: Callable[[], nn.Module]
    batch: tuple[int, ...]


NETWORKS: dict[str, Network] = {
    "mlp": Network(lambda: networks.mlp(784, 1024, 512, 256, 128, 64, 10), (128, 784)),
    "convnet": Network(lambda: networks.ConvNet(3, (32, 64, 128, 160)), (32, 3, 32, 32)),
    "small": Network(lambda: networks.ConvNet(1, (16, 32, 40)), (16, 1, 28, 28)),
    "transformer": Network(networks.Transformer, (8, 64, 128)),
    "resnet18": Network(networks.SmallResNet18, (8, 3, 32, 32)),
}
#: Products with the Hessian or the Gauss-Newton matrix; ``v^T H v``, of which a trace is the mean.
MODES = ("hessian", "ggn", "forms")


@dataclasses.dataclass(frozen=True)
class ProductCase:
    """One measurement.

    Attributes:
        network: of :data:`NETWORKS`.
        quantized: whether weights and activations have quantizers.
        k: vectors.
        mode: of :data:`MODES`.
    """

    network: str
    quantized: bool
    k: int
    mode: str = "hessian"

    @property
    def label(self) -> str:
        return f"{self.mode} {self.network}{' quantized' if self.quantized else ''} K={self.k}"

    def data(self, device: torch.device) -> ProductData:
        of = NETWORKS[self.network]
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(0)
            model, x = of.make().eval(), torch.randn(of.batch)
        finally:
            torch.random.set_rng_state(state)
        if self.quantized:
            weights, activations = QuantSpec.lsq(bits=4, axis=0), QuantSpec.lsq(bits=4)
            model = fastflat.prepare(model, weights=weights, activations=activations)
            fastflat.calibrate(model, [x])
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(10, (len(x),), generator=generator)
        n = sum(p.numel() for p in model.parameters())
        v = torch.randn(self.k, n, generator=generator)
        return ProductData(self, model.eval().to(device), x.to(device), y.to(device), v.to(device))


@dataclasses.dataclass(frozen=True)
class ProductData:
    """Model, one batch and K vectors ``[K, n]`` of a case."""

    case: ProductCase
    model: nn.Module
    x: Tensor
    y: Tensor
    v: Tensor

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def split(self, v: Tensor) -> list[Tensor]:
        """``[K, n]`` as one tensor ``[K, *shape]`` for each parameter."""
        sizes = [p.numel() for p in self.parameters()]
        return [t.reshape(len(v), *p.shape) for t, p in zip(v.split(sizes, 1), self.parameters(), strict=True)]


def cases(
    names: Sequence[str] = ("mlp", "convnet", "small", "transformer"),
    quantized: Sequence[bool] = (False, True),
    counts: Sequence[int] = (1, 8),
    modes: Sequence[str] = MODES,
) -> Iterator[ProductCase]:
    for mode in modes:
        for name in names:
            for with_quantizers in quantized:
                for k in counts:
                    yield ProductCase(name, with_quantizers, k, mode)
