# SPDX-License-Identifier: Apache-2.0
"""Turning an ordinary model into a quantized one: :func:`prepare`; the optimizer's groups: :func:`param_groups`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from fastflat import _checks
from fastflat._spec import QuantSpec
from fastflat.quant import _ahead, layers
from fastflat.quant._layer import Factory, QuantLayer
from fastflat.quant.attention import QuantMultiheadAttention
from fastflat.quant.quantizer import Quantizer
from fastflat.quant.recurrent import QuantGRU, QuantLSTM

#: Which layer replaces which. Subclasses are left alone: they may use their weight in their own way.
LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: layers.QuantLinear,
    nn.Conv1d: layers.QuantConv1d,
    nn.Conv2d: layers.QuantConv2d,
    nn.ConvTranspose1d: layers.QuantConvTranspose1d,
    nn.ConvTranspose2d: layers.QuantConvTranspose2d,
    nn.Embedding: layers.QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
}

_KINDS = ", ".join(kind.__name__ for kind in LAYERS)

#: Bits for one layer: of both sides, or of each (a missing side keeps the spec's).
Bits = int | Mapping[str, int]


def prepare(
    model: nn.Module,
    *,
    weights: QuantSpec | None = None,
    activations: QuantSpec | None = None,
    bits: Mapping[str, Bits] | None = None,
    skip: Sequence[str] = (),
    quantizer: Factory = Quantizer,
    fuse_weights: bool = False,
) -> nn.Module:
    """Replace every layer of a model that has a quantized form (:data:`LAYERS`) by it, in place: linear, convolutions
    and their transposes in 1 and 2 dimensions, embedding, multi-head attention, LSTM and GRU.

    Parameters stay the same objects under the same names, so optimizers and checkpoints that hold them go on working;
    shared layers and tied weights stay shared. Weights' scales are taken from the weights at once; activations' come
    from data by :func:`fastflat.calibrate`. Everything is checked first: on an error the model is as it was.

    Encoder layers of ``nn.Transformer`` no longer take their inference fast path, which would read the unquantized
    weights past the quantizers.

    Args:
        model: any module. If the model itself is such a layer, use the returned one.
        weights: spec of the weights (``axis=0`` for a scale per output channel, in transposed convolutions too);
            ``None`` leaves them in floats.
        activations: spec of the layers' inputs; ``None`` leaves them in floats. Embeddings, whose inputs are indices,
            have no use for it.
        bits: other bit-widths by layer name: ``{"layer3.*": 2, "head": {"weights": 8, "activations": 4}}``. Patterns
            are those of ``fnmatch`` on full names (``*`` crosses dots); a later match overrides an earlier one.
        skip: patterns of layers that stay as they are.
        quantizer: class of the quantizers; :mod:`fastflat.quant.eager` has others to compare with.
        fuse_weights: quantize all weights by one :func:`fastflat.fake_quantize_list` before each forward of the model,
            with the same bits of results and gradients; it pays where layers are many and small. A sub-module that is
            called alone, quantizers with noise or of another class, and a second call of a layer in one forward compute
            their weights as without it. The gradients of all weights come at the end of backward, so that
            DistributedDataParallel cannot hide its reduction behind it. Not for activation checkpointing around
            quantized layers nor for parameters that are gathered layer by layer (FSDP).

    Returns:
        The model.

    Raises:
        TypeError, ValueError: a pattern matches no layer (the message names close ones), a spec does not fit a layer,
            a layer has an option that its quantized form lacks (skip it), or a weight gives no usable scale (NaN, or
            all zero).

    Example::

        spec = ff.QuantSpec.lsq(bits=4, axis=0)
        model = ff.prepare(model, weights=spec, activations=ff.QuantSpec.lsq(bits=4, signed=False),
                           bits={"layer3.*": 2}, skip=("conv1", "fc"))
    """
    for name, spec in (("weights", weights), ("activations", activations)):
        if spec is not None and not isinstance(spec, QuantSpec):
            _checks.fail("prepare", name, "be a QuantSpec or None", type(spec))
    if weights is None and activations is None:
        _checks.fail("prepare", "weights or activations", "be a QuantSpec", "None for both")
    if isinstance(skip, str):
        _checks.fail("prepare", "skip", "be a sequence of patterns", repr(skip), f"; write skip=({skip!r},)")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        _checks.fail("prepare", "model", "have its shapes", "lazy layers", "; run one batch through it first")

    named = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if type(m) in LAYERS]
    if not named:
        _checks.fail("prepare", "model", f"hold a layer that is not yet quantized, of {_KINDS}", "none")
    chosen = _choose([name for name, _ in named], weights, activations, dict(bits or {}), tuple(skip))
    for name, module in named:
        if chosen[name] is not None and not LAYERS[type(module)].inputs:
            of_weights = chosen[name][0]
            chosen[name] = None if of_weights is None else (of_weights, None)

    made: dict[int, tuple[str, Any, nn.Module]] = {}
    for name, module in named:
        if id(module) not in made:
            specs = chosen[name]
            layer = module
            if specs is not None:
                layer = LAYERS[type(module)].from_float(module, *specs, quantizer=quantizer, name=name)
            made[id(module)] = (name, specs, layer)
        elif made[id(module)][1] != chosen[name]:
            first = made[id(module)][0]
            _checks.fail("prepare", "bits and skip", f"agree for {first} and {name}, one shared layer", "two answers")
    if all(specs is None for _, specs, _ in made.values()):
        _checks.fail("prepare", "skip", "leave a layer to quantize", f"all {len(made)} layers skipped")

    for name, module in named:
        layer = made[id(module)][2]
        if name == "":
            model = layer
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    _leave_fast_path(model)
    model.register_load_state_dict_pre_hook(check_before_load)
    if fuse_weights:
        _ahead.install(model)
    return model


def _leave_fast_path(model: nn.Module) -> None:
    """Encoder layers that hold quantized ones say that they do not fit the fused inference kernel, and encoders that
    they do not pack their input for it."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_quantized(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _holds_quantized(module):
            module.use_nested_tensor = False


