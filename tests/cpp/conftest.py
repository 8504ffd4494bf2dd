# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BUILD = Path(__file__).resolve().parents[1] / "emulator" / "build.py"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastflat_tests_build", BUILD)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the functors cannot be built")
    return build.load(name)


@pytest.fixture(scope="session")
def functors() -> ModuleType:
    """The functors of csrc/math over numpy arrays."""
    return load("fastflat_functors")


@pytest.fixture(scope="session")
def elementary() -> ModuleType:
    """The elementary functions and random draws of csrc/math over numpy arrays."""
    return load("fastflat_elementary")
