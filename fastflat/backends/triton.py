# SPDX-License-Identifier: Apache-2.0
"""The raw ops through ``fastflat.triton_kernels``, imported at the first call only."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

from fastflat import _ops


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: str) -> str | None:
    """Why Triton cannot compute on tensors of `device`, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if importlib.util.find_spec("fastflat.triton_kernels") is None:
        return "fastflat.triton_kernels is not installed; pip install --no-build-isolation -e ."
    if device == "cpu" and not interpreting():
        return "Triton computes on CPU tensors only in its interpreter; set TRITON_INTERPRET=1 before import"
    if device not in ("cpu", "cuda"):
        return f"no Triton kernels for {device} tensors"
    return None


@functools.cache
def _launcher(name: str) -> Callable:
    return getattr(importlib.import_module(f"fastflat.triton_kernels.{_ops.OPS[name].family}"), name)


def __getattr__(name: str) -> Callable:
    if name not in _ops.OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda *args: _launcher(name)(*args)