def _holds_quantized(module: nn.Module) -> bool:
    return any(isinstance(m, QuantLayer) for m in module.modules())


def check_before_load(model: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """Hook of prepared models: checks all quantizers' entries of a state_dict before the first one is loaded."""
    for name, module in model.named_modules(remove_duplicate=False):
        check = getattr(module, "check_state", None)
        if check is not None:
            check(state, f"{prefix}{name}." if name else prefix)


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """The quantizers of a model with their names, shared ones once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Quantizer))


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    scale_lr: float | None = None,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for any ``torch.optim`` optimizer: quantizer scales and zero-points apart, without decay.

    Args:
        model: the model; only parameters that require a gradient are grouped.
        lr: learning rate of the weights; ``None`` leaves it to the optimizer's default.
        scale_lr: learning rate of scales and zero-points; ``None`` means that of the weights.
        weight_decay: decay of everything but scales and zero-points.
        decay_norm_and_bias: ``False`` exempts parameters of fewer than two axes too (biases, normalisation).

    Returns:
        Groups ``"weights"``, ``"norm_and_bias"`` (when exempt) and ``"scales"``, each with a ``"name"``; empty ones
        are left out.

    Raises:
        ValueError: a rate or the decay is negative or not finite.
    """
    for name, value in (("lr", lr), ("scale_lr", scale_lr), ("weight_decay", weight_decay)):
        if value is not None and not 0 <= value < float("inf"):
            _checks.fail("param_groups", name, "be a finite number of at least 0", value)
    of_scales = {id(p) for _, q in quantizers(model) for p in q.parameters(recurse=False)}
    members: dict[str, list[nn.Parameter]] = {"weights": [], "norm_and_bias": [], "scales": []}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        exempt = not decay_norm_and_bias and p.dim() < 2
        members["scales" if id(p) in of_scales else "norm_and_bias" if exempt else "weights"].append(p)
    groups = []
    for name, params in members.items():
        rate = scale_lr if name == "scales" and scale_lr is not None else lr
        group = {"name": name, "params": params, "weight_decay": weight_decay if name == "weights" else 0.0}
        groups += [group if rate is None else {**group, "lr": rate}] if params else []
    return groups


def _choose(
    names: list[str],
    weights: QuantSpec | None,
    activations: QuantSpec | None,
    bits: dict[str, Bits],
    skip: tuple[str, ...],
) -> dict[str, tuple[QuantSpec | None, QuantSpec | None] | None]:
    """The specs of each layer by name; ``None`` for the skipped."""
    chosen: dict[str, Any] = dict.fromkeys(names, (weights, activations))
    for pattern, wanted in bits.items():
        changed = _with_bits(pattern, wanted, weights, activations)
        for name in _matching(pattern, names, "bits"):
            chosen[name] = changed
    for pattern in skip:
        for name in _matching(pattern, names, "skip"):
            chosen[name] = None
    return chosen


def _with_bits(
    pattern: str, wanted: Bits, weights: QuantSpec | None, activations: QuantSpec | None
) -> tuple[QuantSpec | None, QuantSpec | None]:
    sides = {"weights": weights, "activations": activations}
    if not isinstance(wanted, Mapping):
        wanted = {side: wanted for side, spec in sides.items() if spec is not None}
    for side, value in wanted.items():
        if side not in sides:
            _checks.fail("prepare", f"bits[{pattern!r}]", "have the keys weights and activations", repr(side))
        if sides[side] is None:
            hint = f"; pass {side}=QuantSpec(...)"
            _checks.fail("prepare", f"bits[{pattern!r}]", f"leave out {side}, which have no spec", repr(value), hint)
        try:
            sides[side] = sides[side].replace(bits=value)
        except ValueError as error:
            raise ValueError(f"fastflat::prepare: bits[{pattern!r}] for {side}: {error}") from None
    return sides["weights"], sides["activations"]


def _matching(pattern: str, names: list[str], argument: str) -> list[str]:
    """Names that the pattern matches; an error that tells close ones if there are none."""
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if found:
        return found
    if any(name.startswith(pattern + ".") for name in names):
        hint = f"; for the layers inside write {pattern + '.*'!r}"
    else:
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        hint = "; close names: " + ", ".join(close)
    _checks.fail("prepare", argument, "match the name of a layer that can be quantized", repr(pattern), hint)
    return []
