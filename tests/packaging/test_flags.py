# SPDX-License-Identifier: Apache-2.0
import pytest

from build_tools import flags

HOST = flags.cxx("<torch>", "<root>")
CUDA_HOST = flags.cuda_cxx("<torch>", "<root>")
DEVICE = flags.nvcc("13.0", ("8.0", "9.0+PTX"), "<torch>", "<root>", lines=True)


@pytest.mark.parametrize("options", [HOST, CUDA_HOST, DEVICE])
def test_the_arithmetic_is_ieee(options):
    text = " ".join(options)
    assert "-ffp-contract=off" in text
    for word in (
        "fast-math",
        "fast_math",
        "-Ofast",
        "ftz=true",
        "prec-div=false",
        "prec-sqrt=false",
        "-march",
        "-fopenmp",
    ):
        assert word not in text


def test_nvcc_fuses_nothing():
    assert "-fmad=false" in DEVICE
    assert "--warn-on-spills" in " ".join(DEVICE)


@pytest.mark.parametrize("options", [HOST, CUDA_HOST])
def test_torch_through_the_stable_abi_of_the_oldest_version(options):
    assert "-DTORCH_STABLE_ONLY" in options
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in options
    assert "-std=c++20" in options


def test_a_wheel_has_no_lines_and_what_old_drivers_cannot_read_is_not_for_them():
    wheel = flags.nvcc("13.1", ("9.0",), "<torch>", "<root>", lines=False)
    assert "-lineinfo" in DEVICE
    assert "-lineinfo" not in wheel
    assert "--compress-mode=size" in wheel
    assert "--compress-mode=size" not in flags.nvcc("12.9", ("9.0",), "<torch>", "<root>", lines=False)


def test_device_code_has_no_torch():
    assert not [option for option in DEVICE if "-isystem" in option or "TORCH" in option]


def test_libtorch_stays_needed_and_no_path_is_stored():
    for options in (flags.link_cpu("<torch>", "<root>"), flags.link_cuda("<torch>", "<root>")):
        text = " ".join(options)
        assert text.index("--no-as-needed") < text.index("-ltorch")
        assert "rpath" not in text


def test_every_flag_has_its_why():
    tables = (flags.SHARED, flags.HOST, flags.TORCH, flags.NVCC, flags.LINES, flags.SMALL, flags.CUDA_HOST)
    tables += (flags.LINK, flags.NVCC_LINK)
    optimising = (flags.FAST, flags.CALLS, flags.LEAN, flags.LEANER, flags.RARE)
    for table in (*tables, *optimising, flags.LINKER, flags.CPU_LINKER):
        assert all(table.values())


def test_the_record_names_no_folder():
    text = str(flags.public("13.0", ("9.0",), lines=True))
    assert "<torch>/include" in text
    assert flags.public("13.0", (), lines=True)["nvcc"] == flags.public(None, ("9.0",), lines=True)["nvcc"] == []


def test_only_a_baseline_that_few_processors_need_is_not_vectorised(root):
    def level(source, isa, others):
        return flags.optimisation(f"csrc/cpu/{source}.cpp", isa, others)[0]

    assert level("fake_quantize_loops", "baseline", True) == "-Os"
    assert level("fake_quantize_loops", "baseline", False) == level("descent_loops", "avx2", True) == "-O3"
    assert level("binarize_loops", "avx512", True) == "-O2"
    assert level("binarize", "", False) == "-Os"
    assert level("tangents", "", False) == "-O3"
    families = {path.name.removesuffix("_loops.cpp") for path in (root / "csrc/cpu").glob("*_loops.cpp")}
    assert set(flags.LOOPS) | set(flags.FAST_CALLS) <= families
