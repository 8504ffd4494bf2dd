# SPDX-License-Identifier: Apache-2.0
"""Fake quantizers of torchao's quantization-aware training: ``IntxFakeQuantizer``, which ``quantize_`` with a
``QATConfig`` puts into linear layers and embeddings.

Scales of the dynamic forms are computed in the type of x, an operation at a time, and count as constants. With m and M
the extremes of a token, row or group, N = qmax - qmin::

    per token             s = max((max(M, 0) - min(m, 0)) / N, eps),  z = clamp(qmin - round(min(m, 0) / s), qmin, qmax)
    symmetric             s = max(max(-m, M, 0) / (N / 2), eps),      z = 0
    asymmetric in groups  s = max((M - m) / N, eps),                  z = int(m + s 2**(bits - 1))
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat._spec import TINY, QuantSpec
from fastflat.functional import fake_quantize
from fastflat.integrations._adapter import Adapter, placed, spread
from fastflat.integrations._grid import grid, remembered
from fastflat.integrations._tensors import UP_TO_32, plain


def _module(name: str) -> Any:
    """A module of torchao, if the program has imported it: no model holds its classes otherwise."""
    return sys.modules.get(f"torchao.quantization.{name}")


def _spec(qmin: int, qmax: int, group: int, trained: bool, rounded: bool) -> QuantSpec:
    fields = {"estimator": "lsq" if trained else "ste", "compute": "input" if rounded else "fp32"}
    return QuantSpec.torchao(group=group, zero="outside_float", **grid(qmin, qmax), **fields)


def _positive(scale: Tensor) -> bool:
    """Whether a trained scale is one that the kernels take as it is. Elsewhere than on the CPU it is not asked, which
    would stop the queue: there a scale that training has made negative is held at the least positive one."""
    if scale.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return scale.detach().amin().item() >= TINY


class IntxFakeQuantizer(Adapter):
    """torchao IntxFakeQuantizer."""

    def applies(self, module: nn.Module) -> bool:
        package = _module("qat.fake_quantizer")
        return package is not None and isinstance(module, package.IntxFakeQuantizer)

    def reason(self, module: nn.Module) -> str | None:
        if type(module).forward is not _module("qat.fake_quantizer").IntxFakeQuantizer.forward:
            return "its class has a forward of its own"
        config = module.config
        if self._per_token(module) and config.is_symmetric:
            return "torchao has no symmetric quantization per token"
        if config.zero_point_domain.name != "INT":
            return f"its zero-points are in the domain {config.zero_point_domain.name}"
        return None if grid(*self._ends(module)) else f"no spec has the grid {list(self._ends(module))}"

    @staticmethod
    def _per_token(module: nn.Module) -> bool:
        return isinstance(module.config.granularity, _module("granularity").PerToken)

    @staticmethod
    def _ends(module: nn.Module) -> tuple[int, int]:
        return _module("quant_primitives")._DTYPE_TO_QVALUE_BOUNDS[module.config.dtype]

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        config = module.config
        if not module.enabled:
            return x
        if not plain(x, UP_TO_32) or x.dim() < 2:
            return self.original(module, x)
        per_token = self._per_token(module)
        group = x.shape[-1] if per_token else self._group(module, x)
        if group is None:
            return self.original(module, x)
        zero_point = None
        if config.is_dynamic:
            if not per_token and not config.is_symmetric and x.dtype is not torch.float32:
                return self.original(module, x)
            zero_point = self._choose(module, x.detach(), group, per_token)
        scale = module.scale
        if scale is None or scale.dtype not in (torch.float32, x.dtype) or scale.device != x.device:
            return self.original(module, x)
        if zero_point is None and not (config.is_dynamic and config.is_symmetric):
            zero_point = module.zero_point
            if zero_point is None or zero_point.device != x.device:
                return self.original(module, x)
        shape = (*x.shape[:-1], x.shape[-1] // group)
        if scale.numel() * group != x.numel() or (zero_point is not None and zero_point.numel() != scale.numel()):
            return self.original(module, x)
        trained = scale.requires_grad or (zero_point is not None and zero_point.requires_grad)
        if trained and (x.dtype is not torch.float32 or not _positive(scale)):
            return self.original(module, x)
        spec = remembered(_spec, *self._ends(module), group, trained, scale.dtype is not torch.float32)
        scale = scale.view(shape)
        if zero_point is not None:
            zero_point = zero_point.view(shape).to(scale.dtype)
        return fake_quantize(x, scale, zero_point, spec=spec)

    @staticmethod
    def _group(module: nn.Module, x: Tensor) -> int | None:
        """Length of the runs that share a scale; None where the module raises, or is left to itself."""
        granularity = module.config.granularity
        group = x.shape[-1] if hasattr(granularity, "axis") else granularity.group_size
        return group if x.dim() == 2 and group > 1 and x.shape[-1] % group == 0 else None

    def _choose(self, module: nn.Module, x: Tensor, group: int, per_token: bool) -> Tensor | None:
        """Give the module the scale and zero-point of x; the zero-point as it was before it became an integer, or None
        for 0."""
        config = module.config
        eps = torch.finfo(x.dtype).smallest_normal if config.eps is None else config.eps
        rows = x if per_token else x.unflatten(-1, (-1, group))
        if per_token:
            qmin, qmax = self._ends(module)
            low, high = rows.amin(-1).clamp_(max=0), rows.amax(-1).clamp_(min=0)
            scale = high.sub_(low).div_(float(qmax - qmin)).clamp_(min=eps)
            zero_point = low.div_(scale).round_().neg_().add_(qmin).clamp_(qmin, qmax)
            module.scale = scale.to(config.scale_precision or x.dtype)
            module.zero_point = zero_point.to(config.zero_point_precision)
            return zero_point.float()
        bits = _module("quant_primitives")._DTYPE_TO_BIT_WIDTH[config.dtype]
        steps = float(2**bits - 1)
        precision = config.scale_precision or x.dtype
        if config.is_symmetric:
            low, high = rows.amin(-1).clamp_(max=0), rows.amax(-1).clamp_(min=0)
            scale = torch.maximum(low.neg_(), high).div_(steps / 2).clamp_(min=eps)
            module.scale = scale.to(precision)
            module.zero_point = torch.zeros_like(module.scale, dtype=config.zero_point_precision)
            return None
        low, high = rows.amin(-1), rows.amax(-1)
        scale = high.sub_(low).div_(steps).clamp_(min=1e-6 if config.eps is None else eps)
        zero_point = low.add_(scale * (2.0 ** (bits - 1)))
        module.scale = scale.to(precision)
        module.zero_point = zero_point.to(precision).to(config.zero_point_precision)
        return module.zero_point.to(torch.float32)

    def modes(self, module: nn.Module):
        def initialized(turn):
            def turned(twin: nn.Module) -> None:
                turn(twin)
                twin._initialized = True  # as initialize_fake_quantizers does before its first batch

            return turned

        return {name: initialized(turn) for name, turn in super().modes(module).items()}

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        _, device = placed(module)
        group = 33 if self._per_token(module) or hasattr(module.config.granularity, "axis") else None
        held, step = None, torch.tensor(0.05)
        if module.scale is not None and not module.config.is_dynamic:
            held, step, device = module.scale.shape, module.scale.detach().abs().min(), module.scale.device
        if self._per_token(module):
            shapes = [(*held, group)] if held is not None else [(2, 3, group)]
        else:
            rows, columns = (7, 3) if held is None else (held[0], held[-1])
            columns = columns if group is None else 1
            shapes = [(rows, columns * (group or module.config.group_size))]
        for seed in range(2):
            yield from ((x.to(device),) for x in spread(shapes, step, seed))
