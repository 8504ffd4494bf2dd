# SPDX-License-Identifier: Apache-2.0
"""What the compiled CPU library holds: few instantiations, and loops that really are vector loops."""

from __future__ import annotations

import collections
import pathlib
import platform
import re
import shutil
import subprocess
import zlib

import pytest

import fastflat
from fastflat.backends import unavailable

LIBRARY = pathlib.Path(fastflat.__file__).with_name("libfastflat_cpu.so")
#: Loops by name and how often each is compiled for one instruction set: once for each pair of storage types (6), or
#: for each storage type (4); the long runs of the backward with and without a zero-point.
INSTANTIATIONS = {
    "fake_quantize_forward": 6,
    "fake_quantize_backward": 6,
    "fake_quantize_backward_channels": 6,
    "fake_quantize_backward_range": 6,
    "backward_run": 12,
    # float32 -> 16 bit and the two directions of the tangent
    "fake_quantize_tangent": 8,
    "fake_quantize_absmax_channels": 4,
    "fake_quantize_absmax_range": 4,
    "general_quantize_forward": 6,
    "general_quantize_backward": 6,
    "general_quantize_backward_channels": 6,
    "general_quantize_backward_range": 6,
    "general_quantize_tangent": 8,
    # The rule itself: not for each storage type but for each kind of grid (2) and noise (5) in both compute types,
    # rounded to the two 16-bit types, and in fp32 alone with the commonest noises (2), with floats, and in the
    # conventions of eager code by either arithmetic (2).
    "Rule::forward": 27,
}
#: Loops that must be vectorised; of the rule those for additive noise in fp32, with other rules and without, and the
#: form of eager code.
LOOPS = ["fake_quantize_forward<float, float>", "backward_run<false, float, float>"] + [
    f"Rule<float, false, (fastflat::Noise){noise}, fastflat::Exact, (fastflat::GeneralForm){form}>::forward"
    for noise, form in ((1, 0), (1, 1), (0, 2))
]
SETS = ("baseline", "avx2", "avx512")
#: The packed division of a set: the mark that a loop of the forward op was vectorised. The baseline is kept small.
PACKED_DIVISION = {
    "avx2": r"\bvdivps\s.*%ymm",
    "avx512": r"\bvdivps\s.*%zmm",
}

pytestmark = [
    pytest.mark.skipif(bool(unavailable("cpu", "cpu")), reason="the CPU library was not built"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 instructions"),
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="needs binutils"),
]


def output_of(*command: str) -> str:
    return subprocess.run([*command, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def symbols() -> list[str]:
    return output_of("nm", "-C", "--defined-only").splitlines()


@pytest.fixture(scope="module")
def disassembly() -> str:
    return output_of("objdump", "-dC", "--no-show-raw-insn")


def test_instantiations_are_few(symbols):
    counts = {isa: collections.Counter() for isa in SETS}
    for line in symbols:
        match = re.search(r"fastflat::cpu::(\w+)::\(anonymous namespace\)::(\w+)<.*?>(::\w+)?\(", line)
        if match and match[1] in counts and "lambda" not in line:
            name = match[2] + (match[3] or "")
            counts[match[1]][name] += name in INSTANTIATIONS
    for isa, found in counts.items():
        assert +found == INSTANTIATIONS, isa


def test_library_stays_small():
    """As a wheel packs it: with 0.7 MB of Python a wheel of little more than 3 MB."""
    assert len(zlib.compress(LIBRARY.read_bytes(), 6)) < 2.48e6


@pytest.mark.parametrize("isa", PACKED_DIVISION)
@pytest.mark.parametrize("function", LOOPS)
def test_loops_are_vectorised(disassembly, isa, function):
    name = f"fastflat::cpu::{isa}::(anonymous namespace)::{function}"
    body = re.search(rf"^[0-9a-f]+ <(?:void )?{re.escape(name)}.*?(?=^$)", disassembly, re.MULTILINE | re.DOTALL)
    assert body, f"no symbol {name}"
    # A function that is the same as another is a jump to it.
    if folded := re.fullmatch(r"[^\n]*\n[^\n]*\tjmp +([0-9a-f]+) [^\n]*\n(?:[^\n]*\tdata16[^\n]*\n)?", body[0]):
        body = re.search(rf"^0*{folded[1]} <.*?(?=^$)", disassembly, re.MULTILINE | re.DOTALL)
    assert re.search(PACKED_DIVISION[isa], body[0])


def test_no_fused_multiply_add_in_maps(disassembly):
    """One rounding instead of two would change bits."""
    assert not re.search(r"\bvf(n?m)(add|sub)\d", disassembly)
