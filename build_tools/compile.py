# SPDX-License-Identifier: Apache-2.0
"""Compiles and links one library: in parallel, and only what changed since the last time.

An object is kept as long as its command, its source and every header that the compiler named are what they were.
Objects lie under ``build/objects``, whatever command asked for them: an editable install and a wheel share them.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_tools import flags
from build_tools.find import Tools

#: What one compiler process may need at its worst; bounds the number of parallel ones.
_BYTES_PER_JOB = 3 << 30

#: What ptxas -v reports of every kernel: a thousand lines nobody asked for, kept in the log beside the object.
_STATISTICS = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


class CompileError(Exception):
    """A command of the build failed; its output is in the text."""


class Step(NamedTuple):
    """One command that makes one file, and how the log calls it."""

    note: str
    output: Path
    command: list[str]
    inputs: list[str]


def sources(root: Path, name: str) -> list[str]:
    """The sources of the library `name`, relative to `root`, in an order that depends on their names only."""
    patterns = {"cpu": ("cpu/*.cpp",), "cuda": ("cuda/*.cpp", "cuda/*.cu")}[name]
    csrc = root / "csrc"
    return sorted(path.relative_to(root).as_posix() for pattern in patterns for path in csrc.glob(pattern))


def instruction_sets(source: str, machine: str) -> tuple[str, ...]:
    """The sets of csrc/cpu/isa.h that a source is compiled for, once each; ``("",)`` for a source without loops."""
    if not source.endswith("_loops.cpp"):
        return ("",)
    return ("baseline", "avx2", "avx512") if machine in ("x86_64", "AMD64") else ("baseline",)


def jobs(env: Mapping[str, str], cores: int, memory: int) -> int:
    """Number of parallel compilers: ``MAX_JOBS``, else as many as there are cores and 3 GB pieces of memory."""
    wanted = env.get("MAX_JOBS", "")
    if not wanted:
        return max(1, min(cores, memory // _BYTES_PER_JOB))
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"MAX_JOBS must be a positive integer, got {wanted!r}")
    return int(wanted)


def build(
    root: Path, name: str, tools: Tools, arches: tuple[str, ...], env: Mapping[str, str], *, lines: bool = True
) -> Path:
    """Brings the library `name` up to date and returns its path under ``build/objects``. Raises CompileError.

    `lines`: whether device code names its source lines.
    """
    folder = root / "build" / "objects" / name
    compiles = [
        _compile(root, folder, source, isa, tools, arches, lines)
        for source in sources(root, name)
        for isa in instruction_sets(source, platform.machine())
    ]
    if not compiles:
        raise CompileError(f"no sources for the {name} library under csrc/{name}")
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder), ThreadPoolExecutor(jobs(env, cores, memory)) as pool:
        work = [pool.submit(_update, step, root) for step in compiles]
        try:
            for future in work:
                future.result()
        except CompileError:
            for future in work:
                future.cancel()
            raise
        link = _link(root, folder, name, [step.output for step in compiles], tools)
        _update(link, root)
    return link.output


def _compile(
    root: Path, folder: Path, source: str, isa: str, tools: Tools, arches: tuple[str, ...], lines: bool
) -> Step:
    at = (tools.torch, str(root))
    if source.endswith(".cu"):
        command = [*tools.nvcc, *flags.nvcc(tools.found.nvcc, arches, *at, lines=lines)]
    elif source.startswith("csrc/cuda/"):
        command = [*tools.nvcc, *flags.cuda_cxx(*at)]
    else:
        others = len(instruction_sets(source, platform.machine())) > 1
        command = [*tools.cxx, *flags.cxx(*at), *flags.optimisation(source, isa, others)]
    if isa:
        command.append(f"-DFASTFLAT_ISA_{isa.upper()}")
    output = folder / f"{source}{isa and '.'}{isa}.o"
    command += ["-MF", f"{output}.d", "-c", source, "-o", str(output)]
    return Step(f"compiling {source}{isa and ' for '}{isa}", output, command, [source])


def _link(root: Path, folder: Path, name: str, objects: list[Path], tools: Tools) -> Step:
    output = folder / f"libfastflat_{name}.so"
    linker, options = (tools.cxx, flags.link_cpu) if name == "cpu" else (tools.nvcc, flags.link_cuda)
    command = [*linker, "-o", str(output), *map(str, objects), *options(tools.torch, str(root))]
    return Step(f"linking {output.name}", output, command, [str(path) for path in objects])


def _update(step: Step, root: Path) -> None:
    """Runs the step's command unless its output is up to date. Prints warnings; all that was said is in ``.log``."""
    record = Path(f"{step.output}.cmd")
    # a compiler's cache in front of it changes no file
    command = shlex.join(step.command[os.path.basename(step.command[0]) == "ccache" :])
    if _current(step, record, command, root):
        return
    step.output.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    print(f"fastflat: {step.note}", file=sys.stderr, flush=True)
    done = subprocess.run(step.command, cwd=root, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise CompileError(f"{command}\n{said}")
    Path(f"{step.output}.log").write_text(said)
    heard = "\n".join(line for line in said.splitlines() if not _STATISTICS.match(line))
    if heard:
        print(heard, file=sys.stderr, flush=True)
    record.write_text(command)


def _current(step: Step, record: Path, command: str, root: Path) -> bool:
    if not step.output.is_file() or not record.is_file() or record.read_text() != command:
        return False
    made = step.output.stat().st_mtime_ns
    return all(
        path.is_file() and path.stat().st_mtime_ns <= made
        for path in (root / name for name in [*step.inputs, *_dependencies(Path(f"{step.output}.d"))])
    )


def _dependencies(depfile: Path) -> list[str]:
    """The files that a make rule ``object: a b c`` names; none for a step that wrote no rule."""
    if not depfile.is_file():
        return []
    rule = depfile.read_text().replace("\\\n", " ").partition(": ")[2].splitlines()[0]
    return [word.replace("\\ ", " ") for word in re.findall(r"(?:\\ |\S)+", rule)]


class _lock:
    """Two builds of one tree take turns."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"

    def __enter__(self) -> None:
        import fcntl  # Linux only, like the libraries

        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exception) -> None:
        self._file.close()
