# SPDX-License-Identifier: Apache-2.0
"""Calls of the raw ops that the audit compiles and measures: one module a family, under the family's name.

A module has two functions, generators both:

* ``compiled(op, place, shape, axis, group, dtype)`` gives argument tuples of `op` on one place of
  :data:`fastflat.audit._triton.PLACES`: few enough to compile in CI, enough to meet every Triton kernel;
* ``measured(op, place, x, axis, group)`` gives pairs (arguments, streams) on one place of
  :data:`fastflat.audit._traffic.PLACES`: the least traffic is `streams` times the bytes of x.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fastflat._ops import Op


def of(op: Op) -> ModuleType:
    """The module with the calls of an op's family."""
    return importlib.import_module(f"{__name__}.{op.family}")
