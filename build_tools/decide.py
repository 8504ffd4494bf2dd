# SPDX-License-Identifier: Apache-2.0
"""Which compiled libraries to build, and one sentence of reason each: a pure function of what was found.

Wishes come from two environment variables. ``FASTFLAT_BUILD``: ``0`` builds nothing, ``1`` fails instead of skipping.
``FASTFLAT_CUDA``: ``0`` leaves the CUDA library out, ``1`` builds it (against a CPU-only torch too) or fails.
An explicit wish is never ignored; without one, what is missing is skipped with its reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

#: The oldest torch whose stable ABI has every symbol the libraries use; flags.py compiles for it.
TORCH_FLOOR = (2, 10)
#: The oldest CUDA toolkit that compiles C++20.
NVCC_FLOOR = (12, 0)

_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


class BuildError(Exception):
    """An explicit wish that cannot be met, or two that exclude each other."""


@dataclasses.dataclass(frozen=True)
class Torch:
    """The torch to build against: its version and the CUDA version it was built with (None: CPU-only)."""

    version: str
    cuda: str | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What the machine has. ``compiler`` and ``nvcc`` are version strings; None means not found."""

    platform: str
    torch: Torch | None
    compiler: str | None
    nvcc: str | None


@dataclasses.dataclass(frozen=True)
class Library:
    """One decision.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``.
        build: whether to build it.
        reason: why, in one clause.
        mend: the command that would have it built; empty when it is built.
        asked: whether the user asked for it, so that a failed compilation stops the build.
    """

    name: str
    build: bool
    reason: str
    mend: str = ""
    asked: bool = False

    def __str__(self) -> str:
        verb = "building" if self.build else "skipping"
        tail = f"; to have it: {self.mend}" if self.mend else ""
        return f"fastflat: {verb} the {self.name} library: {self.reason}{tail}"


def decide(env: Mapping[str, str], found: Found) -> tuple[Library, Library]:
    """The CPU and the CUDA library, each built or skipped with a reason; raises BuildError on a wish that cannot be."""
    wish, cuda_wish = _switch(env, "FASTFLAT_BUILD"), _switch(env, "FASTFLAT_CUDA")
    if wish == "0" and cuda_wish == "1":
        raise BuildError("FASTFLAT_CUDA=1 and FASTFLAT_BUILD=0 exclude each other: unset one of them")
    missing = _missing(wish, found)
    if missing is not None:
        reason, mend = missing
        for name, value in (("FASTFLAT_BUILD", wish), ("FASTFLAT_CUDA", cuda_wish)):
            if value == "1":
                raise BuildError(f"{name}=1, but {reason}; to mend it: {mend}")
        return Library("cpu", False, reason, mend), Library("cuda", False, reason, mend)
    built_with = f"torch {found.torch.version}, {found.compiler}"
    cpu = Library("cpu", True, built_with, asked=wish == "1" or cuda_wish == "1")
    return cpu, _cuda(cuda_wish, found)


def _cuda(wish: str | None, found: Found) -> Library:
    if wish == "0":
        return Library("cuda", False, "FASTFLAT_CUDA=0", f"unset FASTFLAT_CUDA; {_REBUILD}")
    asked = wish == "1"
    toolkit, torch_cuda = found.nvcc, found.torch.cuda
    obstacle = None
    if toolkit is None:
        obstacle = "no nvcc on PATH or under CUDA_HOME", f"CUDA_HOME=<toolkit> {_REBUILD}"
    elif _version(toolkit) < NVCC_FLOOR:
        floor = _text(NVCC_FLOOR)
        obstacle = (
            f"nvcc {toolkit} is older than {floor} and has no C++20",
            f"CUDA_HOME=<newer toolkit> {_REBUILD}",
        )
    elif torch_cuda is not None and _version(torch_cuda)[0] != _version(toolkit)[0]:
        obstacle = (
            f"nvcc is {toolkit} and torch was built with CUDA {torch_cuda}: the major versions differ",
            f"CUDA_HOME=<toolkit {_version(torch_cuda)[0]}.x> {_REBUILD}",
        )
    if obstacle is not None:
        if asked:
            raise BuildError(f"FASTFLAT_CUDA=1, but {obstacle[0]}; to mend it: {obstacle[1]}")
        return Library("cuda", False, *obstacle)
    if torch_cuda is None:
        if not asked:
            return Library("cuda", False, f"torch {found.torch.version} is a CPU build", f"FASTFLAT_CUDA=1 {_REBUILD}")
        return Library("cuda", True, f"FASTFLAT_CUDA=1: nvcc {toolkit} against a CPU-only torch", asked=True)
    return Library("cuda", True, f"nvcc {toolkit}, torch built with CUDA {torch_cuda}", asked=asked)


def _missing(wish: str | None, found: Found) -> tuple[str, str] | None:
    """What keeps every library from being built: (reason, command that mends it)."""
    if wish == "0":
        return "FASTFLAT_BUILD=0", f"unset FASTFLAT_BUILD; {_REBUILD}"
    if not found.platform.startswith("linux"):
        return f"compiled kernels are built on Linux only, this is {found.platform}", "use the reference backend"
    if found.torch is None:
        return "no torch in the build environment", f"pip install torch setuptools wheel; {_REBUILD}"
    if _version(found.torch.version) < TORCH_FLOOR:
        floor = _text(TORCH_FLOOR)
        return f"torch {found.torch.version} is older than {floor}", f"pip install 'torch>={floor}'; {_REBUILD}"
    if found.compiler is None:
        return "no C++ compiler (CXX, g++, c++ or clang++)", f"install g++, or set CXX; {_REBUILD}"
    return None


def _switch(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name} must be 0, 1 or unset, got {value!r}")
    return value or None


def _version(text: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)(?:\.(\d+))?", text).groups()
    return int(major), int(minor or 0)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
