# SPDX-License-Identifier: Apache-2.0
"""What the quantized layers share: their making, their weights' and inputs' quantizers, their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.quant import _ahead, _initial
from fastflat.quant.quantizer import Quantizer


class Input(NamedTuple):
    """An input that is quantized.

    Attributes:
        quantizer: name of its quantizer.
        size: the layer's attribute that holds the size of the input's channel axis.
        axes: the axes of a spec that mean the channels.
    """

    quantizer: str
    size: str
    axes: tuple[int, ...]


#: What builds a quantizer from a spec and the shape of its scale.
Factory = Callable[..., Quantizer]


class QuantLayer:
    """Mixed into a layer of ``torch.nn``. Parameters keep their names, so that ``load_state_dict(fp32_state,
    strict=False)`` works; the weights' scales then follow the loaded weights.

    The quantizer of a weight ``p`` is the module ``p_quantizer`` (``weight_quantizer``), those of inputs are
    named in :attr:`inputs`; each is a :class:`Quantizer` or ``None``.
    """

    #: The inputs that are quantized.
    inputs: tuple[Input, ...] = ()
    #: Whether autocast wants the weight in its type.
    casts_weight = True

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters that are quantized, of this layer or of the ordinary one that it replaces."""
        return ("weight",)

    @classmethod
    def weight_spec(cls, spec: QuantSpec) -> QuantSpec:
        """The spec of the weight, its axis 0 being that of the output channels."""
        return spec

    @classmethod
    def refuse(cls, module: nn.Module, label: str) -> None:
        """Raise a one-line error if the layer has options that its quantized form lacks."""

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
        weights' scales from the weights; the inputs' scales come by :func:`fastflat.calibrate`.

        Args:
            module: the layer; left as it is.
            weights, activations: specs; ``None`` leaves that side in floating point.
            quantizer: class of the quantizers.
            name: the layer's place in its model, for error messages.

        Raises:
            TypeError, ValueError: a spec does not fit the layer, the layer has an option that the quantized form lacks,
                or a weight gives no usable scale.
        """
        label = name or cls.__name__
        for which, spec in (("weights", weights), ("activations", activations)):
            if spec is not None and not isinstance(spec, QuantSpec):
                _checks.fail(label, which, "be a QuantSpec or None", type(spec))
        if activations is not None and not cls.inputs:
            _checks.fail(label, "activations", "be None: the inputs are indices", "a QuantSpec")
        cls.refuse(module, label)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # The layer's own containers are copied: adding the quantizers must not reach the original.
        state = dict(module.__dict__)
        for kind in ("_parameters", "_buffers", "_modules", "_flat_weights"):
            if kind in state:
                state[kind] = state[kind].copy()
        layer.__dict__.update(state)
        for weight in cls.weight_names(module):
            made = None
            if weights is not None:
                place = _join(name, f"{weight}_quantizer")
                made = _for_weight(getattr(module, weight), cls.weight_spec(weights), quantizer, place)
            setattr(layer, f"{weight}_quantizer", made)
        for each in cls.inputs:
            made = None
            if activations is not None:
                made = layer._for_input(each, activations, quantizer, _join(name, each.quantizer))
            setattr(layer, each.quantizer, made)
        return layer

    def _for_input(self, which: Input, spec: QuantSpec, quantizer: Factory, name: str) -> Quantizer:
        shape: tuple[int, ...] = ()
        if spec.group is not None:
            hint = ": their scales would depend on the batch; use axis, or one scale"
            _checks.fail(name, "spec.group", "be None for activations", spec.group, hint)
        if spec.axis is not None:
            if spec.axis not in which.axes:
                want = f"be None or {which.axes[0]}, the channels of the input"
                _checks.fail(name, "spec.axis", want, spec.axis)
            shape = (getattr(self, which.size),)
        weight = getattr(self, self.weight_names(self)[0])
        dtype = compute_dtype(weight.dtype)
        made = quantizer(spec, shape, device=weight.device, dtype=dtype)
        made.name = name
        return made

    def weight_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the weights by the parameters' names, those that there are."""
        found = {name: getattr(self, f"{name}_quantizer") for name in self.weight_names(self)}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def input_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of the inputs by name, those that there are."""
        found = {each.quantizer: getattr(self, each.quantizer) for each in self.inputs}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def quantized(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of that name on its grid, cast to ``dtype`` in the same pass if one is given."""
        weight, quantizer = getattr(self, name), getattr(self, f"{name}_quantizer")
        if quantizer is None:
            return weight if dtype is None else weight.to(dtype)
        ready = _ahead.take(self, name, weight, quantizer, dtype)
        return quantizer(weight, dtype) if ready is None else ready

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """:meth:`quantized` of a layer's one weight."""
        return self.quantized("weight", dtype)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight, on their grids and in the type that autocast wants of them."""
        to = autocast_dtype(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x, to if x.dtype == torch.float32 else None)
        return x, self.quantized_weight(to if self.weight.dtype == torch.float32 else None)

    def check_state(self, state: dict[str, Tensor], prefix: str) -> None:
        """Check, before anything is loaded, that a state_dict without scales holds weights that give them."""
        for name, quantizer in self._without_scale(state, prefix):
            _initial.scale_from(state[prefix + name], quantizer.spec, None, f"{prefix}{name}_quantizer")

    def _without_scale(self, state: dict[str, Tensor], prefix: str) -> list[tuple[str, Quantizer]]:
        """Weights that the state holds without their scales, and their quantizers."""
        own = self.weight_quantizers().items()
        return [(n, q) for n, q in own if prefix + n in state and f"{prefix}{n}_quantizer.scale" not in state]

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name, quantizer in self._without_scale(state_dict, prefix):
            quantizer.initialise_from(getattr(self, name))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast, where it is on for the device of x, wants of matrix products."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def _for_weight(weight: Tensor, spec: QuantSpec, quantizer: Factory, name: str) -> Quantizer:
    made = quantizer.like(weight, spec)
    made.name = name
    if not weight.is_meta:
        made.initialise_from(weight)
    return made


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
