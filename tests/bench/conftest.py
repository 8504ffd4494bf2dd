# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from fastflat import cli
from fastflat.cli import _bench, bench


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


@pytest.fixture
def run(capsys):
    """A command line of ``fastflat bench``: exit status, standard output and standard error."""

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return command


@pytest.fixture
def swift(benchmarks, monkeypatch):
    """As little effort as makes a row."""
    effort = benchmarks.measure.Effort(0.0, (2, 2), 0.0)
    monkeypatch.setattr(benchmarks.measure, "QUICK", effort)
    roofline = bench.package("roofline")
    monkeypatch.setattr(roofline, "QUICK_ARRAY", {"cpu": 1 << 14, "cuda": 1 << 14})
    monkeypatch.setattr(roofline, "QUICK_SIDE", {"cpu": 16, "cuda": 16})


@pytest.fixture
def own_memory(monkeypatch):
    """The allocator's thresholds of the test process stay as they are."""
    monkeypatch.setattr(_bench, "memory", lambda allocator: f"{allocator} (not touched)")
