# SPDX-License-Identifier: Apache-2.0
"""Lists, binarization and the weight-normalising quantizer in the benchmark: peers compute the same."""

import math
from pathlib import Path

import pytest
import torch

from fastflat.cli import bench

CPU = torch.device("cpu")


def case(family, dtype=torch.float32, size=2**14, **options):
    return next(iter(bench.package(f"cases.{family}").cases([size], [dtype], **options)))


def test_every_family_with_cases_is_offered(benchmarks):
    folder = bench.package("cases").__path__[0]

    modules = {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}
    assert modules == {*bench._FAMILIES, *bench._STEPS} == set(benchmarks.peers.PEERS) - {*bench._PRODUCTS}


def test_resnet18_has_its_weights():
    module = bench.package("cases.fake_quantize_list")
    assert len(module.RESNET18) == 21
    assert sum(map(math.prod, module.RESNET18)) == 11_678_912  # its 11,689,512 parameters less biases and norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_compute_the_same(benchmarks, dtype):
    data = case("fake_quantize_list", dtype, granularities=["small"]).data(CPU)
    assert [x.shape for x in data.xs] == [(4096,)] * 4
    assert torch.equal(torch.cat([x.detach() for x in data.xs]), data.x.view(-1))
    found = {}
    for peer in ("fastflat", "each", "eager"):
        ys = benchmarks.peers.PEERS["fake_quantize_list"][peer](data)(data.xs, data.scales)
        found[peer] = [*ys, *torch.autograd.grad(ys, [*data.xs, *data.scales], data.gys)]
    assert all(torch.equal(a, b) for a, b in zip(found["fastflat"], found["each"], strict=True))
    if dtype is torch.float32:
        assert all(torch.equal(a, b) for a, b in zip(found["fastflat"][:4], found["eager"][:4], strict=True))
        for a, b in zip(found["fastflat"][4:], found["eager"][4:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_calls_of_lists_leave_no_gradient(benchmarks):
    data = case("fake_quantize_list", granularities=["small"]).data(CPU)
    for peer in benchmarks.peers.PEERS["fake_quantize_list"]:
        benchmarks.peers.prepare(peer, data)()
    assert all(leaf.grad is None for leaf in (*data.xs, *data.scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["binarize", "liq"])
def test_eager_forms_are_ours(benchmarks, family, dtype):
    data = case(family, dtype).data(CPU)
    inputs = [t for t in (data.x, data.scale) if t is not None]
    found = []
    for peer in ("fastflat", "eager"):
        y = benchmarks.peers.PEERS[family][peer](data)(data.x, data.scale)
        found.append([y, *torch.autograd.grad(y, inputs, data.gy)])
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    off_grid = (found[0][0] - found[1][0]).abs() > 0.1
    assert off_grid.float().mean() < 1e-3  # moments of fp32 and of fp64 part at borders of the grid
    for a, b in zip(*found, strict=True):
        close = torch.isclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * b.abs().max().item())
        assert close.float().mean() > 0.999


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("family", ["binarize", "liq"])
def test_compiled_forms_run(benchmarks, family):
    data = case(family, size=2**12).data(CPU)
    ours, theirs = (benchmarks.peers.PEERS[family][p](data)(data.x, data.scale) for p in ("fastflat", "compile"))
    assert ((ours - theirs).abs() > 1e-4).float().mean() < 0.01


def test_network_has_the_parameters_of_its_list():
    shapes = tuple(tuple(p.shape) for p in bench.package("networks").ResNet18().parameters())
    listed = bench.package("cases.sharpness").LISTS["resnet18"]
    assert sorted(shapes) == sorted(listed)
    assert sum(map(math.prod, shapes)) == 11_689_512


def test_vector_work_is_the_same_by_matrices_and_slice_by_slice(benchmarks):
    module = bench.package("cases.vectors")
    for name in module.GRANULARITIES:
        found = []
        for peer in ("fastflat", "matrices", "loop"):
            data = next(module.cases([1000], [torch.float64], [name])).data(CPU)
            result = benchmarks.peers.PEERS["vectors"][peer](data)(data.x, data.scale)
            if name == "signs":
                result = torch.cat(result) if peer == "loop" else result
                assert set(result.unique().tolist()) == {-1.0, 1.0}
                continue
            found.append([torch.as_tensor(result, dtype=torch.float64), data.x])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tangents_of_rows_are_those_of_stock_operations(benchmarks, dtype):
    module = bench.package("cases.row_tangents")
    for case in module.cases([2000], [dtype], [n for n in module.GRANULARITIES if "50257" not in n]):
        data, tuples = case.data(CPU), []
        for peer in ("fastflat", "stock"):
            found = benchmarks.peers.PEERS["row_tangents"][peer](data)(data.x, data.scale)
            tuples.append((found,) if isinstance(found, torch.Tensor) else found)
        for ours, theirs in zip(*tuples, strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_over_logits_are_those_of_torch(benchmarks, dtype):
    for case in bench.package("cases.logits").cases([6000], [dtype]):
        data, results = case.data(CPU), []
        leaves = [t for t in (data.x, data.scale) if t is not None and t.requires_grad]
        for peer in ("fastflat", "eager"):
            found = benchmarks.peers.PEERS["logits"][peer](data)(data.x, data.scale)
            found = found if isinstance(found, tuple) else (found,)
            results.append([*found, *(torch.autograd.grad(found, leaves, data.gy) if leaves else ())])
        for ours, theirs in zip(*results, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_steps_of_attacks_are_those_of_torch(benchmarks):
    module = bench.package("cases.inputs")
    for case in module.cases([20000], [torch.float64], ["pgd-linf", "pgd-l2"]):
        data = case.data(CPU)
        ours, theirs = (benchmarks.peers.PEERS["inputs"][peer](data)(data.x, None) for peer in ("fastflat", "eager"))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (case,) = module.cases([20000], [torch.float32], ["noise-masked"])
    data = case.data(CPU)
    for peer in ("fastflat", "eager"):
        noisy = benchmarks.peers.PEERS["inputs"][peer](data)(data.x, None)
        assert abs(((noisy != data.x).double().mean()) - module.KEEP) < 0.01


def test_regularisers_of_weights_are_those_of_torch(benchmarks):
    for case in bench.package("cases.weight_norms").cases([6000], [torch.float64]):
        data, results = case.data(CPU), []
        leaves = [t for t in (data.x, data.scale) if t is not None]
        for peer in ("fastflat", "eager"):
            found = benchmarks.peers.PEERS["weight_norms"][peer](data)(data.x, data.scale)
            results.append([found, *torch.autograd.grad(found, leaves, data.gy)])
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


def test_compressed_gradients_are_those_of_torch(benchmarks):
    module = bench.package("cases.compressors")
    for case in module.cases([2**14], [torch.float32]):
        found = {}
        for peer in ("fastflat", "eager"):
            data = case.data(CPU)
            sent = benchmarks.peers.PEERS["compressors"][peer](data)(data.x, None)
            found[peer] = (sent.sort().values if case.granularity == "topk" else sent, data.error)
        (ours, left), (theirs, rest) = found["fastflat"], found["eager"]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if case.granularity in ("sign", "topk"):  # the others draw
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(left, rest)
        else:
            assert abs(left.square().mean() / rest.square().mean() - 1) < 0.1


def test_tangents_are_the_same_by_operators_of_torch(benchmarks):
    module = bench.package("cases.tangents")
    for case in module.cases([1000], [torch.float64]):
        data = case.data(CPU)
        found = [benchmarks.peers.PEERS["tangents"][peer](data)(data.x, None) for peer in ("fastflat", "eager")]
        results = [[t for t in (r if isinstance(r, tuple) else (r,)) if t.numel()] for r in found]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
