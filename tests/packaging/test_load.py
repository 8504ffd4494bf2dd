# SPDX-License-Identifier: Apache-2.0
"""Loading and not loading the libraries; each case in a process of its own, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from fastflat import _load


@pytest.fixture(autouse=True)
def _nothing_remembered():
    _load.build_info.cache_clear()
    yield
    _load.build_info.cache_clear()


def run(program, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTFLAT_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=clean | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=os.path.dirname(os.path.dirname(_load.__file__)),
        capture_output=True,
        text=True,
        check=False,
    )


QUANTIZE = (
    "import torch, fastflat as ff\n"
    "print(ff.fake_quantize(torch.tensor([0.26]), torch.tensor(0.5), spec=ff.QuantSpec.lsq(bits=3)).item())\n"
)


def test_import_and_use_without_libraries():
    done = run(QUANTIZE, FASTFLAT_DISABLE_LIBRARIES="cpu,cuda")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.5"
    assert done.stderr.count("FallbackWarning") == 1
    assert "disabled by FASTFLAT_DISABLE_LIBRARIES; unset FASTFLAT_DISABLE_LIBRARIES" in done.stderr


def test_strict_makes_the_fallback_an_error():
    done = run(QUANTIZE, FASTFLAT_DISABLE_LIBRARIES="cpu,cuda", FASTFLAT_STRICT="1")
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert "FASTFLAT_STRICT=1" in done.stderr.splitlines()[-1]


def test_an_unknown_library_is_named():
    done = run("from fastflat import _load; _load.status()", FASTFLAT_DISABLE_LIBRARIES="gpu")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("FASTFLAT_DISABLE_LIBRARIES must name cpu or cuda, got gpu")


def test_import_touches_no_gpu_and_no_triton():
    done = run("import sys, torch, fastflat; print(torch.cuda.is_initialized(), 'triton' in sys.modules)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


def test_a_broken_file_is_a_reason_and_no_error(tmp_path, monkeypatch):
    (tmp_path / "libfastflat_cpu.so").write_bytes(b"no library")
    monkeypatch.setattr(_load, "_HERE", tmp_path)
    state = _load._load("cpu", disabled=False)
    assert not state.loaded
    assert "does not load under torch" in state.reason
    assert "pip install" in state.remedy


def test_a_missing_file_quotes_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(_load, "_HERE", tmp_path)
    assert _load._load("cpu", disabled=False).reason == "the cpu library was not built"
    info = {"libraries": {"cpu": {"reason": "no torch", "mend": "do this"}}}
    (tmp_path / "_build_info.json").write_text(json.dumps(info))
    _load.build_info.cache_clear()
    state = _load._load("cpu", disabled=False)
    assert (state.loaded, state.reason, state.remedy) == (False, "not built: no torch", "do this")


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["8.0+PTX"], (7, 5), False),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        (["10.0f"], (10, 3), True),
        (["10.0a+PTX"], (12, 0), False),
        (["7.5", "12.0+PTX"], (12, 1), True),
        ([], (8, 0), False),
    ],
)
def test_which_gpu_the_build_has_code_for(tmp_path, monkeypatch, arches, capability, runs):
    (tmp_path / "_build_info.json").write_text(json.dumps({"arches": arches}))
    monkeypatch.setattr(_load, "_HERE", tmp_path)
    assert _load.has_code_for(capability) is runs
