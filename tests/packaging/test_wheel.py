# SPDX-License-Identifier: Apache-2.0
"""Wheels of this tree: what is in them, how they are called, and that the pure one works."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from build_tools import decide, find


@pytest.fixture(scope="module")
def wheel(build_wheel):
    return build_wheel()


@pytest.fixture(scope="module")
def pure(build_wheel):
    return build_wheel(FASTFLAT_BUILD="0", FASTFLAT_CUDA="", FASTFLAT_LOCAL_VERSION="test1")


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def info(wheel):
    return json.loads(zipfile.ZipFile(wheel).read("fastflat/_build_info.json"))


def belongings(root, folder):
    """What the wheel must hold of a folder: its modules, and whatever else is tracked inside the package itself."""
    prefix, kind = ("", "") if folder == "fastflat" else ("fastflat/", ".py")
    listing = subprocess.run(["git", "ls-files", folder], cwd=root, capture_output=True, text=True, check=True)
    return {prefix + name for name in listing.stdout.split() if name.endswith(kind) and (root / name).is_file()}


def test_libraries_and_tag_follow_the_decision(wheel):
    decisions = decide.decide(os.environ, find.tools(os.environ).found)
    for library in decisions:
        assert (f"fastflat/libfastflat_{library.name}.so" in names(wheel)) == library.build
        assert info(wheel)["libraries"][library.name]["built"] == library.build
    tag = wheel.stem.split("-")[2:]
    assert tag[:2] == ["py3", "none"]
    assert (tag[2] == "any") == (not any(library.build for library in decisions))


def test_the_pure_wheel_is_for_every_platform(pure):
    assert pure.name.endswith("-py3-none-any.whl")
    assert "+test1" in pure.name
    assert not [name for name in names(pure) if name.endswith(".so")]
    for library in info(pure)["libraries"].values():
        assert library["reason"] == "FASTFLAT_BUILD=0"
        assert "unset FASTFLAT_BUILD" in library["mend"]


@pytest.mark.parametrize("folder", ["fastflat", "triton_kernels", "benchmarks"])
def test_everything_is_in_the_package(pure, root, folder):
    expected = belongings(root, folder)
    assert expected
    assert expected <= names(pure)


def test_nothing_else_is(pure):
    tops = {name.split("/")[0] for name in names(pure)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastflat"}
    assert "fastflat/py.typed" in names(pure)
    assert {f"fastflat/benchmarks/{name}" for name in ("schema.json", "page.html.jinja")} <= names(pure)
    assert any(name.endswith("licenses/LICENSE") for name in names(pure))
    assert not [name for name in names(pure) if "pybind" in name or name.endswith((".cpp", ".cu", ".h", ".pyc"))]


def test_the_record_holds_no_path_of_this_machine(wheel, root):
    text = json.dumps(info(wheel))
    for path in (str(root), sys.prefix, os.path.expanduser("~")):
        assert path not in text


def test_the_pure_wheel_computes_by_the_reference(pure, tmp_path):
    zipfile.ZipFile(pure).extractall(tmp_path)
    program = (
        "import sys, warnings; sys.path.insert(0, sys.argv[1]); warnings.simplefilter('error', ImportWarning)\n"
        "import torch, fastflat as ff, fastflat._load as load\n"
        "assert ff.__file__.startswith(sys.argv[1]), ff.__file__\n"
        "y = ff.fake_quantize(torch.tensor([0.26, -3.0]), torch.tensor(0.5), spec=ff.QuantSpec.lsq(bits=3))\n"
        "print(y.tolist(), load.status()['cpu'].reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.5, -2.0] not built: FASTFLAT_BUILD=0"
    assert "slow reference" in done.stderr
