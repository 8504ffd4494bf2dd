# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization modules of ``torch.ao.quantization``."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.integrations._adapter import Adapter, spread
from fastflat.integrations._grid import grid


def _package(name: str) -> Any:
    """A module of torch.ao, if the program has imported it: no model holds its classes otherwise."""
    return sys.modules.get(f"torch.ao.quantization.{name}")


@functools.lru_cache(maxsize=1024)
def _spec(qmin: int, qmax: int, axis: int | None) -> QuantSpec:
    return QuantSpec.torch(axis=axis, **grid(qmin, qmax))


class FakeQuantize(Adapter):
    """torch.ao FakeQuantize."""

    def applies(self, module: nn.Module) -> bool:
        package = _package("fake_quantize")
        return package is not None and isinstance(module, package.FakeQuantize)

    def reason(self, module: nn.Module) -> str | None:
        package = _package("fake_quantize")
        if type(module).forward is not package.FakeQuantize.forward:
            return "its class has a forward of its own"
        if module.zero_point.is_floating_point():
            return "its zero-point is in units of x"
        qmin, qmax = self._ends(module)
        return None if grid(qmin, qmax) else f"no spec has the grid [{qmin}, {qmax}]"

    @staticmethod
    def _ends(module: nn.Module) -> tuple[int, int]:
        return int(module.activation_post_process.quant_min), int(module.activation_post_process.quant_max)

    def forward(self, module: nn.Module, X: Tensor) -> Tensor:
        if module.observer_enabled[0] == 1:
            module.activation_post_process(X.detach())
            scale, zero_point = module.calculate_qparams()
            if module.scale.shape != scale.shape:
                module.scale.resize_(scale.shape)
                module.zero_point.resize_(zero_point.shape)
            module.scale.copy_(scale)
            module.zero_point.copy_(zero_point)
        if module.fake_quant_enabled[0] != 1:
            return X
        axis = module.ch_axis if module.is_per_channel else None
        shape = (-1,) if module.is_per_channel else ()
        zero_point = module.zero_point.to(torch.float32).reshape(shape)
        return fake_quantize(X, module.scale.reshape(shape), zero_point, spec=_spec(*self._ends(module), axis))

    def examples(self, module: nn.Module):
        channels = module.scale.numel() if module.is_per_channel else 1
        shapes = [[5, 6, 7, 3], [9, 11]] if channels == 1 else [[5, 6, 7, 3]]
        for shape in shapes:
            if channels > 1:
                shape[module.ch_axis] = channels
            for seed in range(2):
                yield from ((x,) for x in spread([tuple(shape)], torch.tensor(0.05), seed))
