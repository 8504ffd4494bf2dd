# SPDX-License-Identifier: Apache-2.0
"""Layers that quantize their weight and their input: :class:`QuantLinear`, :class:`QuantConv2d`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.quant import _initial
from fastflat.quant.quantizer import Quantizer

#: What builds a quantizer from a spec and the shape of its scale.
Factory = Callable[..., Quantizer]


class _QuantLayer:
    """What the layers share. Parameters keep their names, so that ``load_state_dict(fp32_state, strict=False)`` works;
    the weight's scale then follows the loaded weight."""

    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    #: Size of the input's channel axis for a spec with an axis: (attribute, axes that mean it).
    _channels: tuple[str, tuple[int, ...]]

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        weights: QuantSpec | None = None,
        activations: QuantSpec | None = None,
        *,
        quantizer: Factory = Quantizer,
        name: str = "",
    ) -> nn.Module:
        """The quantized form of an ordinary layer. It shares the layer's parameters, buffers and hooks, and takes the
        weight's scale from the weight; the input's scale comes by :func:`fastflat.calibrate`.

        Args:
            module: the layer; left as it is.
            weights, activations: specs; ``None`` leaves that side in floating point.
            quantizer: class of the quantizers.
            name: the layer's place in its model, for error messages.

        Raises:
            TypeError, ValueError: a spec does not fit the layer, or its weight gives no usable scale.
        """
        for which, spec in (("weights", weights), ("activations", activations)):
            if spec is not None and not isinstance(spec, QuantSpec):
                _checks.fail(name or cls.__name__, which, "be a QuantSpec or None", type(spec))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # The layer's own dictionaries are copied: adding the quantizers must not reach the original.
        state = dict(module.__dict__)
        for kind in ("_parameters", "_buffers", "_modules"):
            state[kind] = dict(state[kind])
        layer.__dict__.update(state)
        layer.weight_quantizer = layer.input_quantizer = None
        if weights is not None:
            layer.weight_quantizer = _for_weight(module.weight, weights, quantizer, _join(name, "weight_quantizer"))
        if activations is not None:
            layer.input_quantizer = layer._for_input(activations, quantizer, _join(name, "input_quantizer"))
        return layer

    def _for_input(self, spec: QuantSpec, quantizer: Factory, name: str) -> Quantizer:
        shape: tuple[int, ...] = ()
        if spec.group is not None:
            hint = ": their scales would depend on the batch; use axis, or one scale"
            _checks.fail(name, "spec.group", "be None for activations", spec.group, hint)
        if spec.axis is not None:
            attribute, axes = self._channels
            if spec.axis not in axes:
                want = f"be None or {axes[0]}, the channels of the input"
                _checks.fail(name, "spec.axis", want, spec.axis)
            shape = (getattr(self, attribute),)
        weight = self.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        made = quantizer(spec, shape, device=weight.device, dtype=dtype)
        made.name = name
        return made

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight on its grid, cast to ``dtype`` in the same pass if one is given."""
        if self.weight_quantizer is None:
            return self.weight if dtype is None else self.weight.to(dtype)
        return self.weight_quantizer(self.weight, dtype)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight, on their grids and in the type that autocast wants of them."""
        to = None
        if torch.is_autocast_enabled(x.device.type):
            to = torch.get_autocast_dtype(x.device.type)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x, to if x.dtype == torch.float32 else None)
        return x, self.quantized_weight(to if self.weight.dtype == torch.float32 else None)

    def check_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Check, before anything is loaded, that a state_dict without a scale holds a weight that gives one."""
        if self._wants_scale_from(state, prefix):
            _initial.scale_from(state[prefix + "weight"], self.weight_quantizer.spec, None, prefix + "weight_quantizer")

    def _wants_scale_from(self, state: dict[str, Tensor], prefix: str) -> bool:
        quantizer = self.weight_quantizer
        return quantizer is not None and prefix + "weight" in state and prefix + "weight_quantizer.scale" not in state

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self._wants_scale_from(state_dict, prefix):
            self.weight_quantizer.initialise_from(self.weight)


class QuantLinear(_QuantLayer, nn.Linear):
    """``y = Q(x) Q(W)^T + b``: ``nn.Linear`` with a quantized weight and input.

    ``weight_quantizer`` and ``input_quantizer`` are :class:`Quantizer` or ``None``. Under autocast the fp32 weight is
    quantized and cast in one pass. Made by :meth:`from_float` or :func:`fastflat.prepare`.
    """

    _channels = ("in_features", (-1,))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._quantized(x)
        return F.linear(x, weight, self.bias)


class QuantConv2d(_QuantLayer, nn.Conv2d):
    """``y = conv2d(Q(x), Q(W)) + b``: ``nn.Conv2d`` with a quantized weight and input; as :class:`QuantLinear`.

    The input is quantized before padding, so padded zeros stay zero.
    """

    _channels = ("in_channels", (1, -3))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self._quantized(x)
        return self._conv_forward(x, weight, self.bias)


def _for_weight(weight: Tensor, spec: QuantSpec, quantizer: Factory, name: str) -> Quantizer:
    made = quantizer.like(weight, spec)
    made.name = name
    if not weight.is_meta:
        made.initialise_from(weight)
    return made


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
