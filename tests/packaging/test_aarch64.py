# SPDX-License-Identifier: Apache-2.0
"""The CPU library compiles for AArch64, where a cross compiler is installed (Debian: g++-aarch64-linux-gnu)."""

import pathlib
import shutil
import subprocess

import pytest

from build_tools import find, flags

ROOT = pathlib.Path(flags.__file__).parents[1]
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs {COMPILER}: apt-get install g++-aarch64-linux-gnu")
@pytest.mark.parametrize("source", sorted(p.relative_to(ROOT) for p in (ROOT / "csrc/cpu").rglob("*.cpp")), ids=str)
def test_compiles(source):
    torch = find.tools({}).torch
    if not torch:
        pytest.skip("needs torch's headers")
    arguments = [a for a in flags.cxx(torch, str(ROOT)) if a != "-MD"]
    command = [COMPILER, *arguments, "-O1", "-Werror", "-S", "-o", "/dev/null", str(source)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
