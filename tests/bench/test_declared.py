# SPDX-License-Identifier: Apache-2.0
"""What cases declare: operations beside those that an eager form does, static bounds of kernels that have not run."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflat.cli import bench

CPU = torch.device("cpu")
SIZE = 2**12


class Counted(TorchDispatchMode):
    """Elements of floating-point results of arithmetic operators; a reduction counts what it reads."""

    FREE = ("view", "copy", "clone", "empty", "detach", "expand", "ones", "zeros", "full", "fill", "bernoulli", "rand")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.strip("_")
        if isinstance(out, torch.Tensor) and not name.startswith(self.FREE):
            tensors = [t for t in (out, *args) if isinstance(t, torch.Tensor)]
            largest = max(t.numel() for t in tensors)
            self.total += largest * (2 if name in ("clamp", "addcmul") else 1)
        return out


def cases():
    overview = bench.package("overview")
    return {**overview.kernels([SIZE]), **overview.steps()}


def test_every_family_declares_bytes_and_operations(benchmarks):
    found = cases()
    assert set(found) == {*bench._FAMILIES, *bench._STEPS}
    for family, own in found.items():
        assert own
        for case in own:
            assert case.bytes > 0
            assert (case.operations > 0) == (family != "identity"), case.label


def test_every_granularity_has_its_operations(benchmarks):
    """Not only those of a run: none raises, and backward adds some."""
    for family in bench._FAMILIES:
        module = bench.package(f"cases.{family}")
        passes = ("forward", "both") if family not in ("vectors", "tangents", "row_tangents") else ("forward",)
        for case in module.cases([SIZE], [torch.float32], passes=passes):
            assert case.operations >= 0
    for base in ("sgd", "adam", "adamw", "padam", "lars", "lamb"):
        (one,) = bench.package("cases.descent").cases(["small"], bases=[base])
        (two,) = bench.package("cases.sharpness").cases(["small"], bases=[base])
        assert two.operations == one.operations + 4 * one.elements


@pytest.mark.parametrize(
    ("family", "granularity"),
    [
        ("fake_quantize", "tensor"), ("fake_quantize", "channel"), ("general_quantize", "uniform"),
        ("general_quantize", "e2m1"), ("mixquant", "channel"), ("bitplane", None), ("binarize", None), ("liq", None),
    ],
)  # fmt: skip
def test_forward_operations_are_about_those_of_the_eager_form(benchmarks, family, granularity):
    """The formula's count and that of the operators that Python code needs for it: within a factor of 2.5."""
    options = {} if granularity is None else {"granularities": [granularity]}
    (case,) = bench.package(f"cases.{family}").cases([SIZE], [torch.float32], passes=["forward"], **options)
    data = case.data(CPU)
    forward = benchmarks.peers.PEERS[family]["eager"](data)
    with torch.no_grad(), Counted() as counted:
        forward(data.x, data.scale)
    assert 1 / 2.5 < counted.total / case.operations < 2.5, counted.total / case.elements


def test_fake_quantize_does_five_operations_forward(benchmarks):
    """Division, two comparisons, rounding, product: exactly what the eager form does."""
    (case,) = bench.package("cases.fake_quantize").cases([SIZE], [torch.float32], ["tensor"], ["forward"])
    data = case.data(CPU)
    forward = benchmarks.peers.PEERS["fake_quantize"]["eager"](data)
    with torch.no_grad(), Counted() as counted:
        forward(data.x, data.scale.detach())
    assert counted.total == case.operations == 5 * SIZE


def test_audited_bounds_are_bytes_over_the_sheets_bandwidth(benchmarks):
    audited = bench.package("audited")
    rows = audited.rows(cases())
    assert {row["arch"] for row in rows} == set(audited.SHEETS) == {p.stem for p in audited.BUDGETS.glob("*.json")}
    for row in rows:
        sheet = audited.SHEETS[row["arch"]]
        wanted = max(row["bytes"] / sheet.memory, row["operations"] / sheet.arithmetic)
        assert row["bound_seconds"] == pytest.approx(wanted)
        assert row["status"] == "audited, not run"
    assert {row["family"] for row in rows} == {*bench._FAMILIES, *bench._STEPS}
    assert not [row for row in audited.rows(cases(), ["sm_90"]) if row["arch"] == "sm_90"]


def test_only_what_a_budget_names_counts_as_audited(benchmarks, tmp_path):
    audited = bench.package("audited")
    limits = {"registers": 40, "shared": 0, "wide": []}
    kernels = {"triton/liq/kernel": limits, "triton/liq/other": {**limits, "registers": 64}}
    (tmp_path / "sm_90.json").write_text(json.dumps({"toolchain": {}, "kernels": kernels}))
    (row,) = audited.rows(cases(), folder=tmp_path)
    assert (row["family"], row["languages"], row["kernels"], row["registers"]) == ("liq", ["triton"], 2, 64)
    assert audited.rows(cases(), folder=tmp_path / "none") == []


def test_records_of_a_gpu_are_counted_by_the_audit(benchmarks, tmp_path):
    """A record as a run on a GPU writes it is what the audit takes for "ran on"."""
    from fastflat.audit._run import recorded_runs

    row = {"family": "liq", "device": "cuda:0", "backend": "triton", "peer": "fastflat"}
    record = {"format": 1, "gpu": "H100, sm_90", "date": "2026-11-26", "rows": [row]}
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert recorded_runs(tmp_path) == {"triton/liq": "ran on H100, sm_90, 2026-11-26"}


def test_pytest_benchmark_runs_the_cases_of_a_run(benchmarks, monkeypatch):
    """Its entry points know every family, and call what the run calls."""
    entries = bench.package("test_cases")
    assert {case.family for case in entries.CASES} == {*bench._FAMILIES, *bench._STEPS}
    called = []

    def benchmark(call):
        called.append(call())

    benchmark.extra_info = {}
    (case,) = (c for c in entries.CASES if c.family == "liq" and c.elements == 2**12)
    entries.test_case(benchmark, case, "fastflat")
    assert called == [None]
    assert benchmark.group == case.label
    assert benchmark.extra_info == {"bytes": case.bytes, "operations": case.operations}
    absent = {**benchmarks.peers.PEERS["liq"], "none": lambda data: data.no_such_form}
    monkeypatch.setitem(benchmarks.peers.PEERS, "liq", absent)
    with pytest.raises(pytest.skip.Exception, match="no_such_form"):
        entries.test_case(benchmark, case, "none")
