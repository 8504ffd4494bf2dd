# SPDX-License-Identifier: Apache-2.0
"""CUDA compilers for wheels: a local toolkit of the wanted version, else the packages of it from the package index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from build_tools import find
from build_tools.decide import BuildError

#: What compiles and links: compiler driver, its headers, the optimiser, the runtime, the C++ headers.
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
#: The first CUDA whose compiler is packaged whole.
PACKAGED_FROM = 13

Install = Callable[[list[str], Path], str]


def version(text: str) -> str:
    """``MAJOR.MINOR``; raises BuildError on anything else."""
    if not re.fullmatch(r"\d{2}\.\d", text):
        raise BuildError(f"CUDA must be MAJOR.MINOR, as in 13.0, got {text!r}")
    return text


def nvcc(wanted: str, env: Mapping[str, str], folder: Path, install: Install | None = None) -> str:
    """The nvcc of CUDA `wanted`: under ``CUDA_HOME``, on ``PATH``, or installed under `folder`.

    Args:
        wanted: ``MAJOR.MINOR``.
        env: ``CUDA_HOME`` names a toolkit that must be the one.
        folder: where toolkits from the index are kept.
        install: puts requirements into a folder and returns what went wrong, empty for success; pip by itself.

    Raises:
        BuildError: no toolkit of this version can be had.
    """
    found = find.tools(env)
    if env.get("CUDA_HOME"):
        if found.found.nvcc != wanted:
            raise BuildError(f"CUDA_HOME must be a toolkit of CUDA {wanted}, got {found.found.nvcc or 'none'}")
        return found.nvcc[-1]
    if found.found.nvcc == wanted:
        return found.nvcc[-1]
    kept = folder / f"cuda-{wanted}"
    if not kept.is_dir():
        _fetch(wanted, kept, install or _pip)
    return str(next(kept.glob("nvidia/cu*/bin/nvcc")))


def _fetch(wanted: str, kept: Path, install: Install) -> None:
    """Into a folder aside, which gets its name when all is there."""
    mend = f"CUDA_HOME=<toolkit {wanted}> make wheel CUDA={wanted}"
    if int(wanted.split(".")[0]) < PACKAGED_FROM:
        raise BuildError(f"no nvcc {wanted} here, and before CUDA {PACKAGED_FROM} none is packaged; run: {mend}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".cuda-", dir=kept.parent))
    try:
        said = install([f"{name}=={wanted}.*" for name in PACKAGES], aside)
        homes = list(aside.glob("nvidia/cu*"))
        if said or not homes or not (homes[0] / "bin" / "nvcc").is_file():
            raise BuildError(f"CUDA {wanted} is not on the package index ({said or 'no nvcc in it'}); run: {mend}")
        # the packages have lib, nvcc looks into lib64
        if not (homes[0] / "lib64").exists():
            (homes[0] / "lib64").symlink_to("lib")
        aside.chmod(0o755)
        aside.rename(kept)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _pip(requirements: list[str], target: Path) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(target), *requirements], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    if done.returncode == 0:
        return ""
    return (lines[-1] if lines else "pip failed").removeprefix("ERROR: ")
