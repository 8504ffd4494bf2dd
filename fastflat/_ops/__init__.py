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

import itertools
from collections.abc import Callable

import torch

from fastflat._ops import (
    binarize,
    bitplane,
    compressors,
    descent,
    fake_quantize,
    fake_quantize_list,
    general_quantize,
    identity,
    inputs,
    liq,
    logits,
    mixquant,
    row_tangents,
    sharpness,
    tangents,
    vectors,
    weight_norms,
)
from fastflat._ops._row import Op, compute_dtype, scale_shape

NAMESPACE = "fastflat"

#: Modules with the rows of a family each, under the family's name.
FAMILIES = (
    *(identity, fake_quantize, fake_quantize_list, general_quantize, mixquant, binarize, liq, bitplane),
    *(sharpness, descent, vectors, tangents, row_tangents, logits, inputs, weight_norms),
    compressors,
)

OPS: dict[str, Op] = {op.name: op for family in FAMILIES for op in family.ROWS}

__all__ = [
    "FAMILIES",
    "NAMESPACE",
    "OPS",
    "Op",
    "callable_of",
    "compute_dtype",
    "has_kernel",
    "implement",
    "overload",
    "scale_shape",
]

_library = torch.library.Library(NAMESPACE, "DEF")


def overload(name: str) -> torch._ops.OpOverload:
    """The dispatcher's entry of a raw op."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def callable_of(name: str) -> Callable:
    """The same without the Python wrapper around the dispatcher, which costs a microsecond a call."""
    return overload(name)._op


def has_kernel(name: str, device: str) -> bool:
    """Whether a compiled library has registered a kernel of a raw op for tensors of `device`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device.upper())


def implement(name: str, kernel: Callable, key: str) -> None:
    """Register a Python kernel of a raw op for a dispatch key."""
    _library.impl(name, kernel, key)


def _guard(name: str) -> Callable:
    """Kernel of the Autograd keys: a raw op that would lose a derivative raises instead."""
    op = overload(name)

    def kernel(*args):
        for value in itertools.chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in args):
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
