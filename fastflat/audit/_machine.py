# SPDX-License-Identifier: Apache-2.0
"""Facts of machine code: registers, stack and shared memory of each kernel in a cubin."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

_USAGE = re.compile(r"Function ([\w$.]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Per thread: ``registers``, and ``local`` bytes of stack, where spilled registers go. Per block: ``shared``."""

    registers: int
    local: int
    shared: int


def cuobjdump() -> str | None:
    """NVIDIA's reader of machine code: that of a CUDA toolkit, or the one inside the Triton package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return None
    inside = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin", "cuobjdump")
    return str(inside) if inside.exists() else None


def usage(cubin: Path) -> dict[str, Usage]:
    """Resources by kernel name."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("fastflat audit: no cuobjdump; pip install triton, or add a CUDA toolkit to PATH")
    done = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fastflat audit: cuobjdump cannot read {cubin.name}: {done.stderr.strip()}")
    found = {}
    for name, registers, stack, shared, local in _USAGE.findall(done.stdout):
        found[name] = Usage(int(registers), int(stack) + int(local), int(shared))
    return found
