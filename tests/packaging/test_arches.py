# SPDX-License-Identifier: Apache-2.0
import pytest

from build_tools.arches import choose, gencode


@pytest.mark.parametrize("toolkit", ["12.0", "12.6", "12.8", "13.0", "13.4", "14.0"])
def test_the_default_needs_no_gpu_and_ends_with_ptx_of_the_newest(toolkit):
    arches = choose({}, toolkit)
    numbers = [float(arch.removesuffix("+PTX")) for arch in arches]
    assert numbers == sorted(numbers)
    assert {8.0, 9.0} <= set(numbers)
    assert [arch for arch in arches if arch.endswith("+PTX")] == [arches[-1]]


def test_the_default_follows_the_toolkit():
    assert "7.0" in choose({}, "12.9")
    assert "7.0" not in choose({}, "13.0")
    assert "10.0" not in choose({}, "12.6")
    assert "10.0" in choose({}, "12.8")


def test_the_environment_decides():
    assert choose({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "13.0") == ("8.0", "9.0+PTX")
    assert choose({"TORCH_CUDA_ARCH_LIST": " 8.0, 9.0a 8.0 "}, "13.0") == ("8.0", "9.0a")
    assert choose({"FASTFLAT_ARCHS": "8.6", "TORCH_CUDA_ARCH_LIST": "9.0"}, "13.0") == ("8.6",)
    assert choose({"FASTFLAT_ARCHS": "", "TORCH_CUDA_ARCH_LIST": " "}, "13.0") == choose({}, "13.0")


@pytest.mark.parametrize("name", ["Ampere", "80", "sm_80", "8.0+ptx", "native"])
def test_what_is_no_architecture_is_refused(name):
    with pytest.raises(ValueError, match=f"FASTFLAT_ARCHS: .*got '{name.replace('+', '[+]')}'"):
        choose({"FASTFLAT_ARCHS": f"8.0 {name}"}, "13.0")


def test_too_old_a_toolkit_has_no_default():
    with pytest.raises(ValueError, match=r"at least 12\.0, got 11\.8"):
        choose({}, "11.8")


def test_gencode():
    assert gencode(("8.0", "9.0a", "12.0+PTX")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
