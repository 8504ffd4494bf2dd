# SPDX-License-Identifier: Apache-2.0
"""Asks build_tools what to build and hands it to setuptools; metadata is in pyproject.toml."""

import os
import sys
from pathlib import Path

import setuptools

VERSION = "0.1.0"
SETUPTOOLS_FLOOR = 77  # the first that reads the licence fields of pyproject.toml

found = setuptools.__version__
if int(found.split(".")[0]) < SETUPTOOLS_FLOOR:
    sys.exit(f"fastflat: setuptools must be at least {SETUPTOOLS_FLOOR}, got {found}; run: pip install -U setuptools")
if "develop" in sys.argv[1:]:
    # It links the repository root, where fastflat.triton_kernels does not exist.
    sys.exit("fastflat: setup.py develop cannot map triton_kernels; run: pip install --no-build-isolation -e .")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import arches, commands, decide, find  # noqa: E402

env = os.environ
tools = find.tools(env)
try:
    libraries = decide.decide(env, tools.found)
    known = find.architectures(tools.nvcc)
    targets = arches.choose(env, tools.found.nvcc, known) if libraries[1].build else ()
except (decide.BuildError, ValueError) as error:
    sys.exit(f"fastflat: {error}")

# Wheels for one CUDA version each carry it as a local version, as torch's own do: FASTFLAT_LOCAL_VERSION=cu130.
local = env.get("FASTFLAT_LOCAL_VERSION", "")
version = f"{VERSION}+{local}" if local else VERSION

# The top-level name triton_kernels belongs to Triton's own project, benchmarks to nobody: both live inside fastflat.
inside = setuptools.find_packages(str(ROOT), include=["triton_kernels*", "benchmarks*"])
setuptools.setup(
    version=version,
    packages=[*setuptools.find_packages(str(ROOT), include=["fastflat*"]), *(f"fastflat.{name}" for name in inside)],
    package_dir={f"fastflat.{name}": name.replace(".", "/") for name in inside},
    package_data={"fastflat": ["py.typed"], "": ["*.jinja"], "fastflat.benchmarks": ["budgets/*.json", "schema.json"]},
    exclude_package_data={"fastflat": ["_build_info.json"]},
    ext_modules=commands.extensions(ROOT, libraries),
    cmdclass=commands.classes(ROOT, version, tools, libraries, targets, env),
)
