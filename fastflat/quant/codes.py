# SPDX-License-Identifier: Apache-2.0
"""Integer codes of a model's quantized weights, taken out and put back: :func:`export_codes`, :func:`load_codes`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.quant._initial import spread
from fastflat.quant._layer import QuantLayer
from fastflat.quant.quantizer import Quantizer

#: Fields of a spec that training alone reads: codes of models that differ in them are interchangeable.
_TRAINING = {"estimator": "ste", "grad_scale": "none", "mask": "before", "noise": "none"}

#: Storage of codes, smallest first.
_STORAGE = (torch.int8, torch.uint8, torch.int16, torch.uint16)

_PARTS = ("codes", "scale", "zero_point")


@dataclasses.dataclass(frozen=True)
class LayerCodes:
    """One quantized weight as integers: ``w = (codes - z) s``.

    Attributes:
        codes: the weight's shape, integers of the smallest type that holds the grid: int8, uint8, int16 or uint16.
        scale: ``[]``, ``[C]`` or ``[..., K/group]`` in the compute type (fp32; fp64 for fp64 weights).
        zero_point: like scale, or None.
        spec: :meth:`QuantSpec.to_dict` of the rule; its ``axis`` and ``group`` say which elements share a scale.
        dtype: type of the weight, ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: dict[str, Any]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scale and zero-point as they are held."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.zero_point) if t is not None)

    @property
    def packed_nbytes(self) -> int:
        """Bytes that they would take with the codes packed to ``spec["bits"]`` bits each."""
        held = self.codes.numel() * self.codes.element_size()
        return self.nbytes - held + (self.codes.numel() * self.spec["bits"] + 7) // 8

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``w = (codes - z) s`` with ``s = max(scale, eps)``, in the compute type and rounded once to ``dtype``
        (:attr:`dtype` by default): equal to the fake-quantized weight that the codes come from (``torch.equal``:
        integers have one zero, so that a -0 comes back as 0)."""
        spec = QuantSpec.from_dict(self.spec)
        s, z = self.scale.clamp(min=spec.eps), self.zero_point
        q = self.codes.to(self.scale.dtype)
        if z is not None:
            z = z if spec.zero == "float" else z.round().clamp(spec.qmin, spec.qmax)
            q = q - spread(z, self.codes, spec)
        return (q * spread(s, self.codes, spec)).to(dtype or getattr(torch, self.dtype))


@torch.no_grad()
def export_codes(model: nn.Module, *, dtype: torch.dtype | None = None) -> dict[str, LayerCodes]:
    """The quantized weights of a prepared model as integer codes and scales.

    Args:
        model: a prepared model.
        dtype: type that the weights are quantized to; by default each one's own. ``torch.bfloat16`` gives the weights
            that an fp32 model computes with under autocast.

    Returns:
        The codes by the parameters' names (``"layer1.0.weight"``, ``"lstm.weight_ih_l0"``). Each one's ``dequantize()``
        equals the layer's quantized weight, which is checked here. Layers without a weight quantizer are left out.

    Raises:
        ValueError: no weight is quantized; or a quantizer is off, has no scale, rounds stochastically, has another
            format than ``"int"`` or a scale that is not the step itself; or a weight is not finite.
    """
    found = {name: _exported(name, *place, dtype) for name, *place in _weights(model)}
    if not found:
        _checks.fail(
            "export_codes", "model", "have a quantized weight", "none", "; fastflat.prepare(model, weights=...)"
        )
    return found


@torch.no_grad()
def load_codes(model: nn.Module, codes: Mapping[str, LayerCodes]) -> nn.Module:
    """Put exported codes into a prepared model: its weights become the grid's values, its scales and zero-points the
    exported ones, so that its quantized weights equal those that were exported.

    What is no code (biases, norms, input quantizers) comes by ``load_state_dict``. Everything is checked first: on an
    error the model is as it was.

    Args:
        model: prepared with the same specs; training fields (estimator, grad_scale, mask, noise) may differ.
        codes: from :func:`export_codes` or :func:`codes_from_tensors`; all of the model's quantized weights.

    Returns:
        The model.

    Raises:
        ValueError: the names are not those of the model's quantized weights, a shape or a spec differs, codes lie off
            the grid, or the type of weight or scale is too coarse to hold the grid.
    """
    places = {name: place for name, *place in _weights(model)}
    for given, wanted, text in ((codes, places, "be quantized weights of the model"), (places, codes, "be in codes")):
        missing = [name for name in given if name not in wanted]
        if missing:
            _checks.fail("load_codes", "names", text, ", ".join(missing[:3]), "; prepare it as the exported model was")
    ready = {name: _checked(name, codes[name], *places[name]) for name in places}
    for name, (layer, which, quantizer) in places.items():
        getattr(layer, which).copy_(ready[name])
        quantizer.set_scale(codes[name].scale, codes[name].zero_point)
    return model


def codes_to_tensors(codes: Mapping[str, LayerCodes]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of codes for a file: tensors ``"NAME.codes"``, ``"NAME.scale"`` and, where there is one,
    ``"NAME.zero_point"``; metadata of strings, one JSON object with ``spec`` and ``dtype`` a name.

    They fit ``safetensors.torch.save_file(tensors, path, metadata)`` and ``torch.save((tensors, metadata), path)`` with
    ``torch.load(path, weights_only=True)``.
    """
    tensors = {f"{name}.{part}": getattr(c, part) for name, c in codes.items() for part in _PARTS}
    metadata = {name: json.dumps({"spec": c.spec, "dtype": c.dtype}) for name, c in codes.items()}
    return {name: t.contiguous() for name, t in tensors.items() if t is not None}, metadata


