# SPDX-License-Identifier: Apache-2.0
"""The kernels once more with address and undefined-behaviour sanitizers, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "FASTFLAT_EMULATOR_SANITIZE" in os.environ
outside = pytest.mark.skipif(INSIDE, reason="starts the sanitized process; this is it")


@pytest.fixture(scope="session")
def sanitized_environment(builder):
    path = builder.build("fastflat_emulator", sanitize=True)
    probe = subprocess.run([builder.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(probe.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no shared address sanitizer")
    assert path.exists()
    return {
        **os.environ,
        "FASTFLAT_EMULATOR_SANITIZE": "1",
        "LD_PRELOAD": builder.sanitizer_libraries(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }


def run(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )


@outside
@pytest.mark.parametrize(
    ("every", "files"),
    [
        (1, ("emulator", "kernels")),
        (19, ("general_quantize", "mixquant", "bitplane", "binarize", "liq")),
        (7, ("sharpness", "descent", "vectors", "tangents", "row_tangents", "logits", "inputs", "weight_norms")),
    ],
)
def test_kernels_are_clean(sanitized_environment, every, files):
    done = run(
        {**sanitized_environment, "FASTFLAT_EMULATOR_SANITIZE": str(every)},
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-x"),
        *(f"tests/emulator/test_{name}.py" for name in files),
    )
    assert done.returncode == 0, f"{files}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


PROBE = """
import sys, torch
from tests.emulator import build
module = build.load("fastflat_emulator", sanitize=True)
assert module.sanitized()
data = torch.zeros(250)
module.probe(sys.argv[1], data.data_ptr(), data.numel())
"""


@outside
@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("one_past_the_end", r"AddressSanitizer: heap-buffer-overflow"),
        ("int_overflow", r"runtime error: signed integer overflow"),
    ],
)
def test_a_wrong_kernel_is_caught_with_its_line(sanitized_environment, name, report):
    done = run(sanitized_environment, "-c", PROBE, name)
    assert done.returncode != 0
    assert report in done.stderr
    assert "probes.cu:" in done.stderr
