# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization modules of ``torch.ao.quantization`` and their copies in ``torchao.quantization.pt2e``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.integrations import _minmax
from fastflat.integrations._adapter import Adapter, spread
from fastflat.integrations._grid import grid, remembered
from fastflat.integrations._tensors import FP32, UP_TO_32, plain

_PACKAGES = ("torch.ao.quantization.fake_quantize", "torchao.quantization.pt2e.fake_quantize")
_LEARNABLE = ("torch.ao.quantization._learnable_fake_quantize",)


def _classes(name: str, packages: tuple[str, ...] = _PACKAGES) -> tuple[type, ...]:
    """The classes of this name that the program has imported: no model holds one otherwise."""
    found = (getattr(sys.modules.get(package), name, None) for package in packages)
    return tuple(kind for kind in found if kind is not None)


def _spec(qmin: int, qmax: int, axis: int | None, factor: float | None = None, passes: bool = False) -> QuantSpec:
    """The form with a constant scale and zero-points of any integer, or with a factor of trained ones' gradients;
    ``passes`` where no element lies beyond the grid."""
    fields = {"zero": "outside_float"} if factor is None else {"estimator": "lsq", "grad_scale": factor}
    if passes:
        fields["mask"] = "none"
    return QuantSpec.torch(axis=axis, **grid(qmin, qmax), **fields)


class _Adapter(Adapter):
    """What the adapters of this file share."""

    kind: str
    packages = _PACKAGES
    types = FP32

    def applies(self, module: nn.Module) -> bool:
        return isinstance(module, _classes(self.kind, self.packages))

    def reason(self, module: nn.Module) -> str | None:
        if type(module).forward not in {c.forward for c in _classes(self.kind, self.packages)}:
            return "its class has a forward of its own"
        if module.scale.dtype is not torch.float32:
            return "its scale is not in fp32"
        qmin, qmax = self.ends(module)
        return None if grid(qmin, qmax) else f"no spec has the grid [{qmin}, {qmax}]"

    @staticmethod
    def ends(module: nn.Module) -> tuple[int, int]:
        return int(module.activation_post_process.quant_min), int(module.activation_post_process.quant_max)

    @staticmethod
    def channels(module: nn.Module) -> int | None:
        """The axis of its channels."""
        return module.ch_axis if module.is_per_channel else None

    def takes(self, x: Tensor) -> bool:
        return plain(x, self.types)

    def fits(self, module: nn.Module, x: Tensor, axis: int | None) -> bool:
        return module.scale.numel() == (1 if axis is None else x.shape[axis]) and module.scale.device == x.device

    def quantized(self, module: nn.Module, x: Tensor, extremes: list[float] | None = None) -> Tensor:
        """x on the grid of the module's scale, a constant; ``extremes`` are those of x where they are known."""
        axis = self.channels(module)
        scale, zero_point = module.scale, module.zero_point
        if not self.fits(module, x, axis):  # the operator says best what is wrong
            if axis is None:
                return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *self.ends(module))
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *self.ends(module))
        ends, passes = self.ends(module), False
        if extremes is not None:
            passes = _minmax.on_grid(*extremes, scale.item(), zero_point.item(), *ends)
        zero_point = zero_point.to(torch.float32)
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        return fake_quantize(x, scale, zero_point, spec=remembered(_spec, *ends, axis, None, passes))

    def modes(self, module: nn.Module):
        def observing(twin: nn.Module) -> None:
            twin.enable_observer()
            twin.enable_fake_quant()

        def observed(twin: nn.Module) -> None:
            observing(twin)
            twin(next(iter(self.examples(module)))[0])
            twin.disable_observer()

        return {**super().modes(module), "observing": observing, "observed": observed}

    def examples(self, module: nn.Module) -> Iterator[tuple]:
        axis = self.channels(module)
        known = axis is not None and module.scale.numel() > 1
        shapes = [[5, 6, 3, 2]] if axis is not None else [[5, 6, 7, 3], [9, 11]]
        for shape in shapes:
            if known:
                shape[axis] = module.scale.numel()
            for seed in range(2):
                yield from ((x.to(module.scale.device),) for x in spread([tuple(shape)], torch.tensor(0.05), seed))


class FakeQuantize(_Adapter):
    """torch.ao FakeQuantize."""

    kind = "FakeQuantize"
    types = UP_TO_32

    def applies(self, module: nn.Module) -> bool:
        return super().applies(module) and not isinstance(module, _classes("FusedMovingAvgObsFakeQuantize"))

    def reason(self, module: nn.Module) -> str | None:
        if module.zero_point.is_floating_point():
            return "its zero-point is in units of x"
        return super().reason(module)

    def forward(self, module: nn.Module, X: Tensor) -> Tensor:
        if not self.takes(X):
            return self.original(module, X)
        extremes = None
        if module.observer_enabled.item() == 1:
            extremes = self._observe(module, X.detach())
        if module.fake_quant_enabled.item() != 1:
            return X
        return self.quantized(module, X, extremes)

    @staticmethod
    def _observe(module: nn.Module, x: Tensor) -> list[float] | None:
        """Move the state; the extremes of x, where they are at hand."""
        if isinstance(module, _classes("FixedQParamsFakeQuantize")):
            return None  # its scale is what it is
        found = None
        if type(module).calculate_qparams in {c.calculate_qparams for c in _classes("FakeQuantize")}:
            found = _minmax.observe(module.activation_post_process, x)
        if found is None:
            module.activation_post_process(x)
            found = *module.calculate_qparams(), None
        scale, zero_point, extremes = found
        if isinstance(scale, float):
            module.scale.resize_(1).fill_(scale)
            module.zero_point.resize_(1).fill_(zero_point)
            return extremes
        if module.scale.shape != scale.shape:
            module.scale.resize_(scale.shape)
            module.zero_point.resize_(zero_point.shape)
        module.scale.copy_(scale)
        module.zero_point.copy_(zero_point)
        return None