def codes_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, LayerCodes]:
    """What :func:`codes_to_tensors` took apart.

    Raises:
        ValueError: a tensor that the metadata name is missing, or a spec is none.
    """
    found = {}
    for name, text in metadata.items():
        for part in _PARTS[:2]:
            if f"{name}.{part}" not in tensors:
                _checks.fail("codes_from_tensors", "tensors", f"hold {name}.{part}", "none")
        about = json.loads(text)
        QuantSpec.from_dict(about["spec"])
        parts = [tensors.get(f"{name}.{part}") for part in _PARTS]
        found[name] = LayerCodes(*parts, about["spec"], about["dtype"])
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, QuantLayer, str, Quantizer]]:
    """Name, layer, parameter and quantizer of each quantized weight; shared layers once."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for which, quantizer in layer.weight_quantizers().items():
                yield f"{name}.{which}" if name else which, layer, which, quantizer


def _exported(name: str, layer: QuantLayer, which: str, quantizer: Quantizer, dtype: torch.dtype | None) -> LayerCodes:
    spec, weight = quantizer.spec, getattr(layer, which).detach()
    label = f"export_codes({name})"
    if not quantizer.enabled:
        _checks.fail(label, "quantizer", "be on", "one that is off", "; set enabled = True")
    if not quantizer.calibrated:
        _checks.fail(label, "quantizer", "have a scale", "none", "; call fastflat.calibrate(model, batches) first")
    for field, want in (("format", "int"), ("scale_is", "s")):
        if getattr(spec, field) != want:
            _checks.fail(label, f"spec.{field}", f"be {want!r} for integer codes", repr(getattr(spec, field)))
    if spec.rounding == "stochastic":
        _checks.fail(label, "spec.rounding", "be deterministic: a draw has no code", "'stochastic'")
    compute = compute_dtype(weight.dtype)
    scale, zero_point = quantizer.scale.detach().to(compute), quantizer.zero_point
    zero_point = None if zero_point is None else zero_point.detach().to(compute)
    rule = QuantSpec.from_dict({**spec.to_dict(), **_TRAINING})
    y = fake_quantize(weight.to(compute), scale, zero_point, spec=rule).double()
    q = y / spread(scale.double().clamp(min=spec.eps), weight, spec)
    if zero_point is not None:
        z = zero_point.double()
        z = z if spec.zero == "float" else z.round().clamp(spec.qmin, spec.qmax)
        q = q + spread(z, weight, spec)
    storage = next(t for t in _STORAGE if torch.iinfo(t).min <= spec.qmin and spec.qmax <= torch.iinfo(t).max)
    codes = q.round().nan_to_num(0.0).clamp(spec.qmin, spec.qmax).to(torch.int32).to(storage)
    kind = str(dtype or weight.dtype).removeprefix("torch.")
    made = LayerCodes(codes, scale.clone(), None if zero_point is None else zero_point.clone(), rule.to_dict(), kind)
    if not torch.equal(made.dequantize(), quantizer.evaluated(weight, dtype)):
        want = "be finite and quantized by the integer rule of its spec"
        _checks.fail(label, "weight", want, "one that no codes reproduce", "; mend it or skip the layer")
    return made


def _checked(name: str, given: LayerCodes, layer: QuantLayer, which: str, quantizer: Quantizer) -> Tensor:
    """The weight that the codes stand for, in the type of the layer's."""
    weight, label = getattr(layer, which), f"load_codes({name})"
    own = {**quantizer.spec.to_dict(), **_TRAINING}
    differing = [field for field in own if own[field] != {**given.spec, **_TRAINING}.get(field)]
    if differing:
        field = differing[0]
        _checks.fail(label, f"spec.{field}", f"be {own[field]!r}, the model's", repr(given.spec.get(field)))
    rule = QuantSpec.from_dict(own)
    shapes = {"codes": weight.shape, "scale": quantizer.scale.shape}
    shapes["zero_point"] = None if quantizer.zero_point is None else quantizer.zero_point.shape
    for part, shape in shapes.items():
        got = getattr(given, part)
        if (got is None) != (shape is None) or (got is not None and got.shape != shape):
            text = "be None" if shape is None else f"have shape {list(shape)}"
            _checks.fail(label, part, text, None if got is None else list(got.shape))
    Quantizer.check_values({"scale": given.scale, "zero_point": given.zero_point}, label)
    codes = given.codes.to(torch.int32)
    if codes.numel() and not rule.qmin <= int(codes.min()) <= int(codes.max()) <= rule.qmax:
        _checks.fail(label, "codes", f"lie on [{rule.qmin}, {rule.qmax}]", f"{int(codes.min())} to {int(codes.max())}")
    made = given.dequantize(weight.dtype).to(weight.device)
    # As the quantizer will hold them: its scale may be of 16 bits.
    held = [p if p is None else p.to(quantizer.scale) for p in (given.scale, given.zero_point)]
    parameters = [p if p is None else p.to(compute_dtype(made.dtype)) for p in held]
    if not torch.equal(fake_quantize(made, *parameters, spec=rule), made):
        hint = "; load them into a model of float32 weights"
        _checks.fail(label, "weight", "hold the values of its grid", f"{weight.dtype}, which rounds them", hint)
    return made
