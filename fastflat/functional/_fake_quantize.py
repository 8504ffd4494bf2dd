# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization as users call it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import RULES, QuantSpec
from fastflat.autograd import fake_quantize as rule
from fastflat.autograd import general_dynamic as dynamic
from fastflat.autograd import general_quantize as general
from fastflat.backends import forced_backend, kernels
from fastflat.functional import _noise

__all__ = ["fake_quantize", "fake_quantize_dynamic"]

#: Plans kept for each spec before they are forgotten: bounds the memory that changing shapes take.
_PLANS = 256


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    spec: QuantSpec,
    nu: Tensor | float | None = None,
    a: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    state: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize and dequantize x on the grid of `spec`, with noise if it asks for some, in one pass forward and one
    backward.

    Formula, with ``s = max(scale, spec.eps)``, ``z`` the zero-point (0 without one) and the default conventions::

        y = (clamp(round(x / s) + z, qmin, qmax) - z) * s

    Ties round to the even neighbour; :class:`QuantSpec` states the other conventions, formats and kinds of noise.
    Arithmetic runs in fp32 (fp64 for fp64 x) and is rounded once to the storage type; all backends give the same bits.

    Gradients (straight-through, with u = x/s, y = d s, the mask m of elements on the grid and the residual frozen,
    ``f`` the factor of ``spec.grad_scale``)::

        dL/dx = m k dL/dy                                     k = 1; "ewgs": 1 + delta sign(dL/dy) (u - d)
        dL/ds = f sum(dL/dy (d - m k u))                      "lsq", "ewgs"; "ste" takes s and z as constants
        dL/ds = f sum(dL/dy (1 - m) d)                        "pact"
        dL/dz = -f s sum(dL/dy (1 - m k))
        dL/ddelta = sum(m |dL/dy| (u - d) x)                  if delta requires a gradient: that of y = Q + k x with
                                                              Q and k's sign and residual frozen

    Noise adds its term to d and leaves these formulas; ``bypass`` has m = 1, d = u where it keeps x. Nothing but the
    inputs and the 16-byte random state is saved: backward draws the same numbers again. Double backward, forward mode,
    ``torch.func`` and ``vmap`` follow the same frozen form, which is linear in each of x, s and z; in them
    "ewgs" counts as "lsq", since it is the gradient of nothing.

    Args:
        x: any shape and dense layout (strided input costs one copy); float32, bfloat16, float16 or float64.
        scale: ``[]`` (axis and group None), ``[C]`` (axis) or ``[..., K/group]`` (group), in float32 (float64 for
            float64 x) or the dtype of x. What it holds, ``spec.scale_is`` says.
        zero_point: None, or like scale, in units of codes; needs ``spec.symmetric=False``.
        spec: the quantizer.
        nu: amplitude of the noise (default 1), the share of kept elements with ``noise="bypass"``; a number or a
            0-dim tensor on the device of x, which a schedule may change without a new graph or a synchronisation.
        a: share of the residual that ``noise="temper"`` gives back (default 0).
        delta: factor of ``estimator="ewgs"``, which needs it.
        generator: of the draws; default the device's. ``torch.manual_seed`` and CUDA graphs are honoured.
        state: int64[2] of :func:`fastflat.draw_state`, to draw the same numbers in several calls.
        dtype: storage type of the result, to cast an fp32 x to bfloat16 or float16 in the same pass.

    Returns:
        y with the shape of x and the strides of ``torch.empty_like(x)`` (contiguous with groups).

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Jacob et al., CVPR 2018 (affine grid); Esser et al., ICLR 2020, eq. 1-5 (LSQ); Bhalgat et al., 2020 (LSQ+);
    Choi et al., 2018 (PACT); Lee et al., CVPR 2021, eq. 5 (EWGS); Defossez et al., 2022 (uniform noise); Fan et al.,
    ICLR 2021 (bypass); Wang et al., 2022 (temper).
    """
    op = "fake_quantize"
    plan = plan_of(op, x, scale, zero_point, spec, dtype)
    compute = compute_dtype(x.dtype)
    if scale.dtype is not compute:
        scale = scale.to(compute)
    if zero_point is not None and zero_point.dtype is not compute:
        zero_point = zero_point.to(compute)
    if spec.scale_is != "s":
        scale = scale_value(scale, spec)
    if _checks.VALUES_WANTED:
        _checks.scale_values(op, scale)
    if not is_general(spec, plan):
        if nu is not None or a is not None or delta is not None or generator is not None or state is not None:
            _unwanted(op, spec, nu=nu, a=a, delta=delta, generator=generator, state=state)
        return rule.fake_quantize(x, scale, zero_point, plan)
    state, nu, a = _chance(op, x, spec, nu, a, generator, state)
    if spec.estimator == "ewgs":
        if delta is None:
            _checks.fail(op, "delta", "be given with estimator='ewgs'", None, "; a number or a 0-dim tensor")
        delta = _noise.scalar(op, "delta", delta, x)
        plan = plan._replace(trains_delta=delta.requires_grad)
    elif delta is not None:
        _unwanted(op, spec, delta=delta)
    return general.general_quantize(x, scale, zero_point, state, nu, a, delta, plan)


def is_general(spec: QuantSpec, plan: rule.Plan) -> bool:
    """Whether a call needs the general_quantize ops."""
    return plan.grid[5] > 0xFF or spec.estimator == "ewgs"


def scale_value(scale: Tensor, spec: QuantSpec) -> Tensor:
    """The scale s that a tensor of ``spec.scale_is`` stands for, differentiable."""
    if spec.scale_is == "s":
        return scale
    if spec.scale_is == "log2":
        # Through fp64: rounded once to fp32, it has the same bits on every device.
        return torch.exp2(scale.double()).to(scale.dtype)
    return scale / (max(spec.qmax, 1) if spec.scale_is == "absmax" else spec.qmax - spec.qmin)


def _unwanted(op: str, spec: QuantSpec, **arguments: object) -> None:
    """Refuse what a deterministic or otherwise unfitting spec has no use for."""
    for name, value in arguments.items():
        if value is not None:
            needs = {"delta": "estimator='ewgs'", "a": "noise='temper'", "nu": "noise"}.get(name, "noise or rounding")
            got = f"noise={spec.noise!r}, rounding={spec.rounding!r}, estimator={spec.estimator!r}"
            _checks.fail(op, name, f"be None unless the spec has {needs}", f"a value with {got}")


def fake_quantize_dynamic(
    x: Tensor,
    *,
    spec: QuantSpec,
    nu: Tensor | float | None = None,
    a: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    state: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize x with a scale taken from x itself, fused, by ``spec.scale_rule``; a is the largest magnitude of the
    elements of a scale, ``largest`` the highest value of the grid, ``emax = floor(log2 largest)``::

        absmax   s = a / max(largest, 1)
        floor    s = 2**(floor(log2 a) - emax)                 OCP Microscaling Formats v1.0, section 6.3
        ceil     s = 2**(ceil(log2 a) - emax)
        even     floor, with a first rounded to the format's mantissa bits, halves up
        rceil    s = 2**ceil(log2(a / largest))
        e4m3     s = o e4m3(clamp(a / largest / o, 2**-6, 448)), o = max|x| / (448 largest) over the tensor  NVFP4

    Powers of two lie in [2**-126, 2**127]. The maximum is exact: y and scale have the same bits on every backend. The
    scale counts as a constant in every derivative (``dL/dx = m dL/dy``). NaN in the data makes its scale NaN.

    Args:
        x: as in :func:`fake_quantize`.
        spec: the quantizer; ``symmetric=True``, ``estimator="ste"``, ``scale_is="s"``. Block formats:
            :meth:`QuantSpec.mx`, :meth:`QuantSpec.nvfp4`.
        nu, a, generator, state: as in :func:`fake_quantize`.
        dtype: storage type of y.

    Returns:
        (y, scale): y as in :func:`fake_quantize`; scale ``[]``, ``[C]`` or ``[..., K/group]`` in the compute type.

    Raises:
        TypeError, ValueError: as :func:`fake_quantize`.
    """
    op = "fake_quantize_dynamic"
    _checks.data(op, x, spec)
    if not spec.symmetric:
        _checks.fail(op, "spec.symmetric", "be True: an absmax scale has no zero-point", spec.symmetric)
    if spec.estimator != "ste":
        _checks.fail(op, "spec.estimator", "be 'ste': the scale comes from the data", repr(spec.estimator))
    if spec.scale_is != "s" or spec.arithmetic == "inverse":
        got = f"scale_is={spec.scale_is!r}, arithmetic={spec.arithmetic!r}"
        _checks.fail(op, "spec", "have scale_is='s' and no inverse arithmetic: the scale comes from the data", got)
    if dtype is not None:
        _checks.stored_as(op, x, dtype)
    *grid, rules = _grid(spec, x)
    if spec.scale_rule != "absmax":
        rules |= RULES[f"scale_{spec.scale_rule}"]
    plan = rule.Plan((*grid, rules), 1.0, False, dtype, _kernels_for(x))
    if rules <= 0xFF:
        _unwanted(op, spec, nu=nu, a=a, generator=generator, state=state)
        return rule.fake_quantize_absmax(x, plan)
    compute = compute_dtype(x.dtype)
    state, nu, a = _chance(op, x, spec, nu, a, generator, state)
    outer = None
    if spec.scale_rule == "e4m3":
        # Exact in any order, and NaN stays: the maximum of the magnitudes.
        outer = torch.linalg.vector_norm(x.detach(), ord=float("inf")).to(compute) if x.numel() else None
        outer = torch.ones((), dtype=compute, device=x.device) if outer is None else outer / (448.0 * spec.qmax)
    return dynamic.general_quantize_dynamic(x, state, nu, a, outer, plan)


