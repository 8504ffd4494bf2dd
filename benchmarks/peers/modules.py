# SPDX-License-Identifier: Apache-2.0
"""Quantizers of whole networks: what stands in the places of :class:`fastflat.quant.Quantizer` in a training step."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from fastflat.quant import Quantizer
from fastflat.quant.eager import BuiltinQuantizer, EagerQuantizer

from .floor import mul
from .libraries import _module
from .ours import Identity

_mul = mul(None)


class _View(Function):
    """The identity without a pass over memory: the cost of an autograd Function alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gy: Tensor) -> Tensor:
        return gy


def _of(function: Callable[[Tensor], Tensor]) -> type[Quantizer]:
    class Replaced(Quantizer):
        def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
            return function(x)

    return Replaced


class TorchaoQuantizer(Quantizer):
    """The function that torchao's ``IntxFakeQuantizer`` runs with a learned scale, on rows of a matrix."""

    def __init__(self, spec, *args, **kwargs) -> None:
        super().__init__(spec, *args, **kwargs)
        self._function = _module("torchao.quantization.qat.utils")._fake_quantize_per_channel_group
        zero = torch.zeros_like(self.scale.detach(), dtype=torch.int32).view(-1, 1)
        self.register_buffer("_zero", zero, persistent=False)

    def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        rows = x.reshape(self.scale.numel(), -1)
        limits = self.spec.qmin, self.spec.qmax
        return self._function(rows, self.scale.view(-1, 1), self._zero, *limits, rows.shape[1]).view(x.shape)


class BrevitasQuantizer(Quantizer):
    """The integer part of Brevitas' weight and activation quantizers, with a learned scale."""

    def __init__(self, spec, *args, **kwargs) -> None:
        super().__init__(spec, *args, **kwargs)
        os.environ.setdefault("BREVITAS_JIT", "0")  # its default
        core, parts = _module("brevitas.core.quant"), _module("brevitas.core.function_wrapper")
        self._integers = core.IntQuant(
            narrow_range=spec.narrow,
            signed=spec.signed,
            input_view_impl=parts.Identity(),
            float_to_int_impl=parts.RoundSte(),
            tensor_clamp_impl=parts.TensorClamp(),
        )
        device = self.scale.device
        self.register_buffer("_zero", torch.zeros((), device=device), persistent=False)
        self.register_buffer("_bits", torch.tensor(float(spec.bits), device=device), persistent=False)

    def quantize(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        scale = self.scale
        if self.spec.axis is not None:
            shape = [1] * x.dim()
            shape[self.spec.axis] = -1
            scale = scale.view(shape)
        return self._integers(scale, self._zero, self._bits, x)


#: By name in reports; None leaves the model as it is. "fastflat-list": the weights of all layers in one call.
QUANTIZERS: dict[str, type[Quantizer] | None] = {
    "fp32": None,
    "view": _of(_View.apply),
    "identity": _of(Identity.apply),
    "mul": _of(lambda x: _mul(x, None)),
    "fastflat": Quantizer,
    "fastflat-list": Quantizer,
    "eager": EagerQuantizer,
    "builtin": BuiltinQuantizer,
    "torchao": TorchaoQuantizer,
    "brevitas": BrevitasQuantizer,
}
