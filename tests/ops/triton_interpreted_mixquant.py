# SPDX-License-Identifier: Apache-2.0
"""The mixquant kernels in Triton's interpreter, against the reference: maps by bits, sums up to their order.
Run by test_triton_interpreter.py in a process of its own."""

import pytest
import torch

from fastflat import _ops
from fastflat._spec import TINY
from fastflat.backends import reference
from fastflat.backends.reference import layout
from fastflat.triton_kernels import _launch, _mixed_sums, mixquant

from . import triton_interpreted as common

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WIDTHS = (2, 4, 8, 1, 3, 16, 5, 6)


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """New tensors hold NaN until a kernel writes them."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def candidates(x, axis, group, count):
    """scale, qmin, qmax, weight; factor; tangents of scale and weight. One weight is 0 where there are three."""
    compute = _ops.compute_dtype(x.dtype)
    shape = (count, *_ops.scale_shape(x.shape, axis, group))
    scale = (torch.rand(shape, dtype=torch.float64) + 0.1).to(compute)
    low = torch.tensor([-(2 ** (b - 1)) for b in WIDTHS[:count]], dtype=compute)
    high = torch.tensor([2 ** (b - 1) - 1 for b in WIDTHS[:count]], dtype=compute)
    weight = torch.randn(count, dtype=compute)
    if count > 2:
        weight[1] = 0
        scale[1] = float("inf")
    return (scale, low, high, weight), torch.rand(count, dtype=compute), torch.randn_like(scale), torch.randn_like(low)


def check(x, axis, group, rules, count, dtype=None):
    mixture, factor, ts, tw = candidates(x, axis, group, count)
    grid = (axis, group, TINY, rules)
    common.same(mixquant.mixquant(x, *mixture, *grid, dtype), reference.mixquant(x, *mixture, *grid, dtype))
    gy = torch.randn(x.shape).to(dtype or x.dtype)
    for tangents in ((gy, ts, tw), (gy.to(x.dtype), None, tw), (None, ts, None)):
        args = (*tangents, x, *mixture, factor, *grid, dtype)
        common.same(mixquant.mixquant_jvp(*args), reference.mixquant_jvp(*args))
    args = (gy, x, *mixture, factor, *grid)
    got, want = mixquant.mixquant_bwd(*args), reference.mixquant_bwd(*args)
    common.same(got[0], want[0])
    # Magnitudes of the terms from the reference itself: the tangents of one candidate alone.
    for j in range(count):
        alone = tuple(p[j : j + 1] for p in (*mixture[:3], torch.ones_like(factor), torch.ones_like(factor)))
        wide, wide_gy = x.to(mixture[0].dtype), gy.to(mixture[0].dtype).abs()
        for k, tangents in (
            (1, (None, torch.ones_like(ts[:1]), None)),
            (2, (None, None, torch.ones(1, dtype=tw.dtype))),
        ):
            term = wide_gy * reference.mixquant_jvp(*tangents, wide, *alone, *grid).abs()
            if k == 1:
                total = layout.sum_to_scale(layout.blocked(term, group), x, axis, group, ts.dtype)
                common.close(got[k][j], want[k][j], total * (mixture[3][j] * factor[j]).abs())
            else:
                common.close(got[k][j], want[k][j], term.sum())


@pytest.mark.parametrize("place", common.PLACES)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
def test_every_place_and_type(place, dtype):
    shape, axis, group = common.PLACES[place]
    for rules in (0, 255) if dtype == torch.float32 else (0,):
        check(common.data(shape, dtype), axis, group, rules, 3)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_any_number_of_candidates(count):
    for place in ("tensor", "columns", "group"):
        shape, axis, group = common.PLACES[place]
        check(common.data(shape, torch.float32), axis, group, 0, count)


@pytest.mark.parametrize("result", [torch.bfloat16, torch.float16])
def test_cast_in_the_same_pass(result):
    check(common.data((3, 70), torch.float32), 0, 0, 0, 2, result)


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit offsets", "64-bit offsets"])
@pytest.mark.parametrize("place", ["tensor", "long rows", "columns", "middle", "wide middle", "odd group"])
def test_any_division_of_the_work(place, wide, monkeypatch):
    monkeypatch.setattr(_launch, "BLOCK", 16)
    monkeypatch.setattr(_mixed_sums, "TILE_ROWS", 8)
    monkeypatch.setattr(_mixed_sums, "TILE_COLUMNS", 4)
    monkeypatch.setattr(_launch, "_NARROW_LIMIT", 0 if wide else 2**31)
    shape, axis, group = common.PLACES[place]
    check(common.data(shape, torch.float32), axis, group, 0, 2)


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_empty(shape):
    check(torch.empty(shape), -1, 0, 0, 2)


def test_layouts():
    x = common.data((2, 6, 5, 4), torch.float32)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, :, ::2]):
        check(view, 1, 0, 0, 2)
    check(x.transpose(0, 2), -1, 2, 0, 2)
