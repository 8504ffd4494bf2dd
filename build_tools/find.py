# SPDX-License-Identifier: Apache-2.0
"""Looks for what a build needs: torch, a C++ compiler, nvcc. Imports no torch and asks no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from build_tools.decide import Found, Torch


@dataclasses.dataclass(frozen=True)
class Tools:
    """Where things are. Commands are word lists, so that ``CXX="ccache g++"`` works."""

    found: Found
    torch: str = ""
    cxx: tuple[str, ...] = ()
    nvcc: tuple[str, ...] = ()


def tools(env: Mapping[str, str]) -> Tools:
    """Searches this machine. ``CXX``, ``PYTORCH_NVCC``, ``CUDA_HOME`` and ``CUDA_PATH`` say where to look first."""
    folder, torch = _torch()
    cxx, compiler = _first([env.get("CXX", "")] if env.get("CXX") else ["g++", "c++", "clang++"], _cxx_version)
    homes = [str(Path(env[name], "bin", "nvcc")) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    nvcc, toolkit = _first([env.get("PYTORCH_NVCC", ""), *homes, "nvcc", "/usr/local/cuda/bin/nvcc"], _nvcc_version)
    return Tools(Found(sys.platform, torch, compiler, toolkit), folder, cxx, nvcc)


def _torch() -> tuple[str, Torch | None]:
    """The folder of the torch package and its versions, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "", None
    folder = spec.submodule_search_locations[0]
    version = Path(folder, "version.py")
    if not version.is_file() or not Path(folder, "include", "torch").is_dir():
        return "", None
    facts = runpy.run_path(str(version))
    return folder, Torch(facts["__version__"], facts.get("cuda"))


def _first(commands: list[str], version_of) -> tuple[tuple[str, ...], str | None]:
    """The first command that exists and tells its version, or ((), None)."""
    for command in commands:
        words = shlex.split(command)
        if not words or shutil.which(words[0]) is None:
            continue
        version = version_of(words)
        if version is not None:
            return tuple(words), version
    return (), None


def _cxx_version(words: list[str]) -> str | None:
    text = _output([*words, "--version"])
    number = re.search(r"\d+\.\d+(\.\d+)?", text)
    return f"{os.path.basename(words[-1])} {number[0]}" if number else None


def _nvcc_version(words: list[str]) -> str | None:
    number = re.search(r"release (\d+\.\d+)", _output([*words, "--version"]))
    return number[1] if number else None


def architectures(nvcc: tuple[str, ...]) -> tuple[str, ...]:
    """The GPU architectures that this nvcc compiles for, as ``("7.5", "8.0")``; empty where it does not say."""
    if not nvcc:
        return ()
    listed = re.findall(r"compute_(\d+)(\d)\b", _output([*nvcc, "--list-gpu-arch"]))
    return tuple(f"{major}.{minor}" for major, minor in listed)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
