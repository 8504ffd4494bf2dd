# SPDX-License-Identifier: Apache-2.0
"""Compiles ``csrc/cuda/*.cu`` for any architecture with nvcc, without a GPU and without torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from fastflat.audit import _machine, _ptx
from fastflat.audit._facts import Facts, streams

#: What decides about the code; build_tools/flags.py has the same ones, and a test compares them.
FLAGS = ("-std=c++20", "-O3", "-fmad=false")

_TYPES = {"fastflat::BFloat16": "bf16", "fastflat::Half": "fp16", "float": "fp32", "double": "fp64"}
#: Values of enumerations among template arguments, as the demangler writes them.
_FORMS = ("full", "plain", "chained")
_FORM = re.compile(r"\((?:fastflat::)?GridForm\)(\d)")
_TUPLE = re.compile(r"TupleOf<std::integer_sequence<unsigned long(?:, \d+ul)*>(?:, )?([^<>]*?(?:<[^<>]*>[^<>]*?)*)\s*>")


def nvcc() -> str | None:
    """The CUDA compiler: of ``$CUDA_HOME``, or on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")


def version(compiler: str) -> str:
    """The toolkit's version, ``"13.0"``."""
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def sources(root: Path) -> list[Path]:
    """The kernel sources of a checkout."""
    return sorted((root / "csrc" / "cuda").glob("*.cu"))


def compile_source(source: Path, arch: str, include: Path, cache: Path) -> list[Facts]:
    """Facts of every kernel of a .cu for ``arch``. What was compiled before with the same inputs is read again.

    Raises RuntimeError with the compiler's first error if the source does not compile.
    """
    compiler = nvcc()
    key = hashlib.sha256(f"{arch} {FLAGS} {version(compiler)}".encode())
    for path in sorted([source, *include.rglob("*.h"), *include.rglob("*.cuh")]):
        key.update(path.read_bytes())
    folder = cache / f"{source.stem}-{arch}-{key.hexdigest()[:16]}"
    cubin, ptx = folder / "kernels.cubin", folder / "kernels.ptx"
    if not cubin.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _nvcc(compiler, arch, "-ptx", f"-I{include}", str(source), "-o", str(ptx))
        _nvcc(compiler, arch, "-cubin", str(ptx), "-o", f"{cubin}.part")
        os.replace(f"{cubin}.part", cubin)
    used = _machine.usage(cubin)
    found = []
    for kernel in _ptx.parse(ptx.read_text()):
        name = readable(kernel.name)
        wide, _ = streams(kernel, {}, _streams_of_table(name, kernel))
        usage = used[kernel.name]
        found.append(
            Facts(
                f"cuda/{source.stem}/{name}",
                source.stem,
                "cuda",
                arch,
                usage.registers,
                usage.local,
                usage.shared,
                kernel.forbidden,
                wide,
                {**_narrow(name, wide), **_narrow_streams(name, kernel)},
            )
        )
    return found


def _nvcc(compiler: str, arch: str, *words: str) -> None:
    done = subprocess.run([compiler, f"-arch={arch}", *FLAGS, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line or "fatal" in line]
        raise RuntimeError(f"fastflat audit: nvcc cannot compile for {arch}: {(lines or ['no message'])[0].strip()}")


def readable(mangled: str) -> str:
    """A kernel's name without namespaces, with tuples of pointers as ``(fp32, bf16)``."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return mangled
    text = subprocess.run([tool, mangled], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    text = _FORM.sub(lambda found: _FORMS[int(found[1])], text).split("(")[0]
    text = re.sub(r"\b(fastflat::)?cuda::", "", text)
    for long, short in _TYPES.items():
        text = re.sub(rf"\b{long}\b", short, text)
    text = re.sub(r"fastflat::|(?: const)?\*", "", _TUPLE.sub(r"(\1)", text))
    return re.sub(r"\s+>", ">", text)


def _narrow(name: str, wide: list[str]) -> dict[str, str]:
    """Streams that a kernel's name promises, inputs and outputs, against those found wide."""
    tuples = [[part for part in t.split(",") if part.strip()] for t in re.findall(r"\(([^()]*)\)", name)]
    if name.startswith("resident_kernel"):
        tuples = [["in"], ["out"]]
    narrow = {}
    for kind, pointers in zip(("load", "store"), tuples, strict=False):
        found = sum(stream.startswith(kind) for stream in wide)
        if found < len(pointers):
            narrow[f"{kind}s"] = f"{found} of {len(pointers)} streams are"
    return narrow


def _streams_of_table(name: str, kernel: _ptx.PtxKernel) -> dict[str, str]:
    """Names of the streams of a kernel over a list of tensors, whose addresses are in its first argument: by their
    order, since offsets go with the size of the table."""
    if not name.startswith("list_"):
        return {}
    found = {access.base for access in kernel.accesses if access.base.startswith("param 0+")}
    ordered = sorted(found, key=lambda base: int(base.partition("+")[2]))
    return {base: f"stream {number}" for number, base in enumerate(ordered)}


def _narrow_streams(name: str, kernel: _ptx.PtxKernel) -> dict[str, str]:
    """Of those, what a kernel touches element by element for the sake of ragged ends and never 16 bytes at a time."""
    names, narrow = _streams_of_table(name, kernel), {}
    for kind in ("load", "store"):
        wide = kernel.bytes_by_base(kind, 16)
        for access in kernel.accesses:
            if access.kind == kind and access.base in names and access.base not in wide:
                narrow[f"{kind} {names[access.base]}"] = f"accesses of {access.bytes} bytes"
    return narrow
