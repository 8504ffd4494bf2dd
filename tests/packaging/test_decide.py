# SPDX-License-Identifier: Apache-2.0
"""The table of what is built where; one row of the table, one test."""

import dataclasses

import pytest

from build_tools.decide import BuildError, Found, Torch, decide

FULL = Found("linux", Torch("2.13.0", "13.0"), "g++ 12.2.0", "13.0")
CPU_ONLY = dataclasses.replace(FULL, torch=Torch("2.13.0+cpu"))
UNSET = {}


def without(field, found=FULL):
    return dataclasses.replace(found, **{field: None})


@pytest.mark.parametrize(
    ("env", "found", "cpu", "cuda", "word"),
    [
        (UNSET, FULL, True, True, "nvcc 13.0"),
        (UNSET, without("torch"), False, False, "no torch"),
        (UNSET, without("compiler"), False, False, "no C++ compiler"),
        (UNSET, without("nvcc"), True, False, "no nvcc on PATH or under CUDA_HOME"),
        (UNSET, CPU_ONLY, True, False, "CPU build"),
        ({"FASTFLAT_CUDA": "1"}, CPU_ONLY, True, True, "CPU-only torch"),
        ({"FASTFLAT_CUDA": ""}, FULL, True, True, "nvcc 13.0"),
        ({"FASTFLAT_CUDA": "0"}, FULL, True, False, "FASTFLAT_CUDA=0"),
        ({"FASTFLAT_CUDA": "0"}, without("nvcc"), True, False, "FASTFLAT_CUDA=0"),
        ({"FASTFLAT_BUILD": "0"}, FULL, False, False, "FASTFLAT_BUILD=0"),
        ({"FASTFLAT_BUILD": "1"}, without("nvcc"), True, False, "no nvcc"),
        (UNSET, dataclasses.replace(FULL, nvcc="12.9"), True, False, "12.9 and torch was built with CUDA 13.0"),
        (UNSET, dataclasses.replace(FULL, nvcc="13.2"), True, True, "nvcc 13.2"),
        (UNSET, dataclasses.replace(FULL, nvcc="11.8", torch=Torch("2.13.0", "11.8")), True, False, "no C++20"),
        (UNSET, dataclasses.replace(FULL, torch=Torch("2.9.1", "13.0")), False, False, "2.9.1 is older than 2.10"),
        (UNSET, dataclasses.replace(FULL, torch=Torch("2.10.0a0+git1", "13.0")), True, True, "nvcc 13.0"),
        (UNSET, dataclasses.replace(FULL, platform="darwin"), False, False, "Linux only"),
        (UNSET, dataclasses.replace(FULL, platform="win32"), False, False, "Linux only"),
    ],
)
def test_row(env, found, cpu, cuda, word):
    libraries = decide(env, found)
    assert [library.name for library in libraries] == ["cpu", "cuda"]
    assert [library.build for library in libraries] == [cpu, cuda]
    assert word in libraries[1].reason
    for library in libraries:
        assert library.reason
        assert bool(library.mend) == (not library.build)
        assert "\n" not in str(library)


@pytest.mark.parametrize(
    ("env", "found", "word"),
    [
        ({"FASTFLAT_CUDA": "1"}, without("nvcc"), "no nvcc"),
        ({"FASTFLAT_CUDA": "1"}, dataclasses.replace(FULL, nvcc="12.9"), "major versions differ"),
        ({"FASTFLAT_CUDA": "1"}, dataclasses.replace(FULL, nvcc="11.8"), "no C\\+\\+20"),
        ({"FASTFLAT_CUDA": "1"}, without("torch"), "no torch"),
        ({"FASTFLAT_CUDA": "1"}, without("compiler"), "no C\\+\\+ compiler"),
        ({"FASTFLAT_BUILD": "1"}, without("torch"), "no torch"),
        ({"FASTFLAT_BUILD": "1"}, without("compiler"), "no C\\+\\+ compiler"),
        ({"FASTFLAT_BUILD": "1"}, dataclasses.replace(FULL, platform="darwin"), "Linux only"),
        ({"FASTFLAT_BUILD": "0", "FASTFLAT_CUDA": "1"}, FULL, "exclude each other"),
        ({"FASTFLAT_CUDA": "yes"}, FULL, "must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_a_wish_is_never_ignored(env, found, word):
    with pytest.raises(BuildError, match=word) as caught:
        decide(env, found)
    assert "\n" not in str(caught.value)


def test_only_what_was_asked_for_stops_the_build_when_it_fails():
    assert [library.asked for library in decide(UNSET, FULL)] == [False, False]
    assert [library.asked for library in decide({"FASTFLAT_BUILD": "1"}, FULL)] == [True, False]
    assert [library.asked for library in decide({"FASTFLAT_CUDA": "1"}, FULL)] == [True, True]
