# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
#: Set in the process that test_sanitizers starts: the same tests, the module built with both sanitizers.
SANITIZE = "FASTFLAT_EMULATOR_SANITIZE" in os.environ
#: There, every how-manieth test of each function runs: the sanitized kernels are ten times slower.
EVERY = int(os.environ.get("FASTFLAT_EMULATOR_SANITIZE", "") or 1)


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fastflat_tests_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(config, items):
    met, kept, left = Counter(), [], []
    for item in items:
        met[item.originalname] += 1
        (kept if met[item.originalname] % EVERY == 1 % EVERY else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    build = _sibling("build")
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the emulated kernels cannot be built")
    return build


@pytest.fixture(scope="session")
def module(builder) -> ModuleType:
    return builder.load("fastflat_emulator", sanitize=SANITIZE)


@pytest.fixture
def emulated(module):
    """The ops through the emulated kernels, in natural order, all blocks, counters at zero."""
    module.set_order(0)
    module.set_edge_blocks(0)
    module.take_counts()
    yield _sibling("emulated").Emulated(module)
    module.set_order(0)
    module.set_edge_blocks(0)
