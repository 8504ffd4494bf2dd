# SPDX-License-Identifier: Apache-2.0
"""NVIDIA Model-Optimizer's ``TensorQuantizer``: integers by the largest magnitude of a tensor, an axis or blocks.

Its CUDA kernels have an arithmetic of their own; there the module keeps its forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.integrations._adapter import Adapter, placed, spread
from fastflat.integrations._grid import remembered
from fastflat.integrations._tensors import UP_TO_32, plain


def _package() -> Any:
    """The module with the class, if the program has imported it: no model holds one otherwise."""
    return sys.modules.get("modelopt.torch.quantization.nn.modules.tensor_quantizer")


def _spec(bits: int, signed: bool, narrow: bool, axis: int | None, passes: bool) -> QuantSpec:
    changes = {"mask": "none"} if passes else {}
    return QuantSpec.modelopt(bits, signed, axis, narrow=narrow, **changes)


class TensorQuantizer(Adapter):
    """Model-Optimizer TensorQuantizer."""

    def applies(self, module: nn.Module) -> bool:
        package = _package()
        return package is not None and isinstance(module, package.TensorQuantizer)

    def reason(self, module: nn.Module) -> str | None:
        stock = _package().TensorQuantizer
        own = {stock._fake_quantize}
        blocks = getattr(_package(), "StaticBlockScaleQuantizer", None)
        if blocks is not None:
            own.add(blocks._fake_quantize)  # that of the other class, but for what _unlike names
        if type(module).forward is not stock.forward or type(module)._fake_quantize not in own:
            return "its class has a forward of its own"
        return self._unlike(module)

    @staticmethod
    def _unlike(module: nn.Module) -> str | None:
        """What of its settings no spec has."""
        if module.backend is not None:
            return f"it computes by the backend {module.backend!r}"
        if not isinstance(module._num_bits, int) or isinstance(module._num_bits, bool):
            return f"its format {module._num_bits} is no integer grid"
        if not 1 <= module._num_bits - 1 + module._unsigned <= 16 or module._num_bits > 16:
            return f"no spec has {module._num_bits} bits"
        if module.block_sizes is not None and module.block_sizes.get("type", "static") == "dynamic":
            return "its blocks have dynamic scales"
        if module._bias is not None:
            return "it has a bias"
        if getattr(module, "_lsq", False):
            return "it trains its largest magnitudes"
        if module.rotate_is_enabled:
            return "it rotates its input"
        return None if module._fake_quant else "it stores codes in place of numbers"

    def forward(self, module: nn.Module, inputs: Tensor) -> Tensor:
        off = module._disabled or not module._if_quant or module._if_calib or torch.compiler.is_exporting()
        if off or not plain(inputs, UP_TO_32) or inputs.is_cuda or self._unlike(module):
            return self.original(module, inputs)
        onnx = _package().GLOBALS
        if not torch.compiler.is_compiling() and onnx.in_onnx_export:
            return self.original(module, inputs)
        x = inputs if module.pre_quant_scale is None else inputs * module.pre_quant_scale
        if module.block_sizes is not None:
            module._block_sizes_to_axis(x)
        blocks = module.is_static_block_quant
        if blocks:
            module._setup_for_blockquant(x)
            x = module._process_for_blockquant(x)
        x = x if x.is_contiguous() else x.contiguous()
        y = self._quantized(module, x)
        if y is None:
            y = module._fake_quantize(x)
        return module._reset_to_original_shape(y) if blocks else y

    @staticmethod
    def _quantized(module: nn.Module, x: Tensor) -> Tensor | None:
        amax = _amax(module, x)
        axis = None
        if amax.numel() > 1:
            if amax.dim() != x.dim() or amax.numel() not in amax.shape:
                return None  # several axes
            axis = amax.shape.index(amax.numel())
            if x.shape[axis] != amax.numel():
                return None
        passes, unsigned = bool(module._pass_through_bwd), bool(module._unsigned)
        if amax.dtype not in UP_TO_32 or amax.device != x.device:
            return None
        if not passes and amax.dim() == 0 and amax.dtype is not x.dtype:
            return None  # its mask compares in the type of x
        if (unsigned and x.detach().min() < 0.0) or amax.min() < 0:
            return None  # it raises
        bits = int(module._num_bits)
        spec = remembered(_spec, bits, not unsigned, bool(module._narrow_range) and not unsigned, axis, passes)
        return fake_quantize(x, amax.reshape(() if axis is None else (-1,)), spec=spec)

    def modes(self, module: nn.Module):
        def enabled(turn):
            def turned(twin: nn.Module) -> None:
                turn(twin)
                twin._disabled, twin._if_quant, twin._if_calib = False, True, False

            return turned

        return {name: enabled(turn) for name, turn in super().modes(module).items()}

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        _, device = placed(module)
        amax, sizes = getattr(module, "_amax", None), module.block_sizes
        shape, step = [6, 5, 4], torch.tensor(0.05)
        if amax is not None:
            step = (amax.detach().float().abs().min() / max(module.maxbound, 1)).clamp(min=1e-3)
        if hasattr(module, "_original_shape"):  # fixed by its first batch, and padded
            shape, padding = list(module._original_shape), getattr(module, "_padding", ())
            for i in range(len(padding) // 2):
                shape[-1 - i] -= padding[2 * i] + padding[2 * i + 1]
        elif sizes is not None and any(isinstance(size, int) for size in sizes.values()):
            shape = [amax.numel() if amax is not None else 6, next(s for s in sizes.values() if isinstance(s, int))]
        elif amax is not None and amax.dim() > 1:
            shape = [n if n > 1 else 3 for n in amax.shape]
        for seed in range(2):
            for x in spread([tuple(shape)], step, seed):
                yield ((x.abs() if module._unsigned else x).to(device),)


def _amax(module: nn.Module, x: Tensor) -> Tensor:
    """The largest magnitude that the module goes by, in one pass where it is that of the whole tensor."""
    dynamic = not hasattr(module, "_amax") and not module._use_constant_amax
    if dynamic and module._axis is None:
        low, high = torch.aminmax(x.detach())
        return torch.maximum(high.abs_(), low.abs_())
    return module._get_amax(x)
