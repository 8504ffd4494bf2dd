# SPDX-License-Identifier: Apache-2.0
"""Brevitas' RescalingIntQuant: what it computes, read off its parts, and the same computed by fastflat.

Its scale stays a function of whatever it was a function of, statistics in the graph included: the commonest of these
functions are :mod:`fastflat.integrations._measured`, the others are called as they are.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflat._spec import QuantSpec
from fastflat.functional import fake_quantize
from fastflat.integrations._grid import axis_of, flat, grid
from fastflat.integrations._measured import Measure, Quantized, Size


class Form(NamedTuple):
    """A RescalingIntQuant in other words."""

    bits: Tensor  # its bit width, as it was read
    version: int
    specs: dict[tuple[int | None, bool, bool], QuantSpec]  # by axis of the scale, whether it is trained, and a ReLU
    source: str  # what its scale is a function of: "stage", "value", "absmax", "stats"; "" if it is not known here
    measure: Measure  # how it follows from that
    zero: bool  # its zero-point is 0


#: Types in which arithmetic is exact to the bit whatever the order of conversions.
_WIDE = (torch.float32, torch.float64)

#: Forms by module: read again when a bit width was written, gone with the module.
_FORMS: weakref.WeakKeyDictionary[nn.Module, Form] = weakref.WeakKeyDictionary()


def package(path: str) -> Any:
    """An object of Brevitas by its path, if the program has imported it: no model holds its classes otherwise."""
    module, name = path.rsplit(".", 1)
    found = sys.modules.get(f"brevitas.{module}")
    return None if found is None else getattr(found, name, None)


def named(part: nn.Module, *names: str) -> bool:
    """Whether a part is of one of these classes of Brevitas, by name: it is not imported here."""
    return type(part).__name__ in names and type(part).__module__.startswith("brevitas.")


def reason(quant: nn.Module) -> str | None:
    """Why a quantizer of Brevitas is not one of these."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in quant.modules()):
        return "it is compiled to TorchScript (BREVITAS_JIT=1)"
    if "Decoupled" in type(quant).__name__:
        return f"{type(quant).__name__} has one scale to divide by and another to multiply with"
    if not named(quant, "RescalingIntQuant"):
        return f"{type(quant).__name__} is not RescalingIntQuant"
    inner = quant.int_quant
    if not named(inner, "IntQuant"):
        return f"its int_quant is {type(inner).__name__}, not IntQuant"
    wanted = (
        ("rounding", inner.float_to_int_impl, ("RoundSte",)),
        ("clamp", inner.tensor_clamp_impl, ("TensorClamp", "TensorClampSte", "InplaceTensorClampSte")),
        ("delay", inner.delay_wrapper.delay_impl, ("_NoDelay",)),
        ("view", inner.input_view_impl, ("Identity",)),
        ("bit width", quant.msb_clamp_bit_width_impl, ("BitWidthConst", "BitWidthStatefulConst")),
    )
    for what, part, names in wanted:
        if not named(part, *names):
            return f"its {what} is {type(part).__name__}, not {' or '.join(names)}"
    parts = (quant, inner, inner.float_to_int_impl, inner.tensor_clamp_impl, inner.delay_wrapper, inner.input_view_impl)
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "a part of it has forward hooks"
    low, high = ends(quant)
    return None if grid(low, high) else f"no spec has the grid [{low}, {high}]"


def ready(quant: nn.Module) -> bool:
    """Whether the forward of a quantizer that had no :func:`reason` is still the one known here."""
    return type(quant).__name__ == "RescalingIntQuant" and not quant.observer_only and not quant._forward_hooks


def follows_data(quant: nn.Module, training: bool) -> bool:
    """Whether the scale is a function of x at the next call, as far as is known."""
    source, scaling = _form(quant).source, quant.scaling_impl
    if source == "stage":
        return training and scaling.counter < scaling.collect_stats_steps
    return source != "value" or not getattr(scaling, "init_done", True)


def ends(quant: nn.Module) -> tuple[int, int]:
    """The lowest and the highest code."""
    bits = quant.msb_clamp_bit_width_impl()
    return int(quant.int_quant.min_int(bits)), int(quant.int_quant.max_int(bits))


