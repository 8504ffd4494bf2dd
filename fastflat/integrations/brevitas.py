# SPDX-License-Identifier: Apache-2.0
"""Weight and activation quantizers of Brevitas.

They are swapped at the proxy, ``layer.weight_quant`` and ``layer.act_quant``: its parts are built anew by every
``load_state_dict``, the proxy stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat.autograd._modes import transformed
from fastflat.integrations import _int_quant
from fastflat.integrations._adapter import Adapter, placed, spread
from fastflat.integrations._int_quant import named, package


def _usual() -> bool:
    """Whether a call is an ordinary one. Graphs are compiled from Brevitas' own operations, which Inductor fuses; its
    Functions know no torch.func."""
    return not torch.compiler.is_compiling() and not transformed()


#: A scale of activations, times the largest code, for probes of the time after their statistics.
_VALUE = 0.4


class _Proxy(Adapter):
    """What weights and activations share."""

    forwards = ""  # the class whose forward is replaced

    def quantizer(self, module: nn.Module) -> nn.Module | None:
        """The proxy's RescalingIntQuant, or what stands there."""
        raise NotImplementedError

    def applies(self, module: nn.Module) -> bool:
        base = package(self.forwards)
        return base is not None and isinstance(module, base) and self.quantizer(module) is not None

    def reason(self, module: nn.Module) -> str | None:
        if type(module).forward is not package(self.forwards).forward:
            return "its class has a forward of its own"
        return _int_quant.reason(self.quantizer(module))

    def sums(self, module: nn.Module) -> tuple[str, ...] | None:
        """Besides those of parameters the gradient of x, where the scale is a function of x."""
        quant = self.quantizer(module)
        if not _int_quant.follows_data(quant, module.training):
            return None
        return ("input", *(name for name, _ in module.named_parameters()))

    def modes(self, module: nn.Module) -> dict[str, Callable[[nn.Module], object]]:
        """Each as it is, and, while its scale is still collected from statistics, as it will be afterwards."""
        scaling = self.quantizer(module).scaling_impl
        usual = super().modes(module)
        found = dict(usual)
        if getattr(scaling, "counter", 0) < getattr(scaling, "collect_stats_steps", 0):
            for name, turn in usual.items():
                for more, when in enumerate((", statistics ending", ", after the statistics")):
                    found[name + when] = functools.partial(self._collected, turn=turn, more=more)
        return found

    def _collected(self, module: nn.Module, turn: Callable[[nn.Module], object], more: int) -> None:
        """The statistics end with the next training call, or have ended before it."""
        turn(module)
        scaling = self.quantizer(module).scaling_impl
        scaling.counter = scaling.collect_stats_steps + more
        with torch.no_grad():
            (scaling.value if more else scaling.buffer).fill_(_VALUE)


class Weights(_Proxy):
    """Brevitas weight quantizer."""

    forwards = "proxy.parameter_quant.WeightQuantProxyFromInjectorBase"

    def quantizer(self, module: nn.Module) -> nn.Module | None:
        return module.tensor_quant

    def forward(self, module: nn.Module, x: Tensor) -> Any:
        quant = module.tensor_quant
        usual = not module.disable_quant and not module.export_mode and _usual()
        if not usual or not _int_quant.ready(quant) or (module.cache_inference_quant_weight and not module.training):
            return self.original(module, x)
        results = _int_quant.quantize(quant, x)
        return results[0] if module.skip_create_quant_tensor else module.create_quant_tensor(results)

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        weight = module.tracked_parameter_list[0]
        step = max(float(weight.detach().abs().max()), 1e-3) / 8
        for seed, beyond in enumerate((40, 8)):
            for x in spread([tuple(weight.shape)], torch.tensor(step), seed):
                yield (x.clamp(-beyond * step, beyond * step).to(weight.device, weight.dtype),)


class Activations(_Proxy):
    """Brevitas activation quantizer."""

    forwards = "proxy.runtime_quant.ActQuantProxyFromInjectorBase"

    def quantizer(self, module: nn.Module) -> nn.Module | None:
        fused = module.fused_activation_quant_proxy
        quant = None if fused is None else fused.tensor_quant
        return None if quant is None or named(quant, "_TensorQuantDisabledIdentity") else quant

    def forward(self, module: nn.Module, x: Any) -> Any:
        fused = module.fused_activation_quant_proxy
        usual = module._is_quant_enabled and not module.disable_quant and not module.export_mode and _usual()
        if not usual or not _int_quant.ready(fused.tensor_quant):
            return self.original(module, x)
        if module.cache_inference_quant_act and not module.training:
            return self.original(module, x)
        value, activation = x if isinstance(x, Tensor) else x.value, fused.activation_impl
        rectified = type(activation) is nn.ReLU and not activation.inplace and not activation._forward_hooks
        results = _int_quant.quantize(fused.tensor_quant, value if rectified else activation(value), rectified)
        return results[0] if module.skip_create_quant_tensor else module.create_quant_tensor(results, x=x)

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        quant = self.quantizer(module)
        scaling, dtype, device = quant.scaling_impl, *placed(quant)
        value = getattr(scaling, "value", None)
        known = isinstance(value, Tensor) and getattr(scaling, "counter", 1) > getattr(
            scaling, "collect_stats_steps", 0
        )
        size = float(value.detach().abs().max()) if known else _VALUE
        step = torch.tensor(size / max(_int_quant.ends(quant)[1], 1))
        shapes = _shapes(quant)
        yield from ((x.to(device, dtype),) for seed in range(2) for x in spread(shapes, step, seed))


def _shapes(quant: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of x that its statistics and scales take."""
    tensors = [t for name, t in (*quant.named_parameters(), *quant.named_buffers()) if name.startswith("scaling_impl")]
    wide = [t for t in tensors if t.numel() > 1]
    if wide:
        return [tuple(3 if n == 1 else n for n in wide[0].shape)]
    ranks = [len(part.permute_dims) for part in quant.modules() if getattr(part, "permute_dims", None)]
    return [(4, 6, 5, 5, 3)[: ranks[0]]] if ranks else [(4, 6, 5, 5), (9, 7)]
