# SPDX-License-Identifier: Apache-2.0
"""The sharpness family: the compiled CPU kernels against the reference, and the reference against the formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat  # noqa: F401
from fastflat import _ops
from fastflat.backends import reference

from . import comparison as common
from . import list_cases

SUMS = _ops.callable_of("sharpness_sums")
SCALE = _ops.callable_of("sharpness_scale")
ASCENT = _ops.callable_of("sharpness_ascent_")


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("rise", list_cases.RISES, ids=str)
@pytest.mark.parametrize("larger", [False, True])
def test_ascent_has_the_bits_of_the_reference(compiled, storage, rise, larger):
    lists = list_cases.make(storage, list_cases.LARGER if larger else list_cases.SHAPES)
    expected = lists.copy()
    ASCENT(*rise.arguments(lists))
    reference.sharpness_ascent_(*rise.arguments(expected))
    list_cases.assert_same(lists.tensors(), expected.tensors())


@pytest.mark.parametrize("rise", list_cases.RISES, ids=str)
def test_ascent_rounds_bfloat16_by_the_same_draws(compiled, rise):
    rise = dataclasses.replace(rise, seeded=True)
    lists = list_cases.make("bf16", (*list_cases.SHAPES, (2, 3, 4, 5), *list_cases.LARGER))
    expected = lists.copy()
    ASCENT(*rise.arguments(lists))
    reference.sharpness_ascent_(*rise.arguments(expected))
    list_cases.assert_same(lists.tensors(), expected.tensors())


def test_stochastic_rounding_has_the_right_mean():
    """Of w + e between two neighbours in bfloat16: the mean of 2^16 draws, within 5 standard deviations."""
    n = 1 << 16
    w, g = torch.full((n,), 1.0, dtype=torch.bfloat16), torch.full((n,), 1.0, dtype=torch.bfloat16)
    step, fraction = 2.0**-7, 0.3
    scale = torch.tensor([step * fraction], dtype=torch.float64)
    reference.sharpness_ascent_([w], [g], [], None, [], scale, [0], 0.0, torch.tensor([5, 0]))
    assert set(w.unique().tolist()) == {1.0, 1.0 + step}
    share = (w.double().mean().item() - 1.0) / step
    assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / n)


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_sums(compiled, storage, kind):
    shapes = (*list_cases.SHAPES, *list_cases.LARGER)
    lists = list_cases.make(storage, shapes, special=False)
    kinds = [kind if t % 3 else 0 for t in range(len(shapes))]
    ours = SUMS(lists.gs, lists.ws, kinds, 0.25)
    for t, (g, w, k) in enumerate(zip(lists.gs, lists.ws, kinds, strict=True)):
        x, o = g.double().flatten().tolist(), w.double().flatten().tolist()
        want = {
            0: (math.fsum(a * a for a in x), 0.0, 0.0),
            1: (math.fsum(a * a for a in x), math.fsum(map(float.__mul__, x, o)), math.fsum(b * b for b in o)),
            2: (math.fsum(((abs(b) + 0.25) * a) ** 2 for a, b in zip(x, o, strict=True)), 0.0, 0.0),
        }[k]
        # Squares alone are added up in runs of 16 in fp32: 17 roundings of 2^-24.
        size = (1e-13 if k or storage == "fp64" else 1.1e-6) * max(want[0], want[2])
        assert all(abs(a - b) <= size for a, b in zip(ours[t].tolist(), want, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 100),
)
def test_sums_do_not_depend_on_threads(sizes, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    gs = [torch.randn(40 * n, generator=generator) for n in sizes]
    before = torch.get_num_threads()
    expected = SUMS(gs, gs, [1] * len(gs), 0.0)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(SUMS(gs, gs, [1] * len(gs), 0.0), expected)
    finally:
        torch.set_num_threads(before)


def test_sums_see_what_is_not_finite_and_overflow_nothing(on_backend):
    big = torch.full((100,), 3e38)
    tiny = torch.full((100,), 1e-40)
    sums = SUMS([big, tiny], [], [0, 0], 0.0)
    assert sums[0, 0].item() == pytest.approx(9e78, rel=1e-6)
    assert sums[1, 0].item() == pytest.approx(1e-78, rel=1e-3)
    for bad in (math.inf, -math.inf, math.nan):
        g = torch.randn(5000)
        g[4321] = bad
        assert not SUMS([g], [], [0], 0.0)[0, 0].isfinite()


@pytest.mark.parametrize(
    ("squares", "scale", "flag"),
    [([9.0, 16.0], 0.01, 0), ([0.0, 0.0], 0.0, 0), ([1.0, math.inf], 0.0, 1), ([math.nan, 1.0], 0.0, 1)],
)
def test_scale(on_backend, squares, scale, flag):
    sums = torch.tensor([[s, 7.0, 7.0] for s in squares], dtype=torch.float64)
    rho = torch.tensor([0.05, 0.1], dtype=torch.float64)
    found = SCALE(sums, rho, 0.0, False)
    assert found.tolist()[:2] == pytest.approx([scale, 2 * scale], rel=1e-15)
    assert found[3].item() == flag
    with_eps = SCALE(sums, rho, 1e-3, False)
    if scale:
        assert with_eps[0].item() == pytest.approx(0.05 / 5.001, rel=1e-15)
    assert SCALE(sums, rho, 0.0, True)[:2].tolist() == ([0.0, 0.0] if flag else [0.05, 0.1])


def test_layouts_that_are_not_dense(on_backend):
    """A strided weight is changed in place, its neighbours are not."""
    base = torch.arange(24.0).view(4, 6)
    w, g = base[:, ::2], torch.ones(4, 3)
    kept = torch.zeros(64, dtype=torch.uint8)
    ASCENT([w], [g], [], kept, [0], torch.tensor([0.5], dtype=torch.float64), [0], 0.0, None)
    before = torch.arange(24.0).view(4, 6)[:, ::2]
    assert torch.equal(kept[:48].view(torch.float32).view(4, 3), before)
    assert torch.equal(base[:, ::2], before + 0.5)
    assert torch.equal(base[:, 1::2], torch.arange(24.0).view(4, 6)[:, 1::2])


def test_gradient_in_another_layout(on_backend):
    w = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    g = torch.randn(2, 3, 4, 5)
    expected = w + 0.5 * g
    ASCENT([w], [g], [], None, [], torch.tensor([0.5], dtype=torch.float64), [0], 0.0, None)
    common.assert_same_bits(w, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gs": []}, "gs must be as long as the list of weights, 2, got 0"),
        ({"gs": [torch.ones(3), torch.ones(5)]}, "gs must have the shape of the weight"),
        ({"gs": [torch.ones(3), torch.ones(4, dtype=torch.float64)]}, "gs must be float64 exactly where"),
        ({"scale": torch.ones(1, dtype=torch.float64)}, "scale must have at least 2 values, got 1"),
        ({"metric": [0, 0, 0]}, "metric must hold one value, or one a tensor, 2, got 3"),
        ({"at": [0]}, "at must be as long as the list of weights, 2, got 1"),
        ({"at": [0, 8]}, "at must be a multiple of 64 inside the backup, got 8"),
        ({"at": [0, 128]}, "at must be a multiple of 64 inside the backup, got 128"),
        ({"outs": [torch.ones(3), torch.ones(4)]}, "outs and backup must not both be given"),
        ({"state": torch.ones(2)}, "state must be int64"),
    ],
)
def test_raw_ops_refuse_what_would_corrupt_memory(compiled, change, message):
    ws = [torch.ones(3), torch.ones(4)]
    call = {
        "ws": ws,
        "gs": [torch.ones(3), torch.ones(4)],
        "outs": [],
        "backup": torch.zeros(128, dtype=torch.uint8),
        "at": [0, 64],
        "scale": torch.ones(2, dtype=torch.float64),
        "metric": [0],
        "eta": 0.0,
        "state": None,
    }
    with pytest.raises(RuntimeError, match=message):
        ASCENT(*{**call, **change}.values())
    assert all(torch.equal(w, torch.ones_like(w)) for w in ws)


def test_opcheck():
    lists = list_cases.make("fp32", ((3,), (4, 5)), special=False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastflat.sharpness_sums.default, (lists.gs, lists.ws, [1, 2], 0.0), test_utils=tests
    )
    sums = torch.ones(2, 3, dtype=torch.float64)
    rho = torch.ones(1, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastflat.sharpness_scale.default, (sums, rho, 0.0, False), test_utils=tests)
    rise = list_cases.Rise("backup", 1).arguments(lists)
    torch.library.opcheck(torch.ops.fastflat.sharpness_ascent_.default, rise, test_utils=tests)
