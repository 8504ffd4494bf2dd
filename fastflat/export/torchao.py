# SPDX-License-Identifier: Apache-2.0
"""torchao: weights as its integer tensors, in a state_dict that ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.export import _graph, files
from fastflat.export._form import Form, gather, weights_of
from fastflat.export._loaded import Loaded, codes_of
from fastflat.quant import LayerCodes, load_codes
from fastflat.quant.layers import QuantConv2d, QuantLinear

_KEYS = {"fastflat", "state_dict"}


def to_torchao(model: nn.Module) -> nn.Module:
    """A copy of a prepared model whose quantized weights are torchao's ``IntxUnpackedToInt8Tensor``: the same codes,
    scales and zero-points (codes and zero-points of an unsigned grid less ``2**(bits-1)``: torchao's are signed), the
    same weights in every bit. Quantizers of activations stay fastflat's: torchao's tensors have static ones of 8 bits
    alone.

    Raises:
        ValueError: a quantized weight is not that of a linear layer or a 2-d convolution, has more than 8 bits, or
            torchao computes other values from it; the message names it.
    """
    return _converted(gather(model))


def encode(form: Form) -> bytes:
    """The file's content."""
    note = json.dumps(form.about())
    file = io.BytesIO()
    torch.save({"fastflat": note, "state_dict": _converted(form).state_dict()}, file)
    return file.getvalue()


def load(path: Path, model: nn.Module | None) -> Loaded:
    """Integer tensors and the rest of a file, put into a prepared model if one is given."""

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        _checks.fail("export.load", str(path), "be a whole file of tensors", _checks.first_line(error))
    if not isinstance(content, dict) or set(content) != _KEYS:
        _checks.fail("export.load", str(path), "be written by fastflat.export", "another file of torch.save")
    about, state = json.loads(content["fastflat"]), content["state_dict"]
    codes = codes_of(about, lambda name: _parts(state[name], QuantSpec.from_dict(about["weights"][name]["spec"])))
    rest = {name: value for name, value in state.items() if name not in codes}
    if model is None:
        return Loaded(path, about, codes, tensors=rest)
    files.check_rest(model, rest, about)
    load_codes(model, codes)
    model.load_state_dict(rest, strict=False)
    for name, layer, which in list(weights_of(model)):
        _put(layer, which, state[name])
    return Loaded(path, about, codes, files.runner(model), model, rest)


def _converted(form: Form) -> nn.Module:
    made = {}
    for name, layer, _ in weights_of(form.model):
        label = f"export({name})"
        if type(layer) not in (QuantLinear, QuantConv2d):
            hint = "; skip it in prepare, or export to another target"
            _checks.fail(label, "layer", "be linear or a 2-d convolution for torchao", type(layer).__name__, hint)
        made[name] = _tensor(label, form.weights[name])
    for name, layer, which in list(weights_of(form.model)):
        _put(layer, which, made[name])
    return form.model


def _put(layer: nn.Module, which: str, tensor: Tensor) -> None:
    setattr(layer, which, nn.Parameter(tensor, requires_grad=False))
    setattr(layer, f"{which}_quantizer", None)


def _tensor(label: str, codes: LayerCodes) -> Tensor:
    spec = QuantSpec.from_dict(codes.spec)
    if spec.bits > 8:
        _checks.fail(label, "spec.bits", "be at most 8 for torchao", spec.bits)
    shift = 0 if spec.signed else 1 << (spec.bits - 1)
    shape, dtype = codes.codes.shape, getattr(torch, codes.dtype)
    block = list(shape)
    if spec.group is not None:
        block = [1] * (len(shape) - 1) + [spec.group]
    elif spec.axis is not None:
        block[spec.axis] = 1
    blocks = [n // b for n, b in zip(shape, block, strict=True)]
    scale = codes.scale.clamp(min=spec.eps).reshape(blocks)
    zero_point = torch.zeros(blocks) if codes.zero_point is None else codes.zero_point.reshape(blocks)
    if spec.zero not in ("float", "outside_float"):
        zero_point = zero_point.round().clamp(spec.qmin, spec.qmax)
    zero_point = zero_point - shift
    if torch.equal(zero_point, zero_point.round().clamp(-128, 127)):
        zero_point = zero_point.to(torch.int8)
    made = _tensor_class()(
        (codes.codes.to(torch.int16) - shift).to(torch.int8),
        scale,
        zero_point,
        getattr(torch, f"int{spec.bits}"),
        tuple(block),
        dtype,
        None,
    )
    if not torch.equal(made.dequantize(), codes.dequantize()):
        got = f"another (format, zero-point or {codes.dtype})"
        _checks.fail(label, "weight", "be the value that torchao computes from its codes", got)
    return made


def _tensor_class() -> type:
    with _graph.quietly():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    return IntxUnpackedToInt8Tensor


def _parts(tensor: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero-point in the shapes of a spec."""
    shift = 0 if spec.signed else 1 << (spec.bits - 1)
    scale, zero_point = tensor.scale, tensor.zero_point.to(tensor.scale.dtype) + shift
    if spec.group is None:
        shape = () if spec.axis is None else (-1,)
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return tensor.qdata.to(torch.int16) + shift, scale, zero_point
