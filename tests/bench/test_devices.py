# SPDX-License-Identifier: Apache-2.0
"""Devices, the GPU's timer on a stand-in for ``torch.cuda``, and the roofline."""

import pytest
import torch

from fastflat.cli import bench

from .fake_cuda import FakeCuda, Turned

CPU = torch.device("cpu")


def gpu(benchmarks, fake):
    return bench.package("devices").Device("cuda:0", CPU, fake)


@pytest.fixture
def two(benchmarks, monkeypatch):
    monkeypatch.setattr(bench.package("devices"), "CUDA", FakeCuda(2))


def test_all_is_every_gpu_and_then_the_cpu(two):
    find = bench.package("devices").find
    assert [d.name for d in find("all")] == ["cuda:0", "cuda:1", "cpu"]
    assert [d.name for d in find("cpu,cuda:1,cpu")] == ["cpu", "cuda:1"]
    assert [d.kind for d in find("cuda,cpu")] == ["cuda", "cpu"]
    with pytest.raises(ValueError, match=r"must be one that PyTorch sees, got 'cuda:2' with 2 GPUs"):
        find("cuda:2")
    with pytest.raises(ValueError, match=r"--device must be cpu or cuda, cuda:1, ... or all, got 'tpu'"):
        find("cpu,tpu")


def test_all_without_a_gpu_is_the_cpu(benchmarks, monkeypatch):
    monkeypatch.setattr(bench.package("devices"), "CUDA", FakeCuda(0))
    assert [d.name for d in bench.package("devices").find("all")] == ["cpu"]


def test_long_calls_are_timed_by_events_and_short_ones_in_a_graph(benchmarks):
    """A graph leaves out what launching costs, and says what a launched call takes."""
    clock = Turned(launch=30e-6)
    fake = FakeCuda(clock=clock)
    timer = bench.package("timers").Cuda(gpu(benchmarks, fake))
    effort = benchmarks.measure.Effort(0.0, (3, 3), 0.0)
    calls = {"long": clock.kernel(fake, "long", 30e-3), "short": clock.kernel(fake, "short", 5e-6)}
    found = benchmarks.measure.interleaved(calls, effort, timer=timer)
    assert found["long"].how == "events"
    assert found["long"].median == pytest.approx(30.03e-3)
    assert found["long"].launched is None
    assert found["short"].how == "graph"
    assert found["short"].median == pytest.approx(5e-6)
    assert found["short"].launched == pytest.approx(35e-6)


def test_what_cannot_be_captured_is_timed_as_launched(benchmarks):
    clock = Turned(launch=30e-6)
    fake = FakeCuda(clock=clock)
    fake.capturable = False
    block = bench.package("timers").Cuda(gpu(benchmarks, fake)).prepare([clock.kernel(fake, "a", 5e-6)])
    assert block.how == "events"
    assert block.run(10) / 10 == pytest.approx(35e-6)


@pytest.mark.parametrize("seconds", [5e-6, 2e-3])
def test_calls_go_round_the_copies(benchmarks, seconds):
    clock = Turned()
    fake = FakeCuda(clock=clock)
    block = (
        bench.package("timers")
        .Cuda(gpu(benchmarks, fake))
        .prepare([clock.kernel(fake, name, seconds) for name in "abc"])
    )
    clock.log.clear()
    block.run(6)
    assert "".join(clock.log[:6]) in ("abcabc", "bcabca", "cabcab")


def test_copies_exceed_twice_the_cache(benchmarks):
    timer = bench.package("timers").Cuda(gpu(benchmarks, FakeCuda(cache=50 << 20)))
    assert timer.copies(10 << 20) == 10
    assert timer.copies(1 << 30) == 1
    assert timer.copies(100) == bench.package("timers")._MOST_COPIES
    assert bench.package("timers").Host().copies(100) == 1


def test_rows_of_a_gpu(benchmarks, monkeypatch):
    """Data in several copies, events, the stand-in's memory; the compiled peer is made once for all copies."""
    case = next(iter(bench.package("cases.fake_quantize").cases([2**12], [torch.float32], ["channel"])))
    made = []

    def compiled(data):
        made.append(data)
        return benchmarks.peers.eager.lsq(data)

    peers = {**benchmarks.peers.PEERS["fake_quantize"], "compile": compiled}
    monkeypatch.setitem(benchmarks.peers.PEERS, "fake_quantize", peers)
    fake = FakeCuda(cache=case.bytes * 3)
    effort = benchmarks.measure.Effort(0.0, (2, 2), 0.0)
    roofs = bench.package("roofline").Roofs(1e9, {"fp32": 1e9})
    rows = benchmarks.run.rows(case, ["mul", "fastflat", "compile"], 1, effort, gpu(benchmarks, fake), roofs)
    assert {row["device"] for row in rows} == {"cuda:0"}
    assert {row["timing"] for row in rows} <= {"events", "graph"}
    assert {row["buffers"] for row in rows} == {3}
    assert {row["peak_bytes"] for row in rows} == {4096}
    assert len(made) == 1
    ours = rows[1]
    assert ours["elements_per_second"] == pytest.approx(2**12 / ours["seconds"])
    assert ours["of_roofline"] > 0
    assert fake.entered


