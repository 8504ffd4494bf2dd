# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions: once, above the backends, on metadata only.

Values are checked by :func:`scale_values`, at prepare, calibrate and load, and at every call under FASTFLAT_CHECK=1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import QuantSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STORED_AS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
    torch.float64: (torch.float64,),
}


#: Whether FASTFLAT_CHECK=1 asked, at import, for value checks at every call (they synchronise with the device).
VALUES_WANTED = os.environ.get("FASTFLAT_CHECK") == "1"


def fail(op: str, argument: str, want: str, got: object, hint: str = "") -> None:
    """Raise the one-line error of the house: op, argument, want, got, and how to mend it."""
    kind = TypeError if isinstance(got, type) else ValueError
    got = got.__name__ if isinstance(got, type) else got
    raise kind(f"fastflat::{op}: {argument} must {want}, got {got}{hint}")


def first_line(error: BaseException, most: int = 160) -> str:
    """What an error of another library says, as part of one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def data(op: str, x: object, spec: object, name: str = "x") -> None:
    """x is a dense floating tensor that the spec's axis or group fits."""
    if not isinstance(x, Tensor):
        fail(op, name, "be a tensor", type(x))
    if not isinstance(spec, QuantSpec):
        fail(op, "spec", "be a QuantSpec", type(spec))
    if x.layout is not torch.strided:
        fail(op, name, "be a dense tensor", x.layout)
    if x.dtype not in FLOATS:
        fail(op, name, "be float32, bfloat16, float16 or float64", x.dtype)
    if spec.axis is not None and not -x.dim() <= spec.axis < x.dim():
        fail(op, "spec.axis", f"lie in [{-x.dim()}, {x.dim() - 1}] for {name} of shape {list(x.shape)}", spec.axis)
    if spec.group is not None:
        if x.dim() == 0:
            fail(op, name, "have at least one axis when spec.group is given", "a scalar")
        if x.shape[-1] % spec.group:
            fail(op, "spec.group", f"divide the last axis of {name} ({x.shape[-1]})", spec.group)


def parameter(op: str, name: str, p: object, x: Tensor, spec: QuantSpec) -> None:
    """A scale or zero-point has the device, dtype and shape that x and the spec ask for."""
    if not isinstance(p, Tensor):
        fail(op, name, "be a tensor", type(p), f"; write torch.tensor({p})" if isinstance(p, (int, float)) else "")
    if p.device != x.device:
        fail(op, name, f"be on the device of x ({x.device})", p.device)
    wanted = compute_dtype(x.dtype)
    if p.dtype != wanted and not (p.dtype == x.dtype and p.is_floating_point()):
        fail(op, name, f"be {wanted}" + ("" if x.dtype == wanted else f" or {x.dtype}"), p.dtype)
    want = scale_shape(x.shape, axis_of(spec, x.dim()), spec.group or 0)
    if tuple(p.shape) != want:
        if spec.axis is not None:
            text = f"have shape [C={want[0]}]"
        else:
            meaning = f"groups of {spec.group}" if spec.group else "one for the tensor"
            text = f"have shape {list(want)} ({meaning})"
        fail(op, name, text, list(p.shape))


def stored_as(op: str, x: Tensor, dtype: object) -> None:
    """dtype is a storage type that a result for x can be cast to in the same pass."""
    if dtype not in _STORED_AS[x.dtype]:
        names = ", ".join(map(str, _STORED_AS[x.dtype]))
        fail(op, "dtype", f"be one of {names} for {x.dtype} x", dtype)


def scale_values(op: str, scale: Tensor, name: str = "scale") -> None:
    """Every scale is finite and positive. Synchronises with the device."""
    bad = ~(torch.isfinite(scale.detach()) & (scale.detach() > 0))
    if bool(bad.any()):
        value = scale.detach()[bad].flatten()[0].item()
        fail(op, name, "be finite and positive", value, f" ({int(bad.sum())} of {scale.numel()}); calibrate first")


def axis_of(spec: QuantSpec, dim: int) -> int:
    """The axis that the raw ops take: non-negative, -1 for none."""
    return -1 if spec.axis is None else spec.axis % max(dim, 1)


def dense_data(op: str, name: str, x: object, axis: object, group: object = None) -> tuple[int, int]:
    """x is a dense floating tensor that axis or group fits; returns them as the raw ops take them."""
    if not isinstance(x, Tensor):
        fail(op, name, "be a tensor", type(x))
    if x.layout is not torch.strided:
        fail(op, name, "be a dense tensor", x.layout)
    if x.dtype not in FLOATS:
        fail(op, name, "be float32, bfloat16, float16 or float64", x.dtype)
    for argument, value in (("axis", axis), ("group", group)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            fail(op, argument, "be an int or None", type(value))
    if axis is not None and group is not None:
        fail(op, "group", "be None when axis is given", group)
    if axis is not None and not -x.dim() <= axis < x.dim():
        want = f"lie in [{-x.dim()}, {x.dim() - 1}]" if x.dim() else "be None"
        fail(op, "axis", f"{want} for {name} of shape {list(x.shape)}", axis)
    if group is not None and (x.dim() == 0 or group < 1 or x.shape[-1] % group):
        fail(op, "group", f"divide the last axis of {name}, of shape {list(x.shape)}", group)
    return -1 if axis is None else axis % x.dim(), group or 0
