# SPDX-License-Identifier: Apache-2.0
"""The same program under each instruction set of the CPU library."""

from __future__ import annotations

import os
import subprocess
import sys


def outputs(program: str) -> set[str]:
    """What a Python program prints under each cap of the instruction set: one text where bits do not depend on it. A
    processor without a set takes the one below."""
    found = set()
    for isa in ("baseline", "avx2", "avx512"):
        env = {**os.environ, "FASTFLAT_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    return found
