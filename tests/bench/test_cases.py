# SPDX-License-Identifier: Apache-2.0
"""Cases and peers: the bytes that are declared, and that every peer computes the same thing."""

import pytest
import torch

from fastflat import QuantSpec
from fastflat.cli import bench

CPU = torch.device("cpu")
GRANULARITIES = ("tensor", "channel", "group32", "group128")


def case(granularity="tensor", dtype=torch.float32, passes="both", size=2**12):
    (found,) = bench.package("cases.fake_quantize").cases([size], [dtype], [granularity], [passes])
    return found


@pytest.mark.parametrize("size", [2**7, 2**12, 2**18, 2**20, 2**25])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_shapes_hold_the_size_and_the_group(benchmarks, size, group):
    rows, columns = benchmarks.cases.shape_of(size, group)
    assert rows * columns == size
    assert columns <= 4096
    assert columns % (group or 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bytes_are_those_of_two_reads_of_x_one_of_gy_and_two_results(granularity, dtype):
    found = case(granularity, dtype)
    scales = found.data(CPU).scale.numel()
    width = found.dtype.itemsize
    assert found.bytes == 5 * width * found.elements + 2 * 4 * scales
    assert case(granularity, dtype, "forward").bytes == 2 * width * found.elements + 4 * scales
    assert found.copied_bytes == 2 * width * found.elements


def test_identity_moves_one_copy_a_pass():
    both, forward = bench.package("cases.identity").cases([2**12], [torch.float32], ["both", "forward"])
    assert (both.bytes, forward.bytes) == (4 * 4 * 2**12, 2 * 4 * 2**12)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_are_those_that_lsq_starts_with(granularity):
    data = case(granularity).data(CPU)
    spec = data.case.spec
    one = data.x.detach().view(data.scale.numel(), -1)[0]
    torch.testing.assert_close(data.scale.detach().reshape(-1)[0], 2 * one.abs().mean() / spec.qmax**0.5)
    assert data.factor == spec.grad_factor(data.x.numel(), data.scale.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_peers_compute_the_same(benchmarks, granularity, dtype):
    peers = benchmarks.peers.PEERS["fake_quantize"]
    data = case(granularity, dtype).data(CPU)

    def computed(peer):
        y = peers[peer](data)(data.x, data.scale)
        gradients = torch.autograd.grad(y, (data.x, data.scale), data.gy, allow_unused=True)
        return y, gradients[0], *([] if gradients[1] is None else [gradients[1]])

    ours = computed("fastflat")
    steps = data.scale.detach().max().item()
    for peer in ("eager", "builtin", "builtin-fixed"):
        theirs = computed(peer)
        assert [t.dtype for t in theirs] == [t.dtype for t in ours][: len(theirs)]
        assert len(theirs) == (2 if peer == "builtin-fixed" else 3)
        if dtype is torch.float32 and peer == "eager":
            assert torch.equal(theirs[0], ours[0])
            torch.testing.assert_close(theirs[1], ours[1], rtol=1e-6, atol=0)  # its dx is (dy * s) / s
        # Multiplication by 1/s, or 16 bits between the operations, moves an element on a border by one step.
        moved = (theirs[0] - ours[0]).abs() > 0.02 * steps
        assert moved.float().mean() < 0.02
        assert (theirs[0] - ours[0]).abs().max() <= 1.05 * steps
        if len(theirs) == 3 and dtype is torch.float32:
            torch.testing.assert_close(theirs[2], ours[2], rtol=5e-2, atol=5e-2 * ours[2].abs().max().item())


@pytest.mark.usefixtures("compiling")
def test_compiled_peer_computes_the_same(benchmarks):
    data = case("channel").data(CPU)
    y = benchmarks.peers.PEERS["fake_quantize"]["compile"](data)(data.x, data.scale)
    ours = benchmarks.peers.PEERS["fake_quantize"]["fastflat"](data)(data.x, data.scale)
    assert (y != ours).float().mean() < 0.01


def test_a_peer_without_a_form_of_the_case_is_named(benchmarks, monkeypatch):
    def refuses(data):
        raise RuntimeError("no such kernel\nand more")

    peers = {**benchmarks.peers.PEERS["fake_quantize"], "builtin": refuses}
    monkeypatch.setitem(benchmarks.peers.PEERS, "fake_quantize", peers)
    effort = benchmarks.measure.Effort(0.0, (1, 1), 0.0)
    mul, builtin = benchmarks.run.rows(case(), ["mul", "builtin"], 1, effort, CPU)
    assert builtin["unsupported"] == "RuntimeError: no such kernel"
    assert "seconds" not in builtin
    assert mul["seconds"] > 0


def test_our_own_failure_is_not_hidden(benchmarks, monkeypatch):
    def fails(data):
        raise RuntimeError("broken")

    peers = {**benchmarks.peers.PEERS["fake_quantize"], "fastflat": fails}
    monkeypatch.setitem(benchmarks.peers.PEERS, "fake_quantize", peers)
    with pytest.raises(RuntimeError, match="broken"):
        benchmarks.run.rows(case(), ["fastflat"], 1, benchmarks.measure.QUICK, CPU)


def test_specs_of_the_cases_are_the_papers(benchmarks):
    module = bench.package("cases.fake_quantize")
    assert module.GRANULARITIES["channel"] == QuantSpec.lsq(bits=4, axis=0)
    assert set(module.GRANULARITIES) == {*GRANULARITIES, "dynamic"}
