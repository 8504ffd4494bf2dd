# SPDX-License-Identifier: Apache-2.0
"""The list kernels in Triton's interpreter: maps against the reference, sums against the launches for one tensor."""

import pytest
import torch

from fastflat import _ops
from fastflat._spec import TINY
from fastflat.backends import reference
from fastflat.triton_kernels import fake_quantize, fake_quantize_list

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HARD = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-45, 0.5, 1.5, -3.5, 3e38]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PLACES = [
    ((3, 341), -1, 0),
    ((), -1, 0),
    ((0, 4), 1, 0),
    ((5, 37), 0, 0),
    ((2, 1100), 0, 0),
    ((6, 4, 3, 3), 0, 0),
    ((37, 5), 1, 0),
    ((2, 3, 16, 8), 1, 0),
    ((5, 96), -1, 32),
    ((4, 21), -1, 7),
]


def same(got, want):
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    bits = BITS[want.element_size()]
    differ = (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())
    assert not differ.any()


def lists(seed, dtypes=DTYPES, zero=True):
    torch.manual_seed(seed)
    xs, gys, scales, zeros, grids = [], [], [], [], []
    for i, (shape, axis, group) in enumerate(PLACES):
        dtype = dtypes[(i + seed) % len(dtypes)]
        x = (torch.randn(shape) * 2).to(dtype)
        x.view(-1)[: len(HARD)] = torch.tensor(HARD[: min(len(HARD), x.numel())]).to(dtype)
        parameters = _ops.scale_shape(x.shape, axis, group)
        scales.append(torch.rand(parameters, dtype=_ops.compute_dtype(dtype)) + 0.05)
        zeros.append(torch.randn_like(scales[-1]) * 3 if zero and i % 3 == 0 else None)
        gys.append(torch.randn(shape).to(dtype))
        xs.append(x)
        grids.append((-8, 7, axis, group, TINY, (0, 1, 6, 8 + 32 + 64 + 128)[(i + seed) % 4]))
    return gys, xs, scales, zeros if zero else [], tuple(map(list, zip(*grids, strict=True)))


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_forward(seed, zero):
    _, xs, scales, zeros, grids = lists(seed, zero=zero)
    for got, want in zip(
        fake_quantize_list.fake_quantize_list(xs, scales, zeros, *grids),
        reference.fake_quantize_list(xs, scales, zeros, *grids),
        strict=True,
    ):
        same(got, want)


def test_layouts_and_cast():
    x = torch.randn(4, 6, 5, 5)
    xs = [x, x.to(memory_format=torch.channels_last), x[:, :, ::2], torch.randn(601)[1:].view(4, 6, 5, 5)]
    scales = [torch.rand(6) + 0.1 for _ in xs]
    grids = tuple([v] * len(xs) for v in (-8, 7, 1, 0, TINY, 0))
    for got, want in zip(
        fake_quantize_list.fake_quantize_list(xs, scales, [], *grids, torch.bfloat16),
        reference.fake_quantize_list(xs, scales, [], *grids, torch.bfloat16),
        strict=True,
    ):
        same(got, want)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_backward(seed, zero):
    gys, xs, scales, zeros, grids = lists(seed, zero=zero)
    needs, factors = [(i + seed) % 2 for i in range(len(xs))], [0.1 * (i + 1) for i in range(len(xs))]
    gxs, gss, gzs = fake_quantize_list.fake_quantize_list_bwd(gys, xs, scales, zeros, *grids, factors, needs)
    want = reference.fake_quantize_list_bwd(gys, xs, scales, zeros, *grids, factors, needs)
    for got, expected in zip(gxs, want[0], strict=True):
        same(got, expected)
    assert (len(gss), len(gzs)) == (len(want[1]), len(want[2]))
    calls = zip(gys, xs, scales, zeros or [None] * len(xs), *grids, factors, needs, strict=True)
    for i, call in enumerate(calls):
        _, gs, gz = fake_quantize.fake_quantize_bwd(*call)
        same(gss[i], gs)
        if gzs:
            same(gzs[i], gz)


def test_no_scale_needed_and_no_tensors():
    gys, xs, scales, _, grids = lists(0, zero=False)
    gxs, gss, gzs = fake_quantize_list.fake_quantize_list_bwd(gys, xs, scales, [], *grids, [1.0] * 10, [0] * 10)
    for got, want in zip(
        gxs,
        reference.fake_quantize_list_bwd(gys, xs, scales, [], *grids, [1.0] * 10, [0] * 10)[0],
        strict=True,
    ):
        same(got, want)
    assert gss == gzs == []
    assert fake_quantize_list.fake_quantize_list([], [], [], [], [], [], [], [], []) == []


def test_launches_are_few():
    """Tensors of one form are one launch."""
    launches = []
    kernel = fake_quantize_list._fake_quantize_list_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    fake_quantize_list._fake_quantize_list_kernel = Counting()
    try:
        xs = [torch.randn(3) for _ in range(50)]
        grids = tuple([v] * 50 for v in (-8, 7, -1, 0, TINY, 0))
        fake_quantize_list.fake_quantize_list(xs, [torch.ones(())] * 50, [], *grids)
    finally:
        fake_quantize_list._fake_quantize_list_kernel = kernel
    assert launches == [(50,)]