class FusedMovingAverage(_Adapter):
    """torch.ao FusedMovingAvgObsFakeQuantize.

    State, scale and zero-point depend on the extremes of x alone, so the module's own operator moves them, called with
    these two numbers (two a channel) in place of x.
    """

    kind = "FusedMovingAvgObsFakeQuantize"

    def forward(self, module: nn.Module, X: Tensor) -> Tensor:
        axis = self.channels(module)
        if not self.takes(X) or (axis is not None and (axis % X.dim() != 0 or X.dim() < 2)):
            return self.original(module, X)
        if torch.compiler.is_compiling():
            return self._compiled(module, X, axis)
        if module.fake_quant_enabled.item() != 1:
            return self.original(module, X)
        extremes = None
        if module.observer_enabled.item() == 1:
            found = self._observe(module, X.detach(), axis)
            if axis is None and X.device.type == "cpu":  # elsewhere they would have to be waited for
                extremes = found.tolist()
        return self.quantized(module, X, extremes)

    def _compiled(self, module: nn.Module, X: Tensor, axis: int | None) -> Tensor:
        """Without a branch on the switches, which would break the graph."""
        if X.dim() == 0 or (axis is not None and module.scale.numel() != X.shape[axis]):
            return self.original(module, X)
        self._observe(module, X.detach(), axis)
        y = self.quantized(module, X)
        return torch.where(module.fake_quant_enabled == 1, y, X)

    @staticmethod
    def _observe(module: nn.Module, x: Tensor, axis: int | None) -> Tensor:
        """Move the state; the extremes of x."""
        observer = module.activation_post_process
        found = torch.stack(_minmax.extremes(x, axis), -1)
        torch.fused_moving_avg_obs_fake_quant(
            found,
            module.observer_enabled,
            module.fake_quant_enabled,
            observer.min_val,
            observer.max_val,
            module.scale,
            module.zero_point,
            observer.averaging_constant,
            observer.quant_min,
            observer.quant_max,
            module.ch_axis,
            module.is_per_channel,
            module.is_symmetric_quant,
        )
        return found


class Learnable(_Adapter):
    """torch.ao _LearnableFakeQuantize."""

    kind = "_LearnableFakeQuantize"
    packages = _LEARNABLE

    @staticmethod
    def ends(module: nn.Module) -> tuple[int, int]:
        return int(module.quant_min), int(module.quant_max)

    @staticmethod
    def channels(module: nn.Module) -> int | None:
        return module.ch_axis if module.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine) else None

    def forward(self, module: nn.Module, X: Tensor) -> Tensor:
        if not self.takes(X):
            return self.original(module, X)
        if module.static_enabled.item() == 1:
            self._observe(module, X.detach())
        else:
            module.scale.data.clamp_(min=module.eps.item())
        if module.fake_quant_enabled.item() != 1:
            return X
        symmetric = module.qscheme in (torch.per_channel_symmetric, torch.per_tensor_symmetric)
        if symmetric:
            module.zero_point.data.zero_()
        axis = self.channels(module)
        one = axis is not None or symmetric or self._one_zero_point(module)
        if not one or not self.fits(module, X, axis):
            return self._operator(module, X, axis)
        factor = self._factor(module, X)
        scale, zero_point = module.scale, module.zero_point
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        if not (scale.requires_grad or zero_point.requires_grad):
            factor = None
            zero_point = zero_point.round().clamp(*self.ends(module))
        return fake_quantize(X, scale, zero_point, spec=remembered(_spec, *self.ends(module), axis, factor))

    @staticmethod
    def _factor(module: nn.Module, X: Tensor) -> float:
        return 1.0 / (X.numel() * module.quant_max) ** 0.5 if module.use_grad_scaling else 1.0

    @staticmethod
    def _observe(module: nn.Module, x: Tensor) -> None:
        found = _minmax.observe(module.activation_post_process, x)
        if found is None:
            module.activation_post_process(x)
            found = module.activation_post_process.calculate_qparams()
        for parameter, value in zip((module.scale.data, module.zero_point.data), found[:2], strict=True):
            parameter.copy_(value) if isinstance(value, Tensor) else parameter.fill_(value)

    def _one_zero_point(self, module: nn.Module) -> bool:
        """Whether the operator's backward, which rounds z to int(z + 1/2), means the zero-point of its forward."""
        qmin, qmax = self.ends(module)
        z = module.zero_point.item()
        return z == z and int(min(max(z + 0.5, qmin), qmax)) == min(max(round(z), qmin), qmax)

    def _operator(self, module: nn.Module, X: Tensor, axis: int | None) -> Tensor:
        """The rest of the module's own forward, for what is not the same in both directions."""
        qmin, qmax = self.ends(module)
        rest = (qmin, qmax, self._factor(module, X))
        if axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(X, module.scale, module.zero_point, *rest)
        return torch._fake_quantize_learnable_per_channel_affine(X, module.scale, module.zero_point, axis, *rest)

    def modes(self, module: nn.Module):
        def learning(twin: nn.Module) -> None:
            twin.enable_static_estimate()
            twin(next(iter(self.examples(module)))[0])
            twin.enable_param_learning()

        return {**Adapter.modes(self, module), "static": lambda t: t.enable_static_estimate(), "learning": learning}
