# SPDX-License-Identifier: Apache-2.0
"""What the built libraries ask of the process that loads them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastflat import _load

_STANDARD = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


@pytest.fixture(params=_load.LIBRARIES)
def library(request):
    path = Path(_load.__file__).parent / f"libfastflat_{request.param}.so"
    if not path.is_file():
        pytest.skip(f"{_load.status()[request.param].reason}")
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs nm and readelf of binutils")
    return path


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_only_the_stable_abi_and_the_standard_libraries(library):
    undefined = [line.split()[-2:] for line in output("nm", "-D", "--undefined-only", str(library)).splitlines()]
    strong = [name for kind, name in undefined if kind == "U"]
    assert [name for name in strong if name.startswith(("aoti_torch_", "torch_"))]
    for name in strong:
        assert name.startswith(("aoti_torch_", "torch_")) or _STANDARD.fullmatch(name), name


def test_no_python_in_it(library):
    symbols = output("nm", "-D", str(library))
    assert not re.search(r"\b_?Py[A-Z_]\w*", symbols)


def test_libtorch_is_needed_and_no_folder_is_stored(library):
    dynamic = output("readelf", "-d", str(library))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.match(r"libgomp|libpython|libcudart|libtorch_python|libc10", name)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


#: What fastflat._load asks the CPU library for; everything else is an operator, found through torch's registry.
QUERIES = {"fastflat_cpu_isa"}


def test_only_operators_come_out_of_it(library):
    lines = output("nm", "-D", "--defined-only", str(library)).splitlines()
    functions = [line.split()[-1] for line in lines if line.split()[-2] == "T"]
    assert {name for name in functions if not name.startswith(("_init", "_fini"))} <= QUERIES
