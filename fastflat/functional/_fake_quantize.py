# SPDX-License-Identifier: Apache-2.0
"""Fake-quantization as users call it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype
from fastflat._spec import QuantSpec
from fastflat.autograd import fake_quantize as rule
from fastflat.backends import forced_backend, kernels

__all__ = ["fake_quantize", "fake_quantize_dynamic"]

#: Plans kept for each spec before they are forgotten: bounds the memory that changing shapes take.
_PLANS = 256


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    spec: QuantSpec,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize and dequantize x on the integer grid of `spec`, in one pass forward and one backward.

    Formula, with ``s = max(scale, spec.eps)``, ``z`` the zero-point (0 without one) and the default conventions::

        y = (clamp(round(x / s) + z, qmin, qmax) - z) * s

    Ties round to the even neighbour; :class:`QuantSpec` states the other conventions. Arithmetic runs in fp32 (fp64
    for fp64 x) and is rounded once to the storage type; all backends give the same bits.

    Gradients (straight-through, mask m of elements on the grid, residual frozen, ``f = spec.grad_scale``'s factor)::

        dL/dx = m dL/dy
        dL/ds = f sum(dL/dy ((q - z) - m x/s))          estimator="lsq"; "ste" takes s and z as constants
        dL/dz = -f s sum(dL/dy (1 - m))

    Double backward, forward mode, ``torch.func`` and ``vmap`` follow the same frozen form, which is linear in each of
    x, s and z.

    Args:
        x: any shape and dense layout (strided input costs one copy); float32, bfloat16, float16 or float64.
        scale: ``[]`` (axis and group None), ``[C]`` (axis) or ``[..., K/group]`` (group), in float32 (float64 for
            float64 x) or the dtype of x.
        zero_point: None, or like scale, in units of codes; needs ``spec.symmetric=False``.
        spec: the quantizer.
        dtype: storage type of the result, to cast an fp32 x to bfloat16 or float16 in the same pass.

    Returns:
        y with the shape of x and the strides of ``torch.empty_like(x)`` (contiguous with groups).

    Raises:
        TypeError, ValueError: an argument does not fit, in one line that names it, what was wanted and what came.

    Source: Jacob et al., CVPR 2018 (affine grid); Esser et al., ICLR 2020, eq. 1-5 (LSQ); Bhalgat et al., 2020 (LSQ+).
    """
    plan = _plan("fake_quantize", x, scale, zero_point, spec, dtype)
    compute = compute_dtype(x.dtype)
    if scale.dtype is not compute:
        scale = scale.to(compute)
    if zero_point is not None and zero_point.dtype is not compute:
        zero_point = zero_point.to(compute)
    if _checks.VALUES_WANTED:
        _checks.scale_values("fake_quantize", scale)
    return rule.fake_quantize(x, scale, zero_point, plan)


def fake_quantize_dynamic(x: Tensor, *, spec: QuantSpec, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Quantize x with a scale taken from x itself, fused: ``scale = max|x| / max(qmax, 1)`` over each scale's elements.

    The maximum is exact, so y and scale have the same bits on every backend. The scale counts as a constant in every
    derivative (``dL/dx = m dL/dy``). NaN in the data makes its scale NaN.

    Args:
        x: as in :func:`fake_quantize`.
        spec: the quantizer; ``symmetric=True``, ``estimator="ste"``.
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
    if dtype is not None:
        _checks.stored_as(op, x, dtype)
    return rule.fake_quantize_absmax(x, rule.Plan(_grid(spec, x), 1.0, False, dtype, _kernels_for(x)))


def _grid(spec: QuantSpec, x: Tensor) -> tuple[int, int, int, int, float, int]:
    return (spec.qmin, spec.qmax, _checks.axis_of(spec, x.dim()), spec.group or 0, spec.eps, spec.rules)


def _kernels_for(x: Tensor):
    """The callables of the backend in force; a compiled graph holds the dispatcher's ops instead."""
    return None if torch.compiler.is_compiling() else kernels(x.device.type)


def _plan(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype | None
) -> rule.Plan:
    """The checked, cached description of a call; a second call with the same metadata costs one look-up."""
    if torch.compiler.is_compiling():
        return _checked_plan(op, x, scale, zero_point, spec, dtype)
    try:
        offset = None if zero_point is None else (zero_point.shape, zero_point.dtype, zero_point.device)
        trained = scale.requires_grad or (zero_point is not None and zero_point.requires_grad)
        data = (x.shape, x.dtype, x.device, x.layout)
        key = (data, scale.shape, scale.dtype, scale.device, offset, dtype, trained, forced_backend())
        plan = spec._plans.get(key)
    except AttributeError:  # not even tensors or a spec: the checks say which
        return _checked_plan(op, x, scale, zero_point, spec, dtype)
    if plan is None:
        plan = _checked_plan(op, x, scale, zero_point, spec, dtype)
        if len(spec._plans) >= _PLANS:
            spec._plans.clear()
        spec._plans[key] = plan
    return plan


def _checked_plan(
    op: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype | None
) -> rule.Plan:
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
    return rule.Plan(_grid(spec, x), factor, spec.estimator == "lsq", dtype, _kernels_for(x))
