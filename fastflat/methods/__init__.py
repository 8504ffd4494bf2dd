# SPDX-License-Identifier: Apache-2.0
"""Published methods over the kernel families: one file for each paper, and bit allocation.

A file's classes and functions are here too (``fastflat.methods.NAME``), imported on first use.
"""

from fastflat.methods._contract import Arm, Check, Claim, Experiment, Figure, Method, Settings
from fastflat.methods._hook import Hook
from fastflat.methods._registry import get, methods, names
from fastflat.methods.bit_allocation import Allocation, allocate_bits, rounded, rounding_errors, sensitivities

__all__ = [
    "Allocation",
    "Arm",
    "Check",
    "Claim",
    "Experiment",
    "Figure",
    "Hook",
    "Method",
    "Settings",
    "allocate_bits",
    "get",
    "methods",
    "names",
    "rounded",
    "rounding_errors",
    "sensitivities",
]


def __getattr__(name: str):
    from fastflat.methods import _registry

    found = None if name.startswith("_") else _registry.owner(name)
    if found is None:
        raise AttributeError(f"module 'fastflat.methods' has no attribute {name!r}")
    return getattr(_registry.module(found), name)


def __dir__() -> list[str]:
    from fastflat.methods import _registry

    return sorted({*__all__, *_registry.public(), *_registry.names()})
