# SPDX-License-Identifier: Apache-2.0
"""Random state and device scalars of noisy calls."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastflat import _checks
from fastflat._ops import compute_dtype

_WHOLE = (-(2**63), 2**63 - 1)


def draw_state(device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """A new int64[2] state, seed and offset of Philox4x32-10, drawn on `device` from its generator without a
    synchronisation. Passing the same state to two calls gives both the same draws."""
    return torch.randint(*_WHOLE, (2,), dtype=torch.int64, device=device, generator=generator)


def state_for(op: str, x: Tensor, state: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The state given, checked, or a new one."""
    if state is None:
        if generator is not None and generator.device.type != x.device.type:
            _checks.fail(op, "generator", f"be on the device of x ({x.device})", generator.device)
        return draw_state(x.device, generator)
    if generator is not None:
        _checks.fail(op, "generator", "be None when state is given", "both")
    if not isinstance(state, Tensor):
        _checks.fail(op, "state", "be a tensor", type(state))
    if state.dtype != torch.int64 or tuple(state.shape) != (2,):
        _checks.fail(op, "state", "be int64 of shape [2]", f"{state.dtype} of shape {list(state.shape)}")
    if state.device != x.device:
        _checks.fail(op, "state", f"be on the device of x ({x.device})", state.device)
    return state.contiguous()


def scalar(op: str, name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A number or 0-dim tensor as a device scalar of the compute type of x."""
    dtype = compute_dtype(x.dtype)
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point():
            _checks.fail(
                op, name, "be a number or a 0-dim floating tensor", f"shape {list(value.shape)}, {value.dtype}"
            )
        if value.device != x.device:
            _checks.fail(op, name, f"be on the device of x ({x.device})", value.device)
        return value if value.dtype == dtype else value.to(dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _checks.fail(op, name, "be a number or a 0-dim tensor", type(value))
    if torch.compiler.is_compiling():
        return torch.full((), float(value), dtype=dtype, device=x.device)
    return _constant(float(value), dtype, str(x.device))


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, device: str) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)