def _chance(op, x, spec, nu, a, generator, state):
    """state, nu and a of a call as the raw ops take them; refused where the spec has no use for them."""
    if spec.draws:
        state = _noise.state_for(op, x, state, generator)
    else:
        _unwanted(op, spec, generator=generator, state=state)
    if spec.noise == "none":
        _unwanted(op, spec, nu=nu)
    elif nu is not None:
        nu = _noise.scalar(op, "nu", nu, x)
    if spec.noise != "temper":
        _unwanted(op, spec, a=a)
    elif a is not None:
        a = _noise.scalar(op, "a", a, x)
    return state, nu, a


def _grid(spec: QuantSpec, x: Tensor) -> tuple[int, int, int, int, float, int]:
    rules = spec.rules
    if x.element_size() > 2:
        rules &= ~RULES["compute_input"]  # arithmetic in the type of x is what there is
    return (*spec.ends, _checks.axis_of(spec, x.dim()), spec.group or 0, spec.eps, rules)


def _kernels_for(x: Tensor):
    """The callables of the backend in force; a compiled graph holds the dispatcher's ops instead."""
    return None if torch.compiler.is_compiling() else kernels(x.device.type)


def plan_of(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype | None
) -> rule.Plan:
    """The checked, cached description of a call; a second call with the same metadata costs one look-up."""
    if torch.compiler.is_compiling():
        return checked_plan(op, x, scale, zero_point, spec, dtype)
    try:
        offset = None if zero_point is None else (zero_point.shape, zero_point.dtype, zero_point.device)
        trained = scale.requires_grad or (zero_point is not None and zero_point.requires_grad)
        data = (x.shape, x.dtype, x.device, x.layout)
        key = (data, scale.shape, scale.dtype, scale.device, offset, dtype, trained, forced_backend())
        plan = spec._plans.get(key)
    except AttributeError:  # not even tensors or a spec: the checks say which
        return checked_plan(op, x, scale, zero_point, spec, dtype)
    if plan is None:
        plan = checked_plan(op, x, scale, zero_point, spec, dtype)
        if len(spec._plans) >= _PLANS:
            spec._plans.clear()
        spec._plans[key] = plan
    return plan


def checked_plan(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype | None
) -> rule.Plan:
    """The description of a call, checked anew."""
    _checks.data(op, x, spec)
    _checks.parameter(op, "scale", scale, x, spec)
    if zero_point is not None:
        if spec.symmetric:
            _checks.fail(op, "zero_point", "be None with spec.symmetric=True", "a tensor", "; use symmetric=False")
        _checks.parameter(op, "zero_point", zero_point, x, spec)
    if dtype is not None:
        _checks.stored_as(op, x, dtype)
    if spec.estimator == "ste" and (scale.requires_grad or (zero_point is not None and zero_point.requires_grad)):
        hint = "; use estimator='lsq' to train them, or detach them"
        _checks.fail(op, "scale and zero_point", "need no gradient with estimator='ste'", "requires_grad=True", hint)
    factor = spec.grad_factor(x.numel(), max(scale.numel(), 1))
    return rule.Plan(_grid(spec, x), factor, spec.trains_scale, dtype, _kernels_for(x))
