# SPDX-License-Identifier: Apache-2.0
"""The setuptools side: libraries that are no Python modules, a wheel for every Python, and the build record.

An operator library has no PyInit function: ``torch.ops.load_library`` loads it. So its file name carries no Python
tag and the wheel is ``py3-none-<platform>``, or ``py3-none-any`` when nothing was compiled.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError as SetuptoolsCompileError

from build_tools import compile as compiler
from build_tools import flags
from build_tools.decide import TORCH_FLOOR, Library
from build_tools.find import Tools


def extensions(root: Path, libraries: tuple[Library, ...]) -> list[Extension]:
    """One entry for each library to build. An unasked library may fail to compile without failing a wheel."""
    return [
        Extension(f"fastflat.libfastflat_{lib.name}", compiler.sources(root, lib.name), optional=not lib.asked)
        for lib in libraries
        if lib.build
    ]


def classes(
    root: Path,
    version: str,
    tools: Tools,
    libraries: tuple[Library, ...],
    arches: tuple[str, ...],
    env: Mapping[str, str],
) -> dict[str, type]:
    """The ``cmdclass`` of ``setup()``."""
    decisions = {library.name: library for library in libraries}

    class BuildExt(build_ext):
        """Compiles the libraries, then writes ``_build_info.json`` beside them."""

        def get_ext_filename(self, fullname: str) -> str:
            return str(Path(*fullname.split("."))) + ".so"

        def get_export_symbols(self, ext: Extension) -> list[str]:
            return []

        def run(self) -> None:
            for library in libraries:
                print(library, file=sys.stderr, flush=True)
            if self.extensions:
                super().run()
            folder = root if self.inplace else Path(self.build_lib)
            for name, library in decisions.items():
                # What an earlier build left must not be loaded under today's schemas.
                if not library.build:
                    (folder / "fastflat" / f"libfastflat_{name}.so").unlink(missing_ok=True)
            info = record(version, tools, decisions, arches, lines=self._of_the_tree())
            path = folder / "fastflat" / "_build_info.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(info, indent=1) + "\n")

        def build_extension(self, ext: Extension) -> None:
            name = ext.name.rpartition("_")[2]
            # In place means a developer's tree: there a failure is never passed over.
            ext.optional = ext.optional and not self._of_the_tree()
            try:
                built = compiler.build(root, name, tools, arches, env, lines=self._of_the_tree())
            except compiler.CompileError as error:
                self._failed(name, error)
                raise SetuptoolsCompileError(str(error)) from None
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A process that has the old file mapped keeps it: the new one comes under the name by a rename.
            fresh = target.with_suffix(".new")
            shutil.copyfile(built, fresh)
            fresh.replace(target)

        def _of_the_tree(self) -> bool:
            return bool(self.inplace or self.editable_mode)

        def _failed(self, name: str, error: Exception) -> None:
            said = str(error).strip().splitlines()
            told = next((line for line in said[1:] if "error" in line), said[-1])
            mend = "pip install --no-build-isolation --no-deps --force-reinstall -v . shows the compiler's messages"
            decisions[name] = dataclasses.replace(
                decisions[name], build=False, reason=f"compilation failed: {told}".replace(str(root), "."), mend=mend
            )

    class Build(build):
        """Runs ``build_ext`` always: with nothing to compile it still writes down why."""

        sub_commands = tuple((name, None if name == "build_ext" else when) for name, when in build.sub_commands)

    class BuildPy(build_py):
        """Starts a wheel from an empty folder: a module removed since the last build stays out."""

        def run(self) -> None:
            if not self.editable_mode:
                shutil.rmtree(self.build_lib, ignore_errors=True)
            super().run()

    class BdistWheel(bdist_wheel):
        """Tags the wheel for the platform alone: neither library knows Python's ABI."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"build": Build, "build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel}


def record(version: str, tools: Tools, decisions: dict[str, Library], arches: tuple[str, ...], *, lines: bool) -> dict:
    """What ``fastflat._load`` and the doctor tell about the build. No path of the build machine is in it."""
    found = tools.found
    return {
        "version": version,
        "torch_target": ".".join(map(str, TORCH_FLOOR)),
        "torch": dataclasses.asdict(found.torch) if found.torch else None,
        "compiler": found.compiler,
        "nvcc": found.nvcc,
        "arches": list(arches),
        "flags": flags.public(found.nvcc, arches, lines=lines),
        "libraries": {
            name: {"built": library.build, "reason": library.reason, "mend": library.mend}
            for name, library in decisions.items()
        },
    }
