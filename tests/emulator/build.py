# SPDX-License-Identifier: Apache-2.0
"""Builds the test modules (emulated CUDA kernels, bare functors) with g++, ninja and pybind11, at test time.

Objects stay under ``build/tests`` and are rebuilt when a source, a header or a flag changes; the kernels are compiled
once for all modules that hold them. None is in a wheel.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent

# No contraction: g++ would fuse a*b+c as soon as the target has FMA, and nvcc is told not to.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
PLAIN = ["-O2"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
SOURCES = {
    "fastflat_emulator": [HERE / "module.cpp", HERE / "probes.cu", *sorted(HERE.glob("bind_*.cpp")), *KERNELS],
    "fastflat_glue": [HERE / "glue.cpp", HERE / "glue_ops.cpp", *KERNELS],
    "fastflat_functors": [ROOT / "tests" / "cpp" / "module.cpp"],
    "fastflat_elementary": [ROOT / "tests" / "cpp" / "elementary_module.cpp"],
}


def compiler() -> str | None:
    """The C++ compiler that builds the modules: ``$CXX`` or g++; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(name: str, sanitize: bool = False) -> Path:
    """The path of extension module `name`, compiled if anything it is made of has changed."""
    folder = ROOT / "build" / "tests" / ("sanitized" if sanitize else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _target(name)
    with (folder / "lock").open("w") as lock:  # test processes may start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(_rules(SANITIZED if sanitize else PLAIN))
        jobs = str(min(2, os.cpu_count() or 1))
        done = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs, target.name],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"building {name} failed:\n{done.stdout}{done.stderr}")
    return target


def load(name: str, sanitize: bool = False) -> ModuleType:
    """Builds and imports extension module `name`."""
    path = build(name, sanitize)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_libraries() -> str:
    """Value of LD_PRELOAD for a Python that loads a sanitized module. libstdc++ comes along because the sanitizer
    looks up its throw function when it starts."""
    names = ("libasan.so", "libstdc++.so")
    paths = [subprocess.check_output([compiler(), f"-print-file-name={n}"], text=True).strip() for n in names]
    return " ".join(str(Path(p).resolve()) for p in paths)


def _python_options() -> tuple[list[str], list[str]]:
    """Compile and link options of a pybind11 module."""
    import pybind11

    return [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"], []


def _torch_options() -> tuple[list[str], list[str]]:
    """Compile and link options of an operator library; its own symbols come before those of libtorch."""
    from build_tools import flags

    root = Path(importlib.util.find_spec("torch").origin).parent  # not imported: sanitized processes come by here
    options = [o.format(torch=root, floor=flags.TARGET_VERSION) for o in (*flags.TORCH, *flags.CUDA_HOST)]
    return options, [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-Wl,-Bsymbolic"]


def _rules(optimisation: list[str]) -> str:
    """The build of all modules; kernels know neither Python nor torch, so that their objects fit every module."""
    flags = " ".join([*FLAGS, *optimisation, f"-I{CSRC}", f"-I{HERE}"])
    lines = [
        f"cxx = {compiler()}",
        f"flags = {flags}",
        "rule compile",
        "  command = $cxx -x c++ $flags $more -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $flags $in -o $out $more",
    ]
    lines += [f"build {_object(source)}: compile {source}" for source in KERNELS]
    for name, sources in SOURCES.items():
        compiling, linking = _torch_options() if name == "fastflat_glue" else _python_options()
        for source in sources:
            if source not in KERNELS:
                lines += [f"build {_object(source)}: compile {source}", f"  more = {' '.join(compiling)}"]
        objects = " ".join(map(_object, sources))
        lines += [f"build {_target(name)}: link {objects}", f"  more = {' '.join(linking)}"]
    return "\n".join([*lines, ""])


def _object(source: Path) -> str:
    return f"{source.parent.name}_{source.stem}_{source.suffix[1:]}.o"


def _target(name: str) -> str:
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
