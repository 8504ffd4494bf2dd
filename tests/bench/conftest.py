# SPDX-License-Identifier: Apache-2.0
import pytest

from fastflat.cli import bench


@pytest.fixture
def benchmarks():
    """``fastflat.benchmarks``, with its modules as attributes."""
    for name in ("cases", "gate", "machine", "measure", "peers", "report", "run", "step"):
        bench.package(name)
    return bench.package()