def quantize(quant: nn.Module, x: Tensor, rectified: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the forward of a RescalingIntQuant without a :func:`reason` returns for x, or for max(x, 0) if
    ``rectified``: y, scale, zero-point, bit width."""
    form, scaling = _form(quant), quant.scaling_impl
    bits = form.bits.detach()
    v, measure = _value(form, scaling)
    if form.zero:
        zero = quant.zero_point_impl.zero_point.value.detach()
        axis = axis_of(x if v is None else v, x) if v is not None else None
        known = v is not None or (form.source == "absmax" and not rectified)
        if known and axis != "" and x.dtype in _WIDE and x.dtype is form.bits.dtype is zero.dtype:
            spec = _spec(form, axis, True, rectified)
            # Adding a zero-point of 0 turns -0 into +0, which a ReLU has done already.
            offset = None if rectified else _as_scale(zero, axis, v)
            return *Quantized.apply(x, v, offset, spec, measure), zero, bits
    if rectified:
        x = torch.relu(x)
    if v is not None:
        scale = Size.apply(v, measure)
    elif form.source == "absmax":
        scale = Size.apply(x.abs().max(), measure)
    elif form.source == "stats":
        scale = Size.apply(scaling.parameter_list_stats(x), measure)
    else:
        scale = scaling(x, measure.threshold)
    zero = zero if form.zero else quant.zero_point_impl(x, scale, bits)
    y = _on_grid(form, scale, zero, x)
    return quant.int_quant(scale, zero, bits, x) if y is None else y, scale, zero, bits


def _value(form: Form, scaling: nn.Module) -> tuple[Tensor | None, Measure]:
    """The parameter that the scale is a function of, if it is one of a parameter now, and the function."""
    if form.source == "stage" and scaling.counter > scaling.collect_stats_steps:  # its statistics are complete
        return scaling.value, form.measure if scaling.training else form.measure._replace(late=True)
    if form.source == "value" and getattr(scaling, "init_done", True):
        return scaling.value, form.measure
    return None, form.measure


def _as_scale(zero: Tensor, axis: int | None, scale: Tensor) -> Tensor:
    """A zero-point in the shape of flat scales."""
    if axis is None:
        return zero.reshape(())
    return zero.reshape(-1) if zero.numel() == scale.numel() else zero.reshape(1).expand(scale.numel()).contiguous()


def _spec(form: Form, axis: int | None, trained: bool, rectified: bool) -> QuantSpec:
    spec = form.specs.get((axis, trained, rectified))
    if spec is None:
        estimator = "lsq" if trained else "ste"
        spec = form.specs[None, False, False].replace(axis=axis, estimator=estimator, rectified=rectified)
        if rectified:
            spec = spec.replace(symmetric=True, zero="outside")
        form.specs[axis, trained, rectified] = spec
    return spec


def _on_grid(form: Form, scale: Tensor, zero: Tensor, x: Tensor) -> Tensor | None:
    """y; None where a spec has not the shapes or types at hand."""
    if not x.dtype is scale.dtype is zero.dtype:
        return None  # types are promoted operation by operation
    if x.dtype is torch.float16 and form.source not in ("stage", "value"):
        return None  # the least scale of statistics, 1e-10, is 0 there: NaN for zeros
    axis = axis_of(scale, x)
    if axis == "" or zero.numel() not in (1, scale.numel()) or zero.dim() > x.dim():
        return None
    spec = _spec(form, axis, scale.requires_grad or zero.requires_grad, False)
    return fake_quantize(x, scale.reshape(flat(axis)), _as_scale(zero, axis, scale), spec=spec)


def _bits(quant: nn.Module) -> Tensor:
    """The bit width as it is stored."""
    width = quant.msb_clamp_bit_width_impl.bit_width
    return width if isinstance(width, Tensor) else width.value


def _form(quant: nn.Module) -> Form:
    form, bits = _FORMS.get(quant), _bits(quant)
    if form is None or form.bits is not bits or form.version != bits._version:
        straight = not named(quant.int_quant.tensor_clamp_impl, "TensorClamp")
        with torch.no_grad():
            fields = grid(*ends(quant))
            threshold = quant.int_scaling_impl(bits)
        spec = QuantSpec.brevitas(**{"weight": straight, "compute": "input", **fields})
        source, least = _source(quant.scaling_impl)
        zero = named(quant.zero_point_impl, "ZeroZeroPoint")
        measure = Measure(least, threshold, -threshold, False)
        form = Form(bits, bits._version, {(None, False, False): spec}, source, measure, zero)
        _FORMS[quant] = form
    return form


# Scales --------------------------------------------------------------------------------------------------------------


def _source(impl: nn.Module) -> tuple[str, float]:
    """What a scaling_impl is a function of, where it is known here, and its least value."""
    if named(impl, "ParameterFromRuntimeStatsScaling"):
        restricted = (impl.restrict_scaling, impl.restrict_threshold, impl.restrict_scale_threshold)
        return ("stage" if _free(*restricted) else ""), abs(impl.clamp_scaling.min_val or 0.0)
    if named(impl, "ParameterScaling"):
        restricted = (impl.restrict_clamp_scaling, impl.restrict_clamp_threshold, impl.restrict_clamp_scale_threshold)
        return ("value" if _free(*restricted) else ""), _least(impl)
    if not named(impl, "StatsFromParameterScaling", "ParameterFromStatsFromParameterScaling"):
        return "", 0.0
    parts = impl.stats_scaling_impl
    restricted = (parts.restrict_clamp_scaling, parts.restrict_clamp_threshold, parts.restrict_clamp_scale_threshold)
    if not _free(*restricted):
        return "", 0.0
    if named(impl, "ParameterFromStatsFromParameterScaling"):
        return "value", _least(parts)
    stats = impl.parameter_list_stats
    view, largest = getattr(stats.first_tracked_param, "view_shape_impl", None), stats.stats.stats_impl
    known = (
        named(stats.first_tracked_param, "_ViewParameter")
        and stats.extra_tracked_params_list is None
        and named(parts.affine_rescaling, "Identity")
        and named(largest, "AbsMax")
        and largest.stats_reduce_dim is None
        and named(view, "OverTensorView")
    )
    return ("absmax" if known else "stats"), _least(parts)


def _free(scaling: nn.Module, threshold: nn.Module, quotient: nn.Module) -> bool:
    """Whether scale and threshold are magnitudes that nothing restricts further."""
    floats = all(named(part.restrict_value_impl, "FloatRestrictValue") for part in (scaling, threshold))
    return floats and named(quotient.restrict_value_impl, "Identity")


def _least(holder: nn.Module) -> float:
    return getattr(holder.restrict_clamp_scaling.clamp_ste, "min_val", 0.0)
