# SPDX-License-Identifier: Apache-2.0
"""What a quantized model's layers hold: bits, scales, clipping, used codes and quantization error of the weights."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from fastflat.quant._initial import spread
from fastflat.quant._layer import QuantLayer
from fastflat.quant.prepare import LAYERS
from fastflat.quant.quantizer import Quantizer


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One weight of a layer. Fields of a side that stays in floats are ``None``.

    Attributes:
        name, kind: the layer's name and class. Where a layer has several weights, or one of another name than
            ``weight``, the name goes on with it: ``lstm.weight_ih_l0``.
        parameters: elements of the weight.
        weight_bits, activation_bits: widths of the grids.
        weight_scale: mean scale of the weight, ``weight_scale_range`` the least and the greatest.
        activation_scale: mean scale of the layer's inputs.
        clipped: share of the weights whose code was beyond the grid's ends.
        snr: ``10 log10(sum w^2 / sum (Q(w) - w)^2)`` in dB; infinite where the grid represents the weights exactly.
        codes: number of weights on each code from qmin to qmax (integer grids of up to 8 bits).
        lowest: the code of the first entry of ``codes``.
    """

    name: str
    kind: str
    parameters: int
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_scale: float | None = None
    weight_scale_range: tuple[float, float] | None = None
    activation_scale: float | None = None
    clipped: float | None = None
    snr: float | None = None
    codes: tuple[int, ...] | None = None
    lowest: int | None = None


@torch.no_grad()
def summary(model: nn.Module) -> list[LayerSummary]:
    """One row for each weight of the layers that have a quantized form, quantized or not, in the order of the model's
    modules."""
    rows = []
    for name, layer in model.named_modules():
        form = next((form for kind, form in LAYERS.items() if isinstance(layer, kind)), None)
        if form is not None:
            rows += [_row(name, layer, weight) for weight in form.weight_names(layer)]
    return rows


def _row(name: str, layer: nn.Module, which: str) -> LayerSummary:
    weight = getattr(layer, which)
    name = name if which == "weight" else f"{name}.{which}" if name else which
    row = LayerSummary(name, type(layer).__name__, weight.numel())
    if not isinstance(layer, QuantLayer):
        return row
    of_inputs, of_weight = list(layer.input_quantizers().values()), layer.weight_quantizers().get(which)
    if of_inputs:
        known = None
        if all(q.calibrated for q in of_inputs):
            known = float(torch.cat([q.step.flatten() for q in of_inputs]).mean())
        row = dataclasses.replace(row, activation_bits=of_inputs[0].spec.bits, activation_scale=known)
    if of_weight is None or not of_weight.calibrated:
        return row
    spec, scale = of_weight.spec, of_weight.step
    clipped, codes = _codes(weight, of_weight)
    return dataclasses.replace(
        row,
        weight_bits=spec.bits,
        weight_scale=float(scale.mean()),
        weight_scale_range=(float(scale.min()), float(scale.max())),
        clipped=clipped,
        snr=_snr(weight, of_weight.evaluated(weight)),
        codes=codes,
        lowest=spec.qmin if codes is not None else None,
    )


def _codes(weight: Tensor, quantizer: Quantizer) -> tuple[float, tuple[int, ...] | None]:
    """Share of clipped weights, and the histogram of the codes."""
    spec = quantizer.spec
    steps = weight.double() / spread(quantizer.step.double(), weight, spec).clamp(min=spec.eps)
    if quantizer.zero_point is not None:
        steps = steps + spread(quantizer.zero_point.double(), weight, spec)
    codes = steps.round() if spec.format == "int" else steps
    clipped = float(((codes < spec.qmin) | (codes > spec.qmax)).double().mean()) if weight.numel() else 0.0
    if spec.bits > 8 or spec.format != "int":
        return clipped, None
    counts = torch.bincount((codes.clamp(spec.qmin, spec.qmax) - spec.qmin).long().flatten())
    counts = nn.functional.pad(counts, (0, spec.qmax - spec.qmin + 1 - counts.numel()))
    return clipped, tuple(counts.tolist())


def _snr(weight: Tensor, quantized: Tensor) -> float:
    signal = float(weight.double().square().sum())
    noise = float((quantized.double() - weight.double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
