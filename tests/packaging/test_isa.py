# SPDX-License-Identifier: Apache-2.0
"""The choice among instruction sets inside one binary."""

import os
import subprocess
import sys

import pytest

from fastflat import _load

SETS = ("baseline", "avx2", "avx512")


@pytest.mark.skipif(not _load.status()["cpu"].loaded, reason="the CPU library was not built")
@pytest.mark.parametrize("cap", SETS)
def test_the_environment_caps_the_choice(cap):
    program = "from fastflat import _load; print(_load.cpu_isa())"
    environment = {**os.environ, "FASTFLAT_CPU_ISA": cap}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    chosen = run.stdout.strip()
    assert SETS.index(chosen) <= SETS.index(cap)
    if cap == "baseline":
        assert chosen == "baseline"


def test_no_library_no_instruction_set():
    program = "from fastflat import _load; print(_load.cpu_isa())"
    environment = {**os.environ, "FASTFLAT_DISABLE_LIBRARIES": "cpu"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None"
