# SPDX-License-Identifier: Apache-2.0
"""What of a prepared model goes out: codes of weights, grids of activations; or one line that says why not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.quant import LayerCodes, Quantizer, export_codes
from fastflat.quant.eager import BuiltinQuantizer, EagerQuantizer
from fastflat.quant.layers import QuantLayer

#: Classes whose ``quantize`` is the rule of the spec, up to ties.
_KNOWN = {kind.quantize for kind in (Quantizer, EagerQuantizer, BuiltinQuantizer)}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The quantizer of an activation, ``y = (clamp(round(x / s) + z, qmin, qmax) - z) s`` (rectified: of max(x, 0)).

    Attributes:
        spec: the rule, as in evaluation.
        scale: ``[]`` or ``[C]`` along ``spec.axis``; the step itself, held at ``spec.eps`` from below.
        zero_point: like scale, integers of the grid; None where the spec has none.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor | None


@dataclasses.dataclass(frozen=True)
class Form:
    """A copy of a prepared model, in evaluation mode on the CPU, and what its quantizers hold.

    Attributes:
        model: the copy.
        weights: codes by the parameters' names.
        grids: of activations, by the quantizers' names.
    """

    model: nn.Module
    weights: dict[str, LayerCodes]
    grids: dict[str, Grid]

    def about(self) -> dict[str, Any]:
        """The description that files carry, of plain values."""
        weights = {name: {"spec": c.spec, "dtype": c.dtype} for name, c in self.weights.items()}
        return {"format": 1, "weights": weights, "activations": {n: g.spec.to_dict() for n, g in self.grids.items()}}


def weights_of(model: nn.Module) -> Iterator[tuple[str, QuantLayer, str]]:
    """Name, layer and parameter of each quantized weight; shared layers once."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for which in layer.weight_quantizers():
                yield f"{name}.{which}" if name else which, layer, which


def bits_of(about: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Bits by layer, as ``prepare(bits=...)`` takes them, of what :meth:`Form.about` says."""
    bits: dict[str, dict[str, int]] = {}
    for side, specs in (("weights", about["weights"]), ("activations", about["activations"])):
        for name, spec in specs.items():
            bits.setdefault(name.rpartition(".")[0], {})[side] = spec.get("spec", spec)["bits"]
    return bits


def gather(model: nn.Module) -> Form:
    """The form of a prepared model, which is left as it is.

    Raises:
        TypeError, ValueError: it has no quantizer, or one that integers cannot express; the message names it.
    """
    if not isinstance(model, nn.Module):
        _checks.fail("export", "model", "be a prepared torch.nn.Module", type(model))
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Quantizer)]
    if not found:
        _checks.fail("export", "model", "have a quantizer", "none", "; fastflat.prepare(model, weights=...)")
    for name, quantizer in found:
        _check(name, quantizer)
    of_weights = {id(layer.weight_quantizers()[which]) for _, layer, which in weights_of(model)}
    grids = {name: _grid(name, q) for name, q in found if id(q) not in of_weights}
    weights = export_codes(model) if of_weights else {}
    weights = {name: _on_cpu(codes) for name, codes in weights.items()}
    return Form(copy.deepcopy(model).eval().cpu(), weights, grids)


def replaced(
    form: Form, weight: Callable[[str, LayerCodes], nn.Module], activation: Callable[[str, Grid], nn.Module]
) -> nn.Module:
    """The form's model with other modules in the place of its quantizers. Quantized parameters become buffers of
    codes, which is what the module in place of a weight's quantizer is called with. Consumes the form's model."""
    model = form.model
    for name, layer, which in list(weights_of(model)):
        codes = form.weights[name]
        del layer._parameters[which]
        layer.register_buffer(which, codes.codes)
        setattr(layer, f"{which}_quantizer", weight(name, codes))
    made = {name: activation(name, grid) for name, grid in form.grids.items()}
    first = {id(m): name for name, m in model.named_modules() if isinstance(m, Quantizer)}
    for name, m in list(model.named_modules(remove_duplicate=False)):
        if id(m) in first:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[first[id(m)]])
    return model


def check_float32(model: nn.Module) -> None:
    """Graphs are written in float32."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and value.dtype != torch.float32:
            _checks.fail("export", name, "be float32 in a graph", value.dtype, "; call model.float() first")


def _check(name: str, quantizer: Quantizer) -> None:
    """What no target expresses."""
    label, spec = f"export({name})", quantizer.spec
    if not quantizer.enabled:
        _checks.fail(label, "quantizer", "be on", "one that is off", "; set enabled = True, or skip the layer")
    if not quantizer.calibrated:
        _checks.fail(label, "quantizer", "have a scale", "none", "; call fastflat.calibrate(model, batches) first")
    if type(quantizer).quantize not in _KNOWN:
        _checks.fail(label, "quantizer", "compute the rule of its spec", type(quantizer).__name__)
    if spec.format != "int":
        _checks.fail(label, "spec.format", "be 'int': files hold integer codes", repr(spec.format))


def _grid(name: str, quantizer: Quantizer) -> Grid:
    label, spec = f"export({name})", quantizer.spec.evaluation()
    if spec.arithmetic == "inverse":
        _checks.fail(label, "spec.arithmetic", "be 'divide' or 'reciprocal' for an activation", repr(spec.arithmetic))
    if spec.rounding != "even":
        _checks.fail(label, "spec.rounding", "be 'even' for an activation", repr(spec.rounding))
    scale = quantizer.step.detach().cpu().clamp(min=spec.eps)
    zero_point = quantizer.zero_point
    if zero_point is not None:
        given = zero_point.detach().cpu()
        zero_point = given.round().clamp(spec.qmin, spec.qmax)
        if spec.zero in ("float", "outside_float") and not torch.equal(zero_point, given):
            want = f"be integers in [{spec.qmin}, {spec.qmax}]"
            _checks.fail(label, "zero_point", want, f"spec.zero={spec.zero!r} with {given.flatten()[0]:g}")
    return Grid(spec, scale, zero_point)


def _on_cpu(codes: LayerCodes) -> LayerCodes:
    zero_point = None if codes.zero_point is None else codes.zero_point.cpu()
    return dataclasses.replace(codes, codes=codes.codes.cpu(), scale=codes.scale.cpu(), zero_point=zero_point)
