# SPDX-License-Identifier: Apache-2.0
"""Quantizers that round on the unit interval, ``round(x n) / n`` with n = 2**bits - 1: DoReFa (Zhou et al., 2016), PACT
(Choi et al., 2018) and EWGS (Lee et al., CVPR 2021), as projects write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.integrations._adapter import Adapter, placed, spread
from fastflat.integrations._grid import remembered

_WIDE = (torch.float32, torch.float64)


def _spec(bits: int, mask: str) -> QuantSpec:
    return QuantSpec(bits=bits, signed=False, arithmetic="inverse", mask=mask)


def _unit(x: Tensor, bits: int, mask: str) -> Tensor:
    """round(x n) / n on [0, 1], the gradient by the mask."""
    return fake_quantize(x, torch.ones((), dtype=x.dtype, device=x.device), spec=remembered(_spec, bits, mask))


def _usual(x: Tensor, bits: int) -> bool:
    return not torch.compiler.is_compiling() and x.dtype in _WIDE and 2 <= bits <= 16


class DorefaActivations(Adapter):
    """DoReFa activations: clamp to [0, 1], then round."""

    kind, bits = "activation_quantize_fn", "a_bit"

    def applies(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.kind and hasattr(module, self.bits)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        bits = int(getattr(module, self.bits))
        return _unit(x, bits, "before") if _usual(x, bits) else self.original(module, x)

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        dtype, device = placed(module)
        step = torch.tensor(1.0 / (2 ** min(int(getattr(module, self.bits)), 8) - 1))
        yield from ((x.to(device, dtype),) for seed in range(2) for x in spread([(4, 6, 5, 5), (9, 7)], step, seed))


class DorefaWeights(DorefaActivations):
    """DoReFa weights: tanh, to the unit interval by the largest, round; times the largest again."""

    kind, bits = "weight_quantize_fn", "w_bit"
    scaled = True

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        bits = int(getattr(module, self.bits))
        if not _usual(x, bits):
            return self.original(module, x)
        squashed = torch.tanh(x)
        largest = squashed.abs().max().detach()
        y = 2 * _unit(squashed / 2 / largest + 0.5, bits, "none") - 1
        return largest * y if self.scaled else y

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        yield from super().examples(module)
        yield from ((x * (0.5 / x.abs().max()),) for (x,) in super().examples(module))


class DorefaUnitWeights(DorefaWeights):
    """DoReFa weights on [-1, 1]."""

    scaled = False


class Clipped(Function):
    """PACT: round(clamp(x, 0, alpha) k) / k with k = n / alpha; x passes its gradient in [0, alpha], alpha gets it from
    alpha on."""

    @staticmethod
    def forward(ctx, x, alpha, bits):
        ctx.save_for_backward(x, alpha)
        return fake_quantize(x, alpha.detach().reshape(()), spec=remembered(_spec, bits, "none"))

    @staticmethod
    def backward(ctx, g):
        x, alpha = ctx.saved_tensors
        inside = (x >= 0) & (x <= alpha)
        return torch.where(inside, g, 0.0), (g * (x >= alpha)).sum().reshape(alpha.shape), None


class Pact(Adapter):
    """PACT activations.

    Args:
        kinds: names of classes.
        alpha: the attribute that holds the clipping value, a parameter of one element.
        bits: the attribute that holds the number of bits.
    """

    def __init__(self, kinds: list[str], alpha: str = "alpha", bits: str = "bits"):
        self.kinds, self.alpha, self.bits = tuple(kinds), alpha, bits
        self.summed = (alpha,)

    def applies(self, module: nn.Module) -> bool:
        alpha = getattr(module, self.alpha, None)
        known = type(module).__name__ in self.kinds and isinstance(getattr(module, self.bits, None), int)
        return known and isinstance(alpha, Tensor) and alpha.numel() == 1

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        alpha, bits = getattr(module, self.alpha), getattr(module, self.bits)
        if not _usual(x, bits) or alpha.dtype is not x.dtype:
            return self.original(module, x)
        return Clipped.apply(x, alpha, bits)

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        dtype, device = placed(module)
        step = getattr(module, self.alpha).detach().float().abs().reshape(()) / (
            2 ** min(getattr(module, self.bits), 8)
        )
        yield from ((x.to(device, dtype),) for seed in range(2) for x in spread([(4, 6, 5, 5), (9, 7)], step, seed))


class Discretized(Function):
    """round(x n) / n with the gradient ``g (1 + factor sign(g) (x - y))``."""

    @staticmethod
    def forward(ctx, x, levels, factor):
        y = _unit(x, int(levels).bit_length() - 1, "none")
        ctx.save_for_backward(x - y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx, g):
        (rest,) = ctx.saved_tensors
        return g * (1 + ctx.factor * torch.sign(g) * rest), None, None


class Ewgs(Adapter):
    """EWGS layer: its discretizer alone is replaced, what surrounds it stays its own."""

    kind, discretizer = "QConv", "EWGS_discretizer"

    def applies(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.kind and callable(vars(module).get(self.discretizer))

    def forward(self, module: nn.Module, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(module, *args)
        theirs = vars(module)[self.discretizer]

        def ours(x: Tensor, levels: Any, factor: Any, *more: Any) -> Tensor:
            count = int(levels)
            known = not more and x.dtype in _WIDE and count > 2 and count & (count - 1) == 0
            return Discretized.apply(x, count, factor) if known else theirs(x, levels, factor, *more)

        vars(module)[self.discretizer] = ours
        try:
            return self.original(module, *args)
        finally:
            vars(module)[self.discretizer] = theirs

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        dtype, device = placed(module)
        reach = (d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True))
        shape = (2, module.in_channels, *reach)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            yield (torch.randn(shape, generator=generator).to(device, dtype),)


def popular() -> list[Adapter]:
    """For the classes that many copy."""
    pact = [Pact(["PACT", "PACTAct", "PactActivation"], bits=bits) for bits in ("bits", "k", "nbits")]
    return [DorefaActivations(), DorefaWeights(), DorefaUnitWeights(), *pact, Ewgs()]
