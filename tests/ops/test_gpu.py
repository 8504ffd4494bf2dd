# SPDX-License-Identifier: Apache-2.0
"""The same calls on a GPU: CUDA and Triton kernels against the reference on the CPU, streams, graphs, repeatability.

Their twins that run without a GPU: tests/emulator (CUDA) and test_triton_interpreter.py (Triton).
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fastflat as ff
from fastflat.backends import backend, kernels, reference, unavailable

from . import comparison as common
from .test_fake_quantize import DTYPES, EPS, LAYOUTS, arguments, assert_close_sums

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def ops(request):
    """The raw ops of one GPU backend as callables."""
    reason = unavailable(request.param, "cuda")
    if reason:
        pytest.skip(reason)
    with backend(request.param):
        yield kernels("cuda")


def on(device, *values):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def check_on(device, ops, x, scale, zero_point, gy, ts, tz, grid, dtype=None):
    """Every op of the family computed on `device`, against the reference on the CPU."""
    out = dtype or x.dtype
    gy = gy.to(out)
    tz = None if zero_point is None else tz
    moved = on(device, x, scale, zero_point)
    y = ops.fake_quantize(*moved, *grid, dtype)
    common.assert_same_bits(y.cpu(), reference.fake_quantize(x, scale, zero_point, *grid, dtype))
    ty = ops.fake_quantize_jvp(*on(device, gy, ts, tz), *moved, *grid, 0.3, dtype)
    expected = reference.fake_quantize_jvp(gy, ts, tz, x, scale, zero_point, *grid, 0.3, dtype)
    common.assert_same_bits(ty.cpu(), expected)
    gx, gs, gz = ops.fake_quantize_bwd(*on(device, gy), *moved, *grid, 0.3, True)
    ex, es, ez = reference.fake_quantize_bwd(gy, x, scale, zero_point, *grid, 0.3, True)
    common.assert_same_bits(gx.cpu(), ex)
    assert_close_sums((gs.cpu(), gz.cpu()), (es, ez), gy, x, scale, zero_point, grid)
    again = ops.fake_quantize_bwd(*on(device, gy), *moved, *grid, 0.3, True)
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(again, (gx, gs, gz)))
    y, absmax = ops.fake_quantize_absmax(moved[0], *grid, dtype)
    ey, emax = reference.fake_quantize_absmax(x, *grid, dtype)
    common.assert_same_bits(absmax.cpu(), emax)
    common.assert_same_bits(y.cpu(), ey)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(ops, layout, dtype):
    x, scale, zero_point, gy, ts, tz = arguments(*layout, dtype)
    for rules, zero in itertools.product((0, 1, 2 + 4, 8 + 32 + 64 + 128), (None, zero_point)):
        check_on("cuda", ops, x, scale, zero, gy, ts, tz, (-8, 7, *layout[1:], EPS, rules))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cast_in_the_same_pass(ops, layout, dtype):
    check_on("cuda", ops, *arguments(*layout, torch.float32), (0, 15, *layout[1:], EPS, 0), dtype)


@pytest.mark.parametrize("rules", range(0, 256, 5))
def test_rules(ops, rules):
    x, scale, zero_point, gy, ts, tz = arguments((9, 40), 1, 0, torch.float32, seed=rules)
    for zero in (None, zero_point):
        check_on("cuda", ops, x, scale, zero, gy, ts, tz, (-8, 7, 1, 0, EPS, rules))


def test_memory_layouts(ops):
    x, scale, zero_point, _, ts, tz = arguments((4, 6, 5, 8), 1, 0, torch.float32)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[..., ::2], x[1:], shifted):
        gy = torch.randn(view.shape)
        check_on("cuda", ops, view, scale, zero_point, gy, ts, tz, (-8, 7, 1, 0, EPS, 0))


def test_a_copy_of_the_whole_grid_of_launches(ops):
    """Large enough that every kernel takes many blocks and its second stage."""
    for place in (((2**24 + 5,), -1, 0), ((64, 2**17 + 3), 0, 0), ((2**16, 96), 1, 0), ((2**12, 4096), -1, 128)):
        x, scale, _, gy, ts, tz = arguments(*place, torch.bfloat16, special=False)
        check_on("cuda", ops, x, scale, None, gy, ts, tz, (-8, 7, *place[1:], EPS, 0))


def test_current_stream(ops):
    """Work queued on a side stream is seen by the kernel launched there."""
    side = torch.cuda.Stream()
    x = torch.zeros(2**22, device="cuda")
    s = torch.tensor(0.5, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)
        x.fill_(1.0)
        y = ops.fake_quantize(x, s, None, -8, 7, -1, 0, EPS, 0)
    side.synchronize()
    assert bool((y == 1.0).all())


def test_cuda_graph_without_a_synchronisation(ops):
    """Forward and backward can be captured, which any host synchronisation would forbid; a replay sees new data."""
    spec = ff.QuantSpec.lsq(4, axis=0)
    x = torch.randn(64, 1000, device="cuda", requires_grad=True)
    s = torch.full((64,), 0.2, device="cuda", requires_grad=True)
    gy = torch.randn(64, 1000, device="cuda")

    def step():
        return torch.autograd.grad(ff.fake_quantize(x, s, spec=spec), (x, s), gy)

    warm_up = torch.cuda.Stream()
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(captured, step()):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(ops):
    n = 2**31 + 3
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.tensor([0.26, -7.0, 100.0], device="cuda")
    s = torch.tensor(0.5, device="cuda")
    y = ops.fake_quantize(x, s, None, -8, 7, -1, 0, EPS, 0)
    assert y[-3:].tolist() == [0.5, -4.0, 3.5]
    del y
    gx, gs, _ = ops.fake_quantize_bwd(x, x, s, None, -8, 7, -1, 0, EPS, 0, 1.0, True)
    assert gx[-3:].tolist() == [torch.tensor(0.26).bfloat16().item(), 0.0, 0.0]
    assert bool(torch.isfinite(gs))
