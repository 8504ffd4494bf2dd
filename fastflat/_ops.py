# SPDX-License-Identifier: Apache-2.0
"""The op table: every raw operator of the ``fastflat`` namespace with its schema, fake kernel, traffic and formula.

A raw op carries no derivative (``fastflat.autograd`` does) and no checks beyond what keeps memory safe
(``fastflat._checks`` has them): call ``fastflat.functional``. Conventions shared by all rows:

* ``scale`` and ``zero_point`` are in the compute type (fp32; fp64 for fp64 data) and shaped ``[]`` (axis -1, group 0),
  ``[C]`` (axis >= 0) or ``[..., K/group]`` (group > 0, blocks along the last axis);
* ``rules`` is the bit set of :data:`fastflat._spec.RULES`; ``qmin``, ``qmax``, ``eps`` are those of the QuantSpec;
* elementwise outputs have the strides of ``torch.empty_like(x)``; with ``group`` they are contiguous;
* ``dtype`` is the storage type of the result (default: that of x): a cast in the same pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

NAMESPACE = "fastflat"


@dataclasses.dataclass(frozen=True)
class Op:
    """One raw operator.

    Attributes:
        name: operator name inside the namespace.
        family: file stem in csrc/cpu, csrc/cuda, triton_kernels, tests/ops and benchmarks/cases.
        schema: arguments and results in the dispatcher's language.
        fake: shape, dtype and stride inference.
        bytes_moved: least DRAM traffic of a call, from the same arguments.
        doc: formula, tie rule, errors.
    """

    name: str
    family: str
    schema: str
    fake: Callable
    bytes_moved: Callable[..., int]
    doc: str


def _like(x: torch.Tensor, group: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    layout = torch.contiguous_format if group else torch.preserve_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def scale_shape(shape: torch.Size, axis: int, group: int) -> tuple[int, ...]:
    """Shape of the scale tensor of data of `shape`: ``[]``, ``[C]`` or ``[..., K/group]``."""
    if group:
        return (*shape[:-1], shape[-1] // group)
    return () if axis < 0 else (shape[axis],)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the arithmetic, the scale and the zero-point for data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_identity(x):
    return torch.empty_like(x)


def _fake_fake_quantize(x, scale, zero_point, qmin, qmax, axis, group, eps, rules, dtype=None):
    return _like(x, group, dtype)


def _fake_fake_quantize_bwd(gy, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor, need_scale):
    gs = torch.empty_like(scale, memory_format=torch.contiguous_format) if need_scale else scale.new_empty(0)
    gz = torch.empty_like(gs) if need_scale and zero_point is not None else scale.new_empty(0)
    return _like(x, group), gs, gz


def _fake_fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, qmin, qmax, axis, group, eps, rules, factor, dtype=None):
    return _like(x, group, dtype)


def _fake_fake_quantize_absmax(x, qmin, qmax, axis, group, eps, rules, dtype=None):
    scale = x.new_empty(scale_shape(x.shape, axis, group), dtype=compute_dtype(x.dtype))
    return _like(x, group, dtype), scale


def _size(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _out_size(x: torch.Tensor, dtype: torch.dtype | None) -> int:
    return x.numel() * (dtype or x.dtype).itemsize


_GRID = "int qmin, int qmax, int axis, int group, float eps, int rules"

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "identity",
            "identity",
            "(Tensor x) -> Tensor",
            _fake_identity,
            lambda x: 2 * _size(x),
            """``y = x``, bit for bit. Does nothing on purpose: the template for a new op (CONTRIBUTING.md) and the
            floor that benchmarks compare with.""",
        ),
        Op(
            "fake_quantize",
            "fake_quantize",
            f"(Tensor x, Tensor scale, Tensor? zero_point, {_GRID}, ScalarType? dtype=None) -> Tensor",
            _fake_fake_quantize,
            lambda x, scale, zero_point, *grid, dtype=None: _size(x, scale, zero_point) + _out_size(x, dtype),
            """``y = (clamp(round(x/s) + z, qmin, qmax) - z) s`` with ``s = max(scale, eps)``; ties to even; the order
            of rounding and zero-point, division or reciprocal, NaN, overflow and -0 by ``rules``. A map: the same
            bits on every backend.""",
        ),
        Op(
            "fake_quantize_bwd",
            "fake_quantize",
            f"(Tensor gy, Tensor x, Tensor scale, Tensor? zero_point, {_GRID}, float factor, bool need_scale)"
            " -> (Tensor gx, Tensor gs, Tensor gz)",
            _fake_fake_quantize_bwd,
            lambda gy, x, scale, zero_point, *grid: _size(gy, x, x, scale, zero_point),
            """One pass for all gradients, with the mask m and the residual frozen::

                gx = m gy                                  x's dtype, the same bits on every backend
                gs = factor sum(gy ((q - z) - m u))        over the elements of a scale, compute type
                gz = -factor s sum(gy (1 - m))

            Sums run in an order that depends on shape and dtype only. Without ``need_scale`` gs and gz are empty
            ``[0]``; without a zero-point gz is.""",
        ),
        Op(
            "fake_quantize_jvp",
            "fake_quantize",
            f"(Tensor? tx, Tensor? ts, Tensor? tz, Tensor x, Tensor scale, Tensor? zero_point, {_GRID}, float factor,"
            " ScalarType? dtype=None) -> Tensor",
            _fake_fake_quantize_jvp,
            lambda tx, ts, tz, x, scale, zero_point, *grid, dtype=None: (
                _size(tx, ts, tz, x, scale, zero_point) + _out_size(x, dtype)
            ),
            """The tangent of y, the exact transpose of ``fake_quantize_bwd``::

                ty = m tx + ((q - z) - m u) (factor ts) - (1 - m) s (factor tz)

            Absent tangents count as 0. ``tx`` is in the storage type of x or of the result. A map: the same bits on
            every backend.""",
        ),
        Op(
            "fake_quantize_absmax",
            "fake_quantize",
            f"(Tensor x, {_GRID}, ScalarType? dtype=None) -> (Tensor y, Tensor scale)",
            _fake_fake_quantize_absmax,
            lambda x, *grid, dtype=None: _size(x) + _out_size(x, dtype),
            """Dynamic scale and quantization together: ``scale = max|x| / max(qmax, 1)`` over the elements of a
            scale, then :func:`fake_quantize` without zero-point. The maximum is exact, so y and scale have the same
            bits on every backend. NaN in the data makes its scale NaN; no data gives scale 0.""",
        ),
    )
}

_library = torch.library.Library(NAMESPACE, "DEF")


def overload(name: str) -> torch._ops.OpOverload:
    """The dispatcher's entry of a raw op."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def callable_of(name: str) -> Callable:
    """The same without the Python wrapper around the dispatcher, which costs a microsecond a call."""
    return overload(name)._op


def implement(name: str, kernel: Callable, key: str) -> None:
    """Register a Python kernel of a raw op for a dispatch key."""
    _library.impl(name, kernel, key)


def _guard(name: str) -> Callable:
    """Kernel of the Autograd keys: a raw op that would lose a derivative raises instead."""
    op = overload(name)

    def kernel(*args):
        for value in args:
            if isinstance(value, torch.Tensor) and (
                (value.requires_grad and torch.is_grad_enabled()) or _has_tangent(value)
            ):
                raise NotImplementedError(
                    f"{NAMESPACE}::{name}: a raw op has no derivative, got a tensor that needs one;"
                    " call fastflat.functional instead"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _has_tangent(value: torch.Tensor) -> bool:
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def _define() -> None:
    for op in OPS.values():
        _library.define(op.name + op.schema)
        torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_library)
        implement(op.name, _guard(op.name), "Autograd")


_define()
