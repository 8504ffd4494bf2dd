# SPDX-License-Identifier: Apache-2.0
"""The weight-normalising quantizer: the raw ops against the reference, the published formula, its edges."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat as ff
from fastflat._ops import compute_dtype
from fastflat.backends import reference

from . import comparison as common

ops = torch.ops.fastflat
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{str(p[0])[6:]}-{str(p[1])[6:]}")
LAYOUTS = [
    ((), -1),
    ((1,), 0),
    ((33,), -1),
    ((33,), 0),
    ((5, 3, 7), 1),
    ((70, 515), 0),
    ((70, 515), 1),
    ((3, 130, 67), 1),
    ((40001,), -1),
    ((0,), -1),
    ((0, 4), 1),
    ((4, 0), 0),
]
EPS = 1e-8


def compare(w, gy, mean, std, clip, levels, axis, result):
    """The three maps as the dispatcher finds them, against the reference: bits; the sum of gclip to rounding."""
    point = (w, mean, std, clip, levels, axis, EPS)
    common.assert_same_bits(ops.liq(*point, result), reference.liq(*point, result))
    tw, tclip = gy.to(w.dtype), torch.full_like(clip, -0.7)
    for tangents in ((tw, tclip), (tw, None), (None, tclip), (None, None)):
        common.assert_same_bits(ops.liq_jvp(*tangents, *point, result), reference.liq_jvp(*tangents, *point, result))
    (gw, gclip), (wanted_w, wanted_clip) = (f.liq_bwd(gy, *point) for f in (ops, reference))
    common.assert_same_bits(gw, wanted_w)
    bound = 32 * torch.finfo(clip.dtype).eps * (gy.double().abs().sum() + 1)
    same = bool(gclip == wanted_clip) or bool(gclip.isnan() & wanted_clip.isnan())
    assert (gclip.dtype, gclip.shape) == (wanted_clip.dtype, wanted_clip.shape)
    assert same or (gclip - wanted_clip).abs().double() <= bound


@every_pair
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
def test_maps_have_the_bits_of_the_reference(pair, bits, special):
    compute = compute_dtype(pair[0])
    for seed, (shape, axis) in enumerate(LAYOUTS):
        w = common.random_data(shape, pair[0], seed, special)
        gy = common.random_data(shape, pair[1], seed + 50, special=False)
        moments = [torch.full((), v, dtype=compute) for v in (0.1, 1.9)]
        if axis >= 0:
            moments = [torch.linspace(v, 2 * v, w.shape[axis], dtype=compute) for v in (0.1, 1.9)]
            # A channel of constant weights, and one with NaN in it.
            for value, channel in ((0.0, 0), (math.nan, 2)):
                moments[1][channel : channel + 1] = value
        for clip in (1.7, 0.0, math.inf) if special else (1.7,):
            compare(w, gy, *moments, torch.tensor(clip, dtype=compute), 2**bits - 1, axis, pair[1])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    pair=st.sampled_from(PAIRS),
    axis=st.integers(-1, 3),
    bits=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_maps_have_the_bits_of_the_reference_anywhere(shape, pair, axis, bits, seed):
    axis = min(axis, len(shape) - 1)
    w = common.random_data(shape, pair[0], seed)
    gy = common.random_data(shape, pair[1], seed + 1, special=False)
    mean, std = ops.liq_moments(common.random_data(shape, pair[0], seed + 2, special=False), axis)
    compare(w, gy, mean, std, torch.tensor(1.3, dtype=mean.dtype), 2**bits - 1, axis, pair[1])


@pytest.mark.parametrize("axis", [-1, 0, 1, 3])
def test_layouts(axis):
    w, gy = (common.random_data((4, 6, 5, 3), seed=s, special=False) for s in (3, 4))
    clip = torch.tensor(1.5)
    want = ops.liq_moments(w, axis)
    for view in (
        w.to(memory_format=torch.channels_last),
        torch.stack([w, w], -1)[..., 0],
        w.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        mean, std = ops.liq_moments(view, axis)
        torch.testing.assert_close((mean, std), want, rtol=1e-6, atol=1e-7)
        compare(view, gy, mean, std, clip, 7, axis, torch.float32)


@pytest.mark.parametrize("shift", [0.0, 1.0, 1e4, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_keep_their_digits_with_a_large_mean(on_backend, dtype, shift):
    generator = torch.Generator().manual_seed(0)
    for shape, axis in (((40001,), -1), ((70, 515), 0), ((70, 515), 1), ((3, 130, 67), 1), ((3, 5), 1)):
        w = (torch.randn(shape, generator=generator, dtype=torch.float64) + shift).to(dtype)
        mean, std = ops.liq_moments(w, axis)
        # numpy's long double has 64 bits of mantissa.
        exact = w.double().numpy().astype(numpy.longdouble)
        along = None if axis < 0 else tuple(d for d in range(w.dim()) if d != axis)
        wanted = (exact.mean(along), exact.std(along, ddof=1))
        unit = torch.finfo(mean.dtype).eps
        largest = float(abs(exact).max())
        for got, want in zip((mean, std), wanted):
            error = abs(got.double().numpy() - want.astype(numpy.float64))
            narrow = unit * abs(want.astype(numpy.float64)) + 1e-15 * largest
            assert (error <= (narrow if dtype is not torch.float64 else 1e-13 * largest)).all()


@pytest.mark.parametrize(("shape", "axis"), [((300001,), -1), ((70, 3001), 0), ((30001, 7), 1)])
def test_sums_do_not_depend_on_threads(shape, axis):
    w, gy, clip = torch.randn(shape), torch.randn(shape), torch.tensor(1.4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            moments = ops.liq_moments(w, axis)
            results.append((*moments, *ops.liq_bwd(gy, w, *moments, clip, 15, axis, EPS)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_value_is_the_published_formula(on_backend, bits, axis):
    torch.manual_seed(0)
    w, clip = torch.randn(20, 30, dtype=torch.float64) * 3 + 1, torch.tensor(2.1, dtype=torch.float64)
    along = {} if axis is None else {"dim": 1 - axis % 2, "keepdim": True}
    v = (w - w.mean(**along)) / w.std(**along)
    count = 2**bits - 1
    half = (v / clip).clamp(-1, 1).add(1).div(2)
    want = clip * (half.mul(count).round().div(count).mul(2) - 1)
    y = ff.liq_quantize(w, clip, bits=bits, axis=axis)
    assert len(y.unique()) <= 2**bits
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("bits", "value"), [(1, -1.5), (2, 0.5), (3, 1.5 / 7), (4, 0.1)])
@pytest.mark.parametrize("constant", [0.0, 0.3, -7.1])
def test_constant_weights_go_to_the_even_code(on_backend, bits, value, constant):
    w = torch.full((5, 9), constant, requires_grad=True)
    clip = torch.tensor(1.5, requires_grad=True)
    for axis in (None, 0):
        y = ff.liq_quantize(w, clip, bits=bits, axis=axis)
        torch.testing.assert_close(y, torch.full((5, 9), value), rtol=1e-6, atol=0)
        gw, gclip = torch.autograd.grad(y.sum(), (w, clip))
        assert torch.isfinite(gw).all()
        torch.testing.assert_close(gclip, torch.tensor(45 * value / 1.5), rtol=1e-5, atol=0)


def test_edges(on_backend):
    clip = torch.tensor(1.5)
    one = ff.liq_quantize(torch.tensor([3.0]), clip, bits=2)
    torch.testing.assert_close(one, torch.tensor([0.5]), rtol=1e-6, atol=0)
    for shape, axis in (((0,), None), ((4, 0), 0), ((0, 4), 1), ((0, 4), None)):
        w = torch.empty(shape, requires_grad=True)
        limit = clip.clone().requires_grad_()
        y = ff.liq_quantize(w, limit, bits=2, axis=axis)
        y.sum().backward()
        assert y.shape == w.grad.shape == shape
        assert limit.grad == 0
    bad = torch.randn(3, 8)
    bad[1, 3], bad[2, 0] = math.nan, math.inf
    y = ff.liq_quantize(bad, clip, bits=2, axis=0)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()
    held = ff.liq_quantize(bad[0], torch.tensor(-1.0), bits=2)
    assert (held.abs() <= EPS).all(), "clip is held at eps"


def test_a_cast_in_the_same_pass(on_backend):
    w, clip = torch.randn(6, 40, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    y = ff.liq_quantize(w, clip, bits=4, dtype=torch.bfloat16)
    assert torch.equal(y, ff.liq_quantize(w, clip, bits=4).bfloat16())
    gy = torch.randn(6, 40).bfloat16()
    cast = torch.autograd.grad(y, (w, clip), gy)
    plain = torch.autograd.grad(ff.liq_quantize(w, clip, bits=4), (w, clip), gy.float())
    assert all(torch.equal(a, b) for a, b in zip(cast, plain))


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"w": [1.0]}, "w must be a tensor, got list"),
        ({"w": torch.ones(3, dtype=torch.int32)}, "w must be float32, bfloat16, float16 or float64"),
        ({"axis": 2}, r"axis must lie in \[-2, 1\] for w of shape \[4, 6\], got 2"),
        ({"bits": 0}, r"bits must lie in \[1, 16\], got 0"),
        ({"bits": 17}, r"bits must lie in \[1, 16\], got 17"),
        ({"bits": 2.0}, "bits must be an int, got float"),
        ({"clip": 1.5}, r"clip must be a tensor, got float; write torch.tensor\(1.5\)"),
        ({"clip": torch.ones(1)}, r"clip must have shape \[\], got \[1\]"),
        ({"clip": torch.ones((), dtype=torch.float64)}, "clip must be torch.float32, got torch.float64"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"dtype": torch.float64}, "dtype must be one of"),
    ],
)
def test_bad_input_in_one_line(kwargs, text):
    arguments = {"w": torch.ones(4, 6), "clip": torch.tensor(1.0), "bits": 4, **kwargs}
    with pytest.raises((TypeError, ValueError), match=f"fastflat::liq_quantize: {text}") as failure:
        ff.liq_quantize(arguments.pop("w"), arguments.pop("clip"), **arguments)
    assert "\n" not in str(failure.value)


def test_opcheck():
    w, clip = torch.randn(4, 6), torch.tensor(1.5)
    mean, std = torch.zeros(4), torch.ones(4)
    point = (w, mean, std, clip, 15, 0, EPS)
    for name, args in (
        ("liq_moments", (w, 0)),
        ("liq", (*point, torch.bfloat16)),
        ("liq_bwd", (w, *point)),
        ("liq_jvp", (w, None, *point)),
    ):
        torch.library.opcheck(getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor"))
