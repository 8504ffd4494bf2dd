# SPDX-License-Identifier: Apache-2.0
"""Noise, formats and other libraries in the benchmark: that what is timed beside each other computes the same."""

import pytest
import torch

from fastflat.cli import bench

CPU = torch.device("cpu")
NOISY = ("uniform", "normal", "temper", "bypass", "stochastic")
FORMATS = ("e4m3", "e2m1")
BLOCKS = ("mxfp8", "mxfp4")


def case(granularity, dtype=torch.float32, passes="both", size=2**14, family="general_quantize"):
    (found,) = bench.package(f"cases.{family}").cases([size], [dtype], [granularity], [passes])
    return found


def computed(benchmarks, data, peer):
    """y and the gradients of x and of the scale, where it has one."""
    y = benchmarks.peers.PEERS[data.case.family][peer](data)(data.x, data.scale)
    inputs = (data.x,) if data.scale is None else (data.x, data.scale)
    return y.detach(), *torch.autograd.grad(y, inputs, data.gy)


def test_every_quantizer_is_here(benchmarks):
    assert set(bench.package("cases.general_quantize").GRANULARITIES) == {*NOISY, *FORMATS, *BLOCKS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [*NOISY, *FORMATS])
def test_bytes(granularity, dtype):
    both, forward = case(granularity, dtype), case(granularity, dtype, "forward")
    width, scales = dtype.itemsize, both.data(CPU).scale.numel()
    assert forward.bytes == 2 * width * forward.elements + 4 * scales
    assert both.bytes == 5 * width * both.elements + 2 * 4 * scales


@pytest.mark.parametrize("granularity", BLOCKS)
def test_a_scale_from_the_data_is_no_argument(granularity):
    found = case(granularity)
    assert found.data(CPU).scale is None
    assert found.bytes == 5 * 4 * found.elements + 4 * found.elements // 32
    assert case("dynamic", family="fake_quantize").data(CPU).scale is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [*FORMATS, *BLOCKS])
def test_eager_formats_are_ours(benchmarks, granularity, dtype):
    data = case(granularity, dtype).data(CPU)
    ours, theirs = (computed(benchmarks, data, peer) for peer in ("fastflat", "eager"))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6 if dtype is torch.float32 else 2**-7, atol=0)
    for a, b in zip(ours[2:], theirs[2:], strict=True):  # the scale: sums in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_eager_dynamic_scale_is_ours(benchmarks):
    data = case("dynamic", family="fake_quantize").data(CPU)
    ours, theirs = (computed(benchmarks, data, peer) for peer in ("fastflat", "eager"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("granularity", NOISY)
def test_eager_noise_has_our_distribution(benchmarks, granularity):
    """Other draws of the same: where they end, how often, their first two moments around the quantized value."""
    data = case(granularity, size=2**18).data(CPU)
    steps = data.scale.detach().view(-1, 1)
    torch.manual_seed(0)
    ours, theirs = (computed(benchmarks, data, peer) for peer in ("fastflat", "eager"))
    assert (ours[0] != theirs[0]).float().mean() > 0.1
    u = data.x.detach() / steps
    on_grid = ((u >= data.case.spec.qmin) & (u <= data.case.spec.qmax)).float().mean().item()
    for y, *_ in (ours, theirs):
        assert (y / steps).abs().max() <= 8 + 0.3 * (granularity == "temper")
    errors = [((y - data.x.detach()) / steps)[(u > -6) & (u < 5)] for y, *_ in (ours, theirs)]
    count = len(errors[0])
    assert errors[0].mean().item() == pytest.approx(errors[1].mean().item(), abs=6 * count**-0.5)
    assert errors[0].var().item() == pytest.approx(errors[1].var().item(), rel=12 * count**-0.5)
    # What passes its gradient is the same share; bypass adds the kept elements beyond the grid.
    shares = [((gx / data.gy - 1).abs() < 1e-5).float().mean().item() for _, gx, _ in (ours, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)
    if granularity != "bypass":
        assert shares[0] == pytest.approx(on_grid, abs=0.01)
    sums = [gs.double() for *_, gs in (ours, theirs)]
    spread = data.factor * (data.gy.float().square().sum(1) * 70).sqrt()  # 64 = 8 steps squared at most, and the noise
    assert ((sums[0] - sums[1]).abs() < 6 * spread).all()


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("granularity", ["uniform", "bypass", "e2m1", "mxfp8"])
def test_compiled_forms_run(benchmarks, granularity):
    data = case(granularity, size=2**12).data(CPU)
    ours, theirs = (computed(benchmarks, data, peer) for peer in ("fastflat", "compile"))
    if granularity in NOISY:
        steps = data.scale.detach().view(-1, 1)
        assert ((theirs[0] - ours[0]).abs() <= 1.01 * steps).all()
    else:
        assert (theirs[0] != ours[0]).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["channel", "dynamic"])
@pytest.mark.parametrize("peer", ["torchao", "brevitas"])
def test_libraries_compute_what_they_are_compared_with(benchmarks, peer, granularity, dtype):
    pytest.importorskip(peer, reason=f"{peer} is not installed: make peers")
    data = case(granularity, dtype, family="fake_quantize").data(CPU)
    ours, theirs = (computed(benchmarks, data, name) for name in ("fastflat", peer))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    steps = data.x.detach().abs().amax(1, keepdim=True).float() / 7 if data.scale is None else data.scale.view(-1, 1)
    # max/7.5 and max/7 are two grids: no further apart than their steps. A narrow grid clips a step earlier.
    assert ((ours[0].float() - theirs[0].float()).abs() <= 1.05 * steps).all()
    if granularity == "channel":
        assert (ours[0] - theirs[0]).abs().gt(0.02 * steps).float().mean() < 0.02
        if dtype is torch.float32 and peer == "torchao":
            scale = ours[2].abs().max().item() / data.factor
            torch.testing.assert_close(ours[2] / data.factor, theirs[2], rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("peer", ["torchao", "brevitas"])
def test_an_absent_library_is_named(benchmarks, monkeypatch, peer):
    real = benchmarks.peers.libraries.importlib.import_module

    def absent(name):
        if name.split(".")[0] == peer:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(benchmarks.peers.libraries.importlib, "import_module", absent)
    with pytest.raises(benchmarks.peers.Unsupported, match=f"{peer} is not installed: make peers"):
        benchmarks.peers.prepare(peer, case("channel", family="fake_quantize").data(CPU))
    with pytest.raises(benchmarks.peers.Unsupported, match="no form of group32"):
        benchmarks.peers.prepare(peer, case("group32", family="fake_quantize").data(CPU))


@pytest.mark.parametrize("granularity", [*NOISY, *FORMATS, *BLOCKS])
def test_ours_holds_its_results_and_no_temporaries(benchmarks, granularity):
    """y beside dx, and scales: nothing is saved but the inputs. Eager code holds its chain. Block formats pass dy on
    as dx."""
    data = case(granularity, size=2**16).data(CPU)
    size = data.x.numel() * data.x.element_size()
    calls = {peer: benchmarks.peers.prepare(peer, data) for peer in ("fastflat", "eager")}
    ours, theirs = (benchmarks.measure.peak_memory(calls[peer], CPU) for peer in calls)
    scales = 1 if data.scale is not None else size // 32
    results = 1 if granularity in BLOCKS else 2
    assert results * size <= ours <= results * size + 2 * scales + 2**13
    assert theirs >= ours
