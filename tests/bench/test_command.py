# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench`` as a user meets it: options, table, JSON, refusals."""

import json

import pytest
import torch

from fastflat.cli import bench

CASE = {"family", "threads", "dtype", "granularity", "passes", "elements", "shape", "peer", "copy_seconds"}
NUMBERS = {"seconds", "q1", "q3", "best", "rounds", "calls", "bytes", "bandwidth", "copies", "of_copy_bandwidth"}
NUMBERS |= {"over_floor", "peak_bytes", "operations", "elements_per_second", "of_roofline", "timing", "buffers"}
CASE |= {"device"}


def test_quantize_writes_every_row(run, tmp_path, swift, own_memory):
    target = tmp_path / "result.json"
    peers = "mul,fastflat,eager,builtin,builtin-fixed"
    code, out, _ = run(
        "quantize", "--quick", "--sizes", "2^7", "--dtypes", "fp32,bf16", "--threads", "1",
        "--granularity", "tensor,channel,group32,group128", "--passes", "both,forward", "--peers", peers,
        "--json", target,
    )  # fmt: skip
    assert code == 0
    result = json.loads(target.read_text())
    assert len(result["rows"]) == 2 * 4 * 2 * 5
    for row in result["rows"]:
        assert row.keys() >= CASE
        assert "unsupported" in row or row.keys() >= NUMBERS
        if "unsupported" not in row:
            assert row["q1"] <= row["seconds"] <= row["q3"]
            assert row["bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
            assert row["copies"] == pytest.approx(row["seconds"] / row["copy_seconds"])
    assert not [row for row in result["rows"] if row["peer"] == "fastflat" and "unsupported" in row]
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["isa"] in ("baseline", "avx2", "avx512")
    assert result["allocator"] == "tuned (not touched)"
    assert list(tmp_path.iterdir()) == [target]
    table = [line for line in out.splitlines() if line.lstrip().startswith("2^")]
    assert len(table) == 2 * 4 * 2
    assert f"torch {torch.__version__}" in out
    assert "of copy bw" in out


def test_families_have_a_table_each(run, tmp_path, swift, own_memory):
    """Peers and granularities go to the families that have them; noise and formats beside eager code."""
    target = tmp_path / "result.json"
    granularity = "channel,uniform,normal,temper,bypass,stochastic,e4m3,e2m1,mxfp8,mxfp4"
    code, out, _ = run(
        "quantize", "--quick", "--sizes", "2^7", "--threads", "1", "--family", "all", "--peers",
        "fastflat,eager,clone", "--granularity", granularity, "--json", target,
    )  # fmt: skip
    assert code == 0
    result = json.loads(target.read_text())
    found = {(row["family"], row["granularity"], row["peer"]) for row in result["rows"]}
    assert not [row for row in result["rows"] if "unsupported" in row]
    assert {g for f, g, p in found if f == "general_quantize" and p == "eager"} == set(granularity.split(",")[1:])
    assert {g for f, g, p in found if f == "fake_quantize"} == {"channel"}
    assert ("bitplane", "planes", "eager") in found
    assert ("identity", "none", "clone") in found
    assert ("identity", "none", "eager") not in found
    for family in ("fake_quantize", "general_quantize", "mixquant", "bitplane", "identity"):
        assert f"bench {family}" in [line.strip() for line in out.splitlines()]
    assert "peak eager" in out


def test_identity(run, swift, own_memory):
    arguments = ("--family", "identity", "--quick", "--sizes", "2^7", "--threads", "1")
    code, out, _ = run("quantize", *arguments)
    assert code == 0
    assert "vs clone" in out


def test_cases_run_once_for_each_number_of_threads(run, tmp_path, swift, own_memory, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    target = tmp_path / "result.json"
    arguments = ("--quick", "--sizes", "2^7,2^8", "--threads", "1,all", "--granularity", "tensor", "--peers", "mul")
    code, _, _ = run("quantize", *arguments, "--json", target)
    assert code == 0
    assert [row["threads"] for row in json.loads(target.read_text())["rows"]] == [1, 1, 3, 3]
    assert set_to == [1, 3, 3, 3, 1, 3, 1, 3, 3, 3, 3, 3]  # the roofline at each number of threads comes first


def test_step(run, tmp_path, swift, own_memory):
    target = tmp_path / "step.json"
    arguments = ("--quick", "--batch", 1, "--threads", "1", "--peers", "fp32,identity,fastflat", "--json", target)
    code, out, _ = run("step", *arguments)
    assert code == 0
    rows = {row["peer"]: row for row in json.loads(target.read_text())["rows"]}
    assert list(rows) == ["fp32", "identity", "fastflat"]
    assert all(row["samples_per_second"] == pytest.approx(1 / row["seconds"]) for row in rows.values())
    assert all(row["peak_bytes"] > 0 for row in rows.values())
    assert rows["fp32"]["overhead"] is None
    assert rows["identity"]["of_identity"] == pytest.approx(1)
    assert "over fp32" in out


def test_sharpness_writes_every_row(run, tmp_path, swift, own_memory):
    """All peers of a small list; the least traffic of SGD with momentum is 36 bytes a parameter."""
    target = tmp_path / "steps.json"
    names = ("--lists", "small", "--bases", "sgd", "--threads", "1", "--quick")
    code, out, _ = run("sharpness", *names, "--json", target)
    assert code == 0
    rows = json.loads(target.read_text())["rows"]
    assert {row["peer"] for row in rows} >= {"fastflat", "fastflat-swap", "stock", "add-sub", "loop"}
    assert all(row["bytes"] == 36 * row["elements"] for row in rows if "bytes" in row)
    assert ["1000000", "fp32", "small", "sgd", "1", "36"] in [line.split()[:6] for line in out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sharpness", "--lists", "resnet19"], "--lists must be of resnet18, resnet50, vit_b, small, got 'resnet19'"),
        (["sharpness", "--bases", "rmsprop"], "--bases must be of sgd, adam, adamw, padam, lars, lamb, got 'rmsprop'"),
        (["sharpness", "--family", "quantize"], "--family must be of sharpness, descent, got 'quantize'"),
        (["quantize", "--sizes", "12"], "--sizes must be powers of two from 128 to 268435456, got 12"),
        (["quantize", "--sizes", "2^3"], "--sizes must be powers of two from 128 to 268435456, got 8"),
        (["quantize", "--sizes", "2^99"], "--sizes must ascend and end at 2^63 at most, got '2^99'"),
        (["quantize", "--sizes", "2^20..2^12"], "--sizes must ascend and end at 2^63 at most, got '2^20..2^12'"),
        (["quantize", "--sizes", "many"], "--sizes must be like 2^12,2^20 or 2^12..2^24/2, got 'many'"),
        (["quantize", "--dtypes", "int8"], "--dtypes must be of fp32, bf16, fp16, fp64, got 'int8'"),
        (["quantize", "--peers", "fastflat,me"], "--peers must be of mul, fastflat, eager,"),
        (
            ["quantize", "--granularity", "row"],
            "--granularity must be of tensor, channel, group32, group128, dynamic, got 'row'",
        ),
        (
            ["quantize", "--family", "quantize"],
            "--family must be of fake_quantize, general_quantize, fake_quantize_list, mixquant,",
        ),
        (
            ["quantize", "--family", "identity", "--peers", "eager"],
            "--peers must be of mul, fastflat, clone, got 'eager'",
        ),
        (["quantize", "--passes", "backward"], "--passes must be of forward, both, got 'backward'"),
        (["quantize", "--threads", "0"], "--threads must be numbers from 1 to 1024 or all, got '0'"),
        (["quantize", "--threads", "two"], "--threads must be numbers from 1 to 1024 or all, got 'two'"),
        (["quantize", "--device", "abacus"], "--device must be cpu or cuda, cuda:1, ... or all, got 'abacus'"),
        (["quantize", "--device", "cuda:99"], "--device must be one that PyTorch sees, got 'cuda:99' with"),
        (["quantize", "--json", "no/such/folder/x.json"], "--json must name a file in an existing folder, got no/such"),
        (["quantize", "--allocator", "mine"], "'mine' is not one of 'tuned', 'default'"),
        (["step", "--batch", "0"], "0 is not in the range 1<=x<=4096"),
        (["step", "--peers", "int8"], "--peers must be of fp32, view, identity, mul, fastflat, fastflat-list, eager,"),
        (["step", "--networks", "vgg"], "--networks must be of resnet20, resnet18, transformer, got 'vgg'"),
        (["step", "--modes", "jit"], "--modes must be of eager, compile, got 'jit'"),
        (["step", "--optimizers", "adam"], "--optimizers must be of sgd, sam-loop, sam, got 'adam'"),
        (["run", "--only", "all"], "--only must be of kernels, optimizers, steps, curvature, audited, got 'all'"),
        (["run", "--families", "tables"], "--families must be of identity, fake_quantize,"),
        (["run", "--html", "no/such/folder/x.html"], "--html must name a file in an existing folder, got no/such"),
        (["compare", "here", "there"], "'here' does not exist"),
        (["sideways"], "No such command 'sideways'"),
    ],
)
def test_bad_input_ends_with_one_line(run, own_memory, arguments, said):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("fastflat: ")
    assert said in err


def test_wrong_kernels_are_not_timed(run, tmp_path, benchmarks, monkeypatch, own_memory):
    monkeypatch.setattr(benchmarks.gate, "mistakes", lambda device, dtypes: ["dx of it", "y of it"])
    monkeypatch.setattr(benchmarks.run, "rows", lambda *_: pytest.fail("timed"))
    target = tmp_path / "x.json"
    code, _, err = run("quantize", "--quick", "--json", target)
    assert code == 2
    assert err == "fastflat: bench: refused, the kernels differ from the reference in dx of it and 1 more\n"
    assert not target.exists()


def test_red_tests_are_not_timed(run, benchmarks, monkeypatch, own_memory):
    monkeypatch.setattr(benchmarks.gate, "tests_are_red", lambda file: f"1 failed in {file.name}")
    monkeypatch.setattr(benchmarks.run, "rows", lambda *_: pytest.fail("timed"))
    code, _, err = run("quantize", "--gate")
    assert code == 2
    assert "refused, the op's tests are red: 1 failed in test_fake_quantize.py" in err
    code, _, err = run("quantize", "--gate", "--family", "general_quantize,identity")
    assert code == 2
    assert "1 failed in test_general_quantize.py" in err


def test_a_run_that_breaks_off_leaves_the_old_file(tmp_path, benchmarks):
    target = tmp_path / "x.json"
    benchmarks.report.write(target, {"rows": []})
    with pytest.raises(TypeError):
        benchmarks.report.write(target, {"rows": [torch]})
    assert json.loads(target.read_text()) == {"format": 1, "rows": []}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("command", [[], ["run"], ["quantize"], ["step"], ["compare"], ["page"]])
def test_help_shows_an_example(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "fastflat bench " + " ".join(command) in out


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("2^12", [2**12]),
        ("2^12,4096,2^13", [2**12, 2**13]),
        ("2^10..2^13", [2**10, 2**11, 2**12, 2**13]),
        ("2^10..2^15/2,2^16", [2**10, 2**12, 2**14, 2**16]),
    ],
)
def test_sizes(text, sizes):
    assert bench.parse_sizes(text) == sizes


def test_threads():
    assert bench.parse_threads("1, all,1") == list(dict.fromkeys([1, torch.get_num_threads()]))
