# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, and remembers why one is missing. Never fails for want of one.

``FASTFLAT_DISABLE_LIBRARIES=cpu,cuda`` pretends that the named libraries are absent.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastflat import _ops  # noqa: F401  (a library implements schemas that must be there when it loads)

LIBRARIES = ("cpu", "cuda")

_HERE = Path(__file__).parent
_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


@dataclasses.dataclass(frozen=True)
class Library:
    """State of one compiled library.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``.
        loaded: whether its kernels are registered.
        path: the file, None when there is none.
        reason: why it is not loaded, or ``"loaded"``.
        remedy: the command that mends it; empty when loaded.
    """

    name: str
    loaded: bool
    path: str | None
    reason: str
    remedy: str


@functools.cache
def status() -> dict[str, Library]:
    """The compiled libraries by name, loaded on the first call."""
    disabled = [name.strip() for name in os.environ.get("FASTFLAT_DISABLE_LIBRARIES", "").split(",") if name.strip()]
    unknown = sorted(set(disabled) - set(LIBRARIES))
    if unknown:
        raise ValueError(f"FASTFLAT_DISABLE_LIBRARIES must name {' or '.join(LIBRARIES)}, got {', '.join(unknown)}")
    return {name: _load(name, name in disabled) for name in LIBRARIES}


@functools.cache
def build_info() -> dict[str, Any]:
    """What the build wrote down: torch target, compilers, GPU architectures, flags, and a reason for each library.
    Empty in a tree that was never built."""
    path = _HERE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def cpu_isa() -> str | None:
    """The instruction set whose loops the CPU library runs in this process; None without the library."""
    library = status()["cpu"]
    if not library.loaded:
        return None
    query = ctypes.CDLL(library.path).fastflat_cpu_isa
    query.restype = ctypes.c_char_p
    return query().decode()


def has_code_for(capability: tuple[int, int]) -> bool:
    """Whether the CUDA library can run on a GPU of this compute capability.

    Machine code runs on its own major version from its own minor version up (on that GPU alone with an ``a``, on its
    family with an ``f``); PTX on everything newer.
    """
    for arch in build_info().get("arches", ()):
        major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch).groups()
        built = (int(major), int(minor))
        if capability == built or (suffix != "a" and capability[0] == built[0] and capability[1] > built[1]):
            return True
        if ptx and not suffix and capability > built:
            return True
    return False


def _load(name: str, disabled: bool) -> Library:
    path = _HERE / f"libfastflat_{name}.so"
    if disabled:
        return Library(name, False, None, "disabled by FASTFLAT_DISABLE_LIBRARIES", "unset FASTFLAT_DISABLE_LIBRARIES")
    if not path.is_file():
        decision = build_info().get("libraries", {}).get(name, {})
        reason = f"not built: {decision['reason']}" if decision else f"the {name} library was not built"
        return Library(name, False, None, reason, decision.get("mend") or _REBUILD)
    if name == "cuda" and torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
        return Library(name, False, str(path), reason, "install a torch built with CUDA")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"does not load under torch {torch.__version__}: {str(error.__cause__ or error).splitlines()[0]}"
        return Library(name, False, str(path), reason, f"{_needed_torch()}{_REBUILD}")
    return Library(name, True, str(path), "loaded", "")


def _needed_torch() -> str:
    """``pip install`` of a new enough torch, where the one in use is older than the build's target."""
    target = build_info().get("torch_target")
    running = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if target is None or running >= tuple(int(part) for part in target.split(".")):
        return ""
    return f"pip install 'torch>={target}'; "
