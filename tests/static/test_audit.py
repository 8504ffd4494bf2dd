# SPDX-License-Identifier: Apache-2.0
"""The audit passes on the kernels of this tree, and fails on kernels that break its rules."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastflat import audit  # noqa: E402
from fastflat.audit import _budget, _cuda, _machine, _ptx, _run, _traffic, _triton  # noqa: E402
from fastflat.audit._facts import Facts  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def arches(request) -> tuple[str, ...]:
    """One architecture in every run; all that have a budget with --slow, as ``make audit`` compiles them."""
    return audit.BUDGETED if request.config.getoption("--slow") else ("sm_90",)


@pytest.fixture(scope="module")
def report(arches):
    return audit.audit(arches)


@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_no_kernel_breaks_a_rule_or_its_budget(report, language):
    if language == "cuda" and "nvcc" not in report.toolchain:
        pytest.skip("needs nvcc")
    assert any(facts.language == language for facts in report.kernels)
    broken = {name: lines for name, lines in report.failures.items() if language + "/" in name}
    assert not broken, "\n".join(f"{name}: {line}" for name, lines in broken.items() for line in lines)


def test_every_kernel_was_compiled_for_every_architecture(report, arches):
    names = {arch: {f.name for f in report.kernels if f.arch == arch} for arch in arches}
    assert all(found == names["sm_90"] != set() for found in names.values())
    for name, budget in ((a, _budget.read(ROOT / "benchmarks" / "budgets" / f"{a}.json")) for a in audit.BUDGETED):
        assert {n for n in budget["kernels"] if n.startswith("triton/")} == {
            n for n in names["sm_90"] if n.startswith("triton/")
        }, name


def test_status_says_what_was_shown_and_no_more(report):
    assert report.status("triton", "fake_quantize").startswith("compiled, interpreted, ")
    assert report.status("triton", "no such family") == "never ran on a GPU"
    bare = dataclasses.replace(report, traffic=[], runs={})
    assert bare.status("triton", "identity") == "compiled, never ran on a GPU"
    json.dumps(report.to_dict())


# Kernels that must fail -----------------------------------------------------------------------------------------------


@triton.jit
def _good(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.div_rn(tl.load(x_ptr + at), 3.0))


@triton.jit
def _divides_approximately(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, 1.0 / x)


@triton.jit
def _contracts(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * x + x)


@triton.jit
def _takes_exponentials(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.exp(tl.load(x_ptr + at)))


@triton.jit
def _loads_narrow(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at * 3))


@triton.jit
def _stores_narrow(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at * 3, tl.load(x_ptr + at))


@triton.jit
def _spills(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.sum(x, 0) - x)


def compiled(kernel, block=1024, fusion=False, **options) -> Facts:
    source = ASTSource(
        fn=kernel,
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": block},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    out = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": fusion, **options}
    )
    wanted = {"load x_ptr": block * 4 // 128, "store y_ptr": block * 4 // 128}
    names = {"param 0": "x_ptr", "param 1": "y_ptr"}
    return _triton.facts(kernel.__name__, "test", "sm_90", out.asm, wanted, names)


def test_a_good_kernel_has_no_failures():
    facts = compiled(_good)
    assert facts.failures() == []
    assert facts.wide == ["load x_ptr", "store y_ptr"]


@pytest.mark.parametrize(
    ("kernel", "options", "reason"),
    [
        (_divides_approximately, {}, "div.full.f32: approximate division"),
        (_contracts, {"fusion": True}, "fma.rn.f32: contracted"),
        (_takes_exponentials, {}, "approximate arithmetic"),
        (_loads_narrow, {}, "load x_ptr is not accessed 16 bytes at a time: 0 of 32 bytes"),
        (_stores_narrow, {}, "store y_ptr is not accessed 16 bytes at a time: 0 of 32 bytes"),
        (_spills, {"block": 32768, "maxnreg": 64}, "bytes of local memory a thread: registers are spilled"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_kernel_fails(kernel, options, reason):
    assert any(reason in line for line in compiled(kernel, **options).failures()), compiled(kernel, **options)


def test_contraction_is_what_the_launch_option_prevents():
    assert compiled(_contracts).failures() == []


@pytest.mark.skipif(_cuda.nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y[i] = __fdividef(x[i], y[i]);", "approximate"),
        ("y[i] = __fmaf_rn(x[i], x[i], y[i]);", "contracted"),
        ("volatile float a[8]; a[i & 7] = x[i]; y[i] = a[(3 * i) & 7];", "spilled"),
    ],
)
def test_a_bad_cuda_kernel_fails(tmp_path, body, reason):
    source = tmp_path / "bad.cu"
    source.write_text(f"__global__ void bad(const float* x, float* y) {{ int i = threadIdx.x; {body} }}\n")
    (facts,) = _cuda.compile_source(source, "sm_90", tmp_path, tmp_path / "cache")
    assert any(reason in line for line in facts.failures()), facts


@pytest.mark.skipif(_cuda.nvcc() is None, reason="needs nvcc")
def test_a_cuda_source_that_does_not_compile_is_named(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void k() { return 1 }\n")
    with pytest.raises(RuntimeError, match=r"cannot compile for sm_90: .*broken\.cu"):
        _cuda.compile_source(source, "sm_90", tmp_path, tmp_path / "cache")


def test_narrow_streams_of_a_cuda_kernel_are_missed_by_name():
    name = "map_kernel<4, Forward<fp32>, (fp32, fp32), (bf16)>"
    assert _cuda._narrow(name, ["load param 3", "load param 3+8", "store param 4"]) == {}
    assert _cuda._narrow(name, ["load param 3", "store param 4"]) == {"loads": "1 of 2 streams are"}
    assert _cuda._narrow("reduce_finish_kernel<AbsMax<fp32>>", []) == {}


def test_cuda_flags_are_those_of_the_build():
    flags = (ROOT / "build_tools" / "flags.py").read_text()
    assert all(f'"{flag}"' in flags for flag in _cuda.FLAGS)


# Budgets ------------------------------------------------------------------------------------------------------------

FACTS = Facts("triton/f/k", "f", "triton", "sm_90", 33, 0, 64, {}, ["load x_ptr"], {})


def test_limits_of_a_budget():
    budget = {"kernels": {FACTS.name: _budget.entry(FACTS)}}
    assert budget["kernels"][FACTS.name]["registers"] == 40
    assert _budget.failures(FACTS, budget) == []
    for change, line in (
        ({"registers": 41}, "41 registers, budget 40"),
        ({"shared": 65}, "65 shared, budget 64"),
        ({"wide": []}, "load x_ptr is no longer accessed 16 bytes at a time"),
        ({"name": "triton/f/new"}, "not in the budget of sm_90"),
    ):
        assert _budget.failures(dataclasses.replace(FACTS, **change), budget) == [line]
    assert _budget.forgotten([], {"triton"}, budget) == [FACTS.name]
    assert _budget.forgotten([], {"cuda"}, budget) == []


def test_a_budget_survives_writing(tmp_path):
    content = {"toolchain": {"triton": "1"}, "kernels": {FACTS.name: _budget.entry(FACTS)}}
    _budget.write(tmp_path / "sm_90.json", content)
    assert _budget.read(tmp_path / "sm_90.json") == content
    (tmp_path / "sm_90.json").write_text("{")
    with pytest.raises(ValueError, match=r"sm_90\.json: not a budget file"):
        _budget.read(tmp_path / "sm_90.json")


def test_too_much_traffic_fails():
    assert _traffic.Traffic("t", "f", "cuda", 12.5, 12.0).failures() == []
    assert _traffic.Traffic("t", "f", "cuda", 16.0, 12.0).failures() != []


def test_recorded_runs_need_a_gpu_and_a_date(tmp_path):
    rows = [{"device": "cuda", "backend": "triton", "family": "identity"}, {"device": "cpu", "backend": "cpu"}]
    for name, record in {
        "old": {"gpu": "A", "date": "2026-01-01", "rows": rows},
        "new": {"gpu": "B", "date": "2026-02-01", "rows": rows},
        "cpu": {"gpu": None, "date": "2026-03-01", "rows": rows},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "cut.json").write_text('{"gpu"')
    assert _run.recorded_runs(tmp_path) == {"triton/identity": "ran on B, 2026-02-01"}


# The command --------------------------------------------------------------------------------------------------------


def run(*words, env=None):
    command = [sys.executable, "-m", "fastflat", "audit", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("words", [("--arch", "sm_1"), ("--arch", "90"), ("--json", "no/such/folder/x.json")])
def test_bad_input_is_one_line_and_status_2(words):
    done = run(*words)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words[1].split("/x")[0] in done.stderr


def test_ptx_reader_on_what_compilers_write():
    text = """
    .visible .entry k(.param .u64 k_param_0, .param .align 8 .b8 k_param_1[16]) {
      // fma.rn.f32 in a comment
      ld.param.u64 %rd1, [k_param_0]; ld.param.v2.u64 {%rd2, %rd3}, [k_param_1];
    $L1:
      .loc 1 2 3
      cvta.to.global.u64 %rd4, %rd3; mad.wide.s32 %rd5, %r1, 16, %rd4; add.s64 %rd6, %rd1, %rd9;
      @%p1 ld.global.nc.v4.u32 {%r2, %r3, %r4, %r5}, [%rd5+16]; st.global.b16 [%rd6], %rs1;
      { sqrt.approx.ftz.f32 %f1, %f2; }
    }
    """
    (kernel,) = _ptx.parse(text)
    assert kernel.accesses == {_ptx.Access("load", "param 1+8", 16): 1, _ptx.Access("store", "param 0", 2): 1}
    assert set(kernel.forbidden) == {"sqrt.approx.ftz.f32"}


def test_ptx_reader_tells_the_pointers_of_a_table_apart():
    """Arrays of addresses in one argument, found by an index: the constant part of the offset names the stream."""
    text = """
    .visible .entry k(.param .align 8 .b8 k_param_0[4096], .param .u64 k_param_1) {
      mov.b64 %rd1, k_param_0; mul.wide.s32 %rd2, %r1, 8; add.s64 %rd3, %rd1, %rd2; add.s64 %rd4, %rd3, 1000;
      mov.b64 %rd13, %rd4; sub.s64 %rd14, %rd13, %rd2; mad.lo.s64 %rd15, %rd16, 6, %rd14;
      ld.param.u64 %rd5, [%rd4+-1000]; ld.param.u64 %rd6, [%rd15+500]; ld.param.u64 %rd7, [k_param_1];
      call.uni (retval0), f; ld.param.b64 %rd8, [retval0];
      cvta.to.global.u64 %rd9, %rd5; add.s64 %rd10, %rd9, %rd11;
      ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd10]; ld.global.u32 %r2, [%rd10+4];
      cvta.to.global.u64 %rd12, %rd6; st.global.u32 [%rd12], %r2; st.global.f64 [%rd7], %fd1;
    }
    """
    (kernel,) = _ptx.parse(text)
    assert kernel.accesses == {
        _ptx.Access("load", "param 0+0", 16): 1,
        _ptx.Access("load", "param 0+0", 4): 1,
        _ptx.Access("store", "param 0+1500", 4): 1,
        _ptx.Access("store", "param 1", 8): 1,
    }
    assert _cuda._streams_of_table("list_map_kernel<Step>", kernel) == {
        "param 0+0": "stream 0",
        "param 0+1500": "stream 1",
    }
    assert _cuda._narrow_streams("list_map_kernel<Step>", kernel) == {"store stream 1": "accesses of 4 bytes"}
    assert _cuda._narrow_streams("map_kernel<Step>", kernel) == {}


@pytest.mark.skipif(_machine.cuobjdump() is None or shutil.which("c++filt") is None, reason="needs c++filt")
def test_readable_names():
    assert _cuda.readable("_ZN8fastflat4cuda3fooINS_8BFloat16EEEvPKT_") == "foo<bf16>"
