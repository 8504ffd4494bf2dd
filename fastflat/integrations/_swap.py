# SPDX-License-Identifier: Apache-2.0
"""Gives a module another forward and takes it away again.

The module itself stays: its class is replaced by a subclass of it, so parameters, buffers, hooks, names in the
``state_dict``, references from elsewhere and ``isinstance`` are untouched.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastflat.integrations._adapter import Adapter


@functools.cache
def accelerated(base: type, adapter: Adapter) -> type:
    """The subclass of a module's class with the adapter's forward."""

    # No class beside the base: an instance could not change to a class of another layout.
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return adapter.forward(self, *args, **kwargs)

    own = {
        "forward": forward,
        "__reduce_ex__": _reduce,
        "_fastflat_adapter": adapter,
        "_fastflat_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), own)


def _reduce(module: nn.Module, protocol: Any) -> tuple:
    base = module._fastflat_base
    return _made, (base, module._fastflat_adapter), base.__reduce_ex__(module, protocol)[2]


def _made(base: type, adapter: Adapter) -> nn.Module:
    return base.__new__(accelerated(base, adapter))


def swap(module: nn.Module, adapter: Adapter) -> None:
    module.__class__ = accelerated(type(module), adapter)


def swapped_by(module: nn.Module) -> Adapter | None:
    """The adapter that computes a module, if one does."""
    return getattr(type(module), "_fastflat_adapter", None)


def swap_back(module: nn.Module) -> bool:
    """Whether it had been swapped."""
    if swapped_by(module) is None:
        return False
    module.__class__ = module._fastflat_base
    return True