def test_the_roof_is_the_longer_of_memory_and_arithmetic():
    roofs = bench.package("roofline").Roofs(10.0, {"fp32": 100.0, "fp64": 50.0})
    assert roofs.least(20, 100, "fp32") == 2.0
    assert roofs.least(20, 400, "fp32") == 4.0
    assert roofs.least(20, 400, "bf16") == 4.0  # computes in fp32
    assert roofs.least(20, 400, "fp64") == 8.0
    assert roofs.least(20, 100, "fp32", memory=40.0) == 1.0  # data of this size is copied faster


def test_roofline_rates_are_amounts_over_times(benchmarks, monkeypatch):
    roofline = bench.package("roofline")
    monkeypatch.setattr(roofline, "QUICK_ARRAY", {"cpu": 1 << 16})
    monkeypatch.setattr(roofline, "QUICK_SIDE", {"cpu": 32})
    device = bench.package("devices").of(CPU)
    effort = benchmarks.measure.Effort(0.0, (2, 2), 0.0)
    rows = roofline.rows(device, 1, [torch.float32, torch.bfloat16], effort, quick=True)
    assert [(row["what"], row["dtype"]) for row in rows] == [
        ("copy", "fp32"), ("triad", "fp32"), ("gemm", "fp32"), ("gemm", "bf16"),
    ]  # fmt: skip
    amounts = [2 << 16, 3 << 16, 2 * 32**3, 2 * 32**3]
    for row, amount in zip(rows, amounts, strict=True):
        assert row["rate"] == pytest.approx(amount / row["seconds"])
    roofs = roofline.roofs(rows, "cpu", 1)
    assert roofs.memory == max(rows[0]["rate"], rows[1]["rate"])
    assert roofs.arithmetic == {"fp32": rows[2]["rate"], "bf16": rows[3]["rate"]}
    assert roofline.roofs(rows, "cpu", 2) is None


def test_a_lost_device_is_told_from_a_defect(benchmarks):
    devices, run = bench.package("devices"), benchmarks.run

    def fails():
        raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        run.guarded(gpu(benchmarks, FakeCuda()), fails)
    with pytest.raises(KeyError, match="a defect"):
        run.guarded(CPU, fails)
    with pytest.raises(devices.Lost, match=r"^cuda:0 no longer answers: CUDA error: the GPU has fallen off the bus$"):
        run.guarded(gpu(benchmarks, FakeCuda(lost_after=-1)), fails)


def test_clocks_and_driver_are_those_that_nvidia_smi_finds(benchmarks, monkeypatch):
    asked = []

    def smi(command, **_):
        asked.append(command)
        output = "610.1, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W, Enabled\n"
        return type("Done", (), {"stdout": output, "returncode": 0})()

    monkeypatch.setattr(benchmarks.machine.subprocess, "run", smi)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    device = bench.package("devices").Device("cuda:1", CPU, FakeCuda(2))
    facts = benchmarks.machine.describe(device)
    assert "--id=1" in asked[-1]
    line = benchmarks.machine.line(facts)
    assert line.startswith("Fake H100, sm_90, driver 610.1, SM 1980 MHz of 1980 MHz, memory 2619 MHz")
    monkeypatch.setattr(benchmarks.machine.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError))
    assert "driver" not in benchmarks.machine.describe(device)


def test_the_cpus_line_has_clock_commit_and_day(benchmarks):
    facts = benchmarks.machine.describe(CPU) | {"commit": "abc", "clocks": "2600 MHz, performance"}
    line = benchmarks.machine.line(facts)
    assert ", 2600 MHz, performance;" in line
    assert f"commit abc, {facts['date']}" in line


def test_the_stand_in_has_no_more_than_torch_cuda():
    """What the benchmark asks of the stand-in it can ask of the real module, under the same names."""
    own = {"place"}  # where the stand-in's tensors live
    made = FakeCuda()
    asked = {name for name in dir(made) if not name.startswith("_") and callable(getattr(made, name))} - own - {"clock"}
    assert len(asked) > 10
    assert [name for name in sorted(asked) if not hasattr(torch.cuda, name)] == []
    assert not hasattr(torch.cuda, "place")
    for name in ("record", "synchronize", "elapsed_time"):
        assert hasattr(torch.cuda.Event, name)
    assert hasattr(torch.cuda.CUDAGraph, "replay")


@pytest.mark.gpu
def test_rows_of_a_real_gpu(benchmarks):
    """Calls in graphs, whatever launching them takes, all of them under the roof that was measured."""
    device = bench.package("devices").find("cuda")[0]
    roofline = bench.package("roofline")
    effort = benchmarks.measure.QUICK
    measured = roofline.rows(device, 1, [torch.float32], effort, quick=True)
    roofs = roofline.roofs(measured, device.name, 1)
    for size in (2**16, 2**26):
        (case,) = bench.package("cases.fake_quantize").cases([size], [torch.float32], ["channel"])
        rows = benchmarks.run.rows(case, ["mul", "fastflat", "eager"], 1, effort, device, roofs)
        ours = {row["peer"]: row for row in rows}["fastflat"]
        assert ours["timing"] == "graph"
        assert 0 < ours["seconds"] <= 1.1 * ours["launched_seconds"]
        assert 0 < ours["of_roofline"] < 1.1
        assert ours["buffers"] > 1 or size == 2**26
        assert ours["backend"] in ("cuda", "triton")
