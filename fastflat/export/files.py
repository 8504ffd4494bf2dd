# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: safetensors with codes, scales and everything else of the model, beside a JSON of bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastflat import _checks
from fastflat.export._form import Form, bits_of, weights_of
from fastflat.export._loaded import Loaded, codes_of
from fastflat.quant import codes_to_tensors, load_codes
from fastflat.quant.prepare import check_before_load

#: Fields of a spec that training alone reads.
_TRAINING = {"estimator", "grad_scale", "mask", "through", "nan_gradient", "noise"}


def encode(form: Form) -> dict[str, bytes]:
    """The files' contents by what is put behind the stem."""
    from safetensors.torch import save

    about = form.about()
    tensors, _ = codes_to_tensors(form.weights)
    rest = rest_of(form.model)
    clash = sorted(tensors.keys() & rest.keys())
    if clash:
        _checks.fail("export", "model", "leave the names of codes free", clash[0])
    tensors |= {name: value.clone().contiguous() for name, value in rest.items()}
    bits = json.dumps(bits_of(about), indent=1) + "\n"
    return {".safetensors": save(tensors, {"fastflat": json.dumps(about)}), ".bits.json": bits.encode()}


def rest_of(model: nn.Module) -> dict[str, Tensor]:
    """What of a model's state is neither a quantized weight nor its scale."""
    own = [name for name, *_ in weights_of(model)]
    state = model.state_dict()
    kept = {
        key: value
        for key, value in state.items()
        if key not in own and not any(key.startswith(f"{name}_quantizer.") for name in own)
    }
    for key, value in kept.items():
        if not isinstance(value, Tensor):
            _checks.fail("export", key, "be a tensor in a file of tensors", type(value))
    return kept


def load(path: Path, model: nn.Module | None) -> Loaded:
    """Codes and tensors of a file, put into a prepared model if one is given."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            note = (file.metadata() or {}).get("fastflat")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        _checks.fail("export.load", str(path), "be a whole safetensors file", _checks.first_line(error))
    if note is None:
        _checks.fail("export.load", str(path), "be written by fastflat.export", "a file without its description")
    about = json.loads(note)
    parts: set[str] = set()

    def take(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        parts.update(f"{name}.{part}" for part in ("codes", "scale", "zero_point"))
        if f"{name}.codes" not in tensors or f"{name}.scale" not in tensors:
            _checks.fail("export.load", str(path), f"hold codes and scale of {name}", "neither, or one of them")
        return tensors[f"{name}.codes"], tensors[f"{name}.scale"], tensors.get(f"{name}.zero_point")

    codes = codes_of(about, take)
    rest = {name: value for name, value in tensors.items() if name not in parts}
    if model is None:
        return Loaded(path, about, codes, tensors=rest)
    check_rest(model, rest, about)
    load_codes(model, codes)
    model.load_state_dict(rest, strict=False)
    return Loaded(path, about, codes, runner(model), model, rest)


def check_rest(model: nn.Module, rest: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Whether the tensors fit a prepared model; nothing of it is changed."""
    own = rest_of(model)
    for given, wanted, text in ((rest, own, "belong to the model"), (own, rest, "be in the file")):
        missing = [name for name in given if name not in wanted]
        if missing:
            hint = "; prepare the model as the exported one was"
            _checks.fail("export.load", "tensors", text, ", ".join(missing[:3]), hint)
    for name, value in rest.items():
        if value.shape != own[name].shape:
            _checks.fail("export.load", name, f"have shape {list(own[name].shape)}", list(value.shape))
    for name, spec in about["activations"].items():
        held = model.get_submodule(name).spec.evaluation().to_dict()
        differing = [f for f in held if f not in _TRAINING and held[f] != spec.get(f)]
        if differing:
            field = differing[0]
            _checks.fail(f"export.load({name})", f"spec.{field}", f"be {held[field]!r}, the model's", spec.get(field))
    check_before_load(model, rest, "")


def runner(model: nn.Module):
    """A call of a model in evaluation mode without gradients."""

    @torch.no_grad()
    def run(*inputs: Tensor) -> Any:
        training = model.training
        try:
            return model.eval()(*inputs)
        finally:
            model.train(training)

    return run
