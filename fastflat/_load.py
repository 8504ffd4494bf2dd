# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled libraries, and remembers why one is missing."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib

import torch

from fastflat import _ops  # noqa: F401  (the schemas must exist before a library registers kernels)

_HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Library:
    """State of one compiled library."""

    name: str
    loaded: bool
    path: str | None
    reason: str
    remedy: str


@functools.lru_cache(maxsize=None)
def status() -> dict[str, Library]:
    """The compiled libraries by name (``cpu``, ``cuda``), loaded on the first call."""
    return {name: _load(name) for name in ("cpu", "cuda")}


def _load(name: str) -> Library:
    path = _HERE / f"libfastflat_{name}.so"
    remedy = "rebuild with: pip install --no-build-isolation ."
    if name in os.environ.get("FASTFLAT_DISABLE_LIBRARIES", "").split(","):
        return Library(name, False, None, "disabled by FASTFLAT_DISABLE_LIBRARIES", "unset it")
    if not path.exists():
        return Library(name, False, None, f"the {name} library was not built", remedy)
    if name == "cuda" and torch.version.cuda is None:
        return Library(name, False, str(path), "this torch has no CUDA", "install a CUDA build of torch")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(name, False, str(path), str(error).splitlines()[0], remedy)
    return Library(name, True, str(path), "loaded", "")
