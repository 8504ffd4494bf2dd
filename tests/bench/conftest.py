# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from fastflat.cli import bench


@pytest.fixture
def benchmarks():
    """``fastflat.benchmarks``, with its modules as attributes."""
    for name in ("cases", "gate", "machine", "measure", "peers", "report", "run", "step"):
        bench.package(name)
    return bench.package()


@pytest.fixture(scope="session")
def compiling():
    """Where torch.compile cannot compile an addition, for want of a C++ compiler, there is no compiled peer."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.ones(3))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}; install a C++ compiler")
