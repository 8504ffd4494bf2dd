# SPDX-License-Identifier: Apache-2.0
"""Small networks and plain, slow forms of the methods, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A convolution, batch normalisation, dropout, a linear layer, a frozen and an unused parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, dtype=dtype)
        self.norm = nn.BatchNorm2d(6, dtype=dtype)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6 * 36, 5, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x).flatten(1))


def net(seed: int = 0, dtype=torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(dtype).to(memory_format=torch.channels_last)


def batch(seed: int = 0, dtype=torch.float32, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=g).to(dtype), torch.randint(0, 5, (size,), generator=g)


def closure_of(opt, model: nn.Module, x: Tensor, y: Tensor):
    def closure() -> Tensor:
        opt.zero_grad()
        z = model(x)
        loss = F.cross_entropy(z.float() if z.element_size() < 4 else z, y)
        loss.backward()
        return loss

    return closure


def bits(model: nn.Module) -> list[Tensor]:
    """The parameters' bits, copied."""
    view = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [p.detach().clone().contiguous().view(view[p.element_size()]) for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Vector(nn.Module):
    """A parameter vector, for closed forms."""

    def __init__(self, *values: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def plain_sam(params, gradient, base, rho, adaptive=False, eta=0.0) -> None:
    """One step as the papers write it, tensor by tensor: ``gradient()`` fills .grad, ``base`` is torch's optimizer."""
    base.zero_grad()
    gradient()
    with torch.no_grad():
        sizes = [p.abs() + eta if adaptive else torch.ones_like(p) for p in params]
        norm = torch.stack([(t * p.grad).norm() for t, p in zip(sizes, params, strict=True)]).norm()
        before = [p.clone() for p in params]
        for t, p in zip(sizes, params, strict=True):
            p.add_(rho / norm * t * t * p.grad)
    base.zero_grad()
    gradient()
    with torch.no_grad():
        for p, w in zip(params, before, strict=True):
            p.copy_(w)
    base.step()
