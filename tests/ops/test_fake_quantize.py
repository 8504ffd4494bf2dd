# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels against the reference: bits of maps, sums to rounding, layouts, order, bad input."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat as ff
from fastflat._ops import compute_dtype, scale_shape
from fastflat.backends import reference
from fastflat.backends.reference import layout

from . import comparison as common

ops = torch.ops.fastflat
pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EPS = 2.0**-126
#: (shape, axis, group): every way in which elements meet scales, around the block sizes of the kernels.
LAYOUTS = [
    ((), -1, 0),
    ((0,), -1, 0),
    ((0, 4), 1, 0),
    ((1,), 0, 0),
    ((7,), -1, 0),
    ((1000,), -1, 0),
    ((70001,), -1, 0),
    ((5, 3, 3, 3), 0, 0),
    ((70, 27), 0, 0),
    ((70, 64), 0, 0),
    ((600, 30), 1, 0),
    ((3, 5, 7, 7), 1, 0),
    ((3, 5, 17, 9), 1, 0),
    ((2, 3, 130, 257), 1, 0),
    ((200, 40, 30), 1, 0),
    ((6, 64), -1, 16),
    ((3, 4, 96), -1, 3),
    ((6, 256), -1, 128),
]


def arguments(shape, axis, group, dtype, seed=0, special=True):
    """Data, parameters, cotangent and tangents of one call."""
    compute = compute_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    x = common.random_data(shape, dtype, seed, special)
    parameters = scale_shape(x.shape, axis, group)
    scale = torch.rand(parameters, generator=generator, dtype=compute) + 0.05
    zero_point = torch.randn(parameters, generator=generator, dtype=compute) * 3
    gy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    ts, tz = (torch.randn(parameters, generator=generator, dtype=compute) for _ in range(2))
    return x, scale, zero_point, gy, ts, tz


def assert_close_sums(actual, expected, gy, x, scale, zero_point, grid, factor=0.3):
    """Gradients of scale and zero-point agree to the rounding of their terms: fp32 lanes of at most 256 additions, then
    double. Where finite terms may overflow a lane there is nothing to compare."""
    _, _, axis, group, *_ = grid
    eps, most = torch.finfo(scale.dtype).eps, torch.finfo(scale.dtype).max
    # Of each sum, from that of |gy| |t|: t is at most the width of the grid where x is in range.
    width = float(grid[1] - grid[0] + 32)
    sizes = layout.blocked(gy, group).abs().to(scale.dtype) * width
    terms = layout.sum_to_scale(sizes, x, axis, group, scale.dtype)
    share = reference.fake_quantize_jvp(
        None, torch.ones_like(scale), None, x, scale, zero_point, *grid, factor, scale.dtype
    )
    shares = (gy.double() * share.double()).abs()
    shares = layout.blocked(torch.where(shares.isfinite(), shares, 0.0), group)
    overflow = layout.sum_to_scale(shares, x, axis, group, torch.float64) > most / 16
    compared = ((actual[0], expected[0], terms, ~overflow), (actual[1], expected[1], terms * scale, True))
    for got, want, magnitude, sure in compared[: 1 if zero_point is None else 2]:
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        bound = 64 * eps * magnitude + 4 * eps * want.abs()
        assert torch.equal(got.isnan() & sure, want.isnan() & sure)
        assert bool(((got - want).abs() <= bound)[want.isfinite() & sure].all())


def check_call(x, scale, zero_point, gy, ts, tz, grid, dtype=None):
    """Every op of the family on one set of arguments, against the reference."""
    out = dtype or x.dtype
    y = ops.fake_quantize(x, scale, zero_point, *grid, dtype)
    common.assert_same_bits(y, reference.fake_quantize(x, scale, zero_point, *grid, dtype))
    tz = None if zero_point is None else tz
    for tx in (None, gy, gy.to(out)):
        ty = ops.fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, *grid, 0.3, dtype)
        expected = reference.fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, *grid, 0.3, dtype)
        common.assert_same_bits(ty, expected)
    gy = gy.to(out)
    gx, gs, gz = ops.fake_quantize_bwd(gy, x, scale, zero_point, *grid, 0.3, True)
    ex, es, ez = reference.fake_quantize_bwd(gy, x, scale, zero_point, *grid, 0.3, True)
    common.assert_same_bits(gx, ex)
    assert_close_sums((gs, gz), (es, ez), gy, x, scale, zero_point, grid)
    without, *empty = ops.fake_quantize_bwd(gy, x, scale, zero_point, *grid, 0.3, False)
    common.assert_same_bits(without, ex)
    assert all(t.shape == (0,) for t in empty)
    y, absmax = ops.fake_quantize_absmax(x, *grid, dtype)
    ey, emax = reference.fake_quantize_absmax(x, *grid, dtype)
    common.assert_same_bits(absmax, emax)
    common.assert_same_bits(y, ey)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout, dtype):
    x, scale, zero_point, gy, ts, tz = arguments(*layout, dtype)
    for rules, zero in itertools.product((0, 1, 2 + 4, 8 + 32 + 64 + 128), (None, zero_point)):
        check_call(x, scale, zero, gy, ts, tz, (-8, 7, *layout[1:], EPS, rules))


@pytest.mark.parametrize("rules", [0, 16, 8 + 32 + 64 + 128])
@pytest.mark.parametrize("ends", [(-1, 0), (-4, 0), (0, 1), (1, 3), (-3, -1)], ids=str)
def test_grids_that_end_at_zero_or_beyond(ends, rules):
    for shape, axis in (((400,), -1), ((9, 5), 1)):
        x, scale, _, gy, ts, tz = arguments(shape, axis, 0, torch.float32, seed=1)
        check_call(x / 8, scale, None, gy, ts, tz, (*ends, axis, 0, EPS, rules))


@pytest.mark.parametrize("rules", range(256))
def test_every_combination_of_rules(rules):
    for shape, axis in (((40,), -1), ((9, 5), 1)):
        x, scale, zero_point, gy, ts, tz = arguments(shape, axis, 0, torch.float32, seed=rules)
        for zero in (None, zero_point):
            check_call(x, scale, zero, gy, ts, tz, (-8, 7, axis, 0, EPS, rules))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cast_in_the_same_pass(layout, dtype):
    check_call(*arguments(*layout, torch.float32), (0, 15, *layout[1:], EPS, 0), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", [0, 1, 8 + 32 + 64 + 128])
def test_all_values_of_16_bit_types(dtype, rules):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for bits in (1, 2, 4, 8, 16):
        grid = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -1, 0, EPS, rules)
        for scale in (0.1, 1.0, 3e-39, 7e4):
            s = torch.tensor(scale)
            common.assert_same_bits(ops.fake_quantize(x, s, None, *grid), reference.fake_quantize(x, s, None, *grid))


@pytest.mark.parametrize("bits", range(1, 17))
def test_ties_of_every_grid(bits):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.arange(qmin - 2, qmax + 3, dtype=torch.float32)
    x = torch.cat([codes, codes + 0.5, torch.nextafter(codes + 0.5, codes), torch.nextafter(codes + 0.5, codes + 1)])
    one = torch.tensor(1.0)
    for rules in (0, 1, 8):
        grid = (qmin, qmax, -1, 0, EPS, rules)
        common.assert_same_bits(ops.fake_quantize(x, one, None, *grid), reference.fake_quantize(x, one, None, *grid))
    # An oracle of its own: Python's round goes to even.
    y = ops.fake_quantize(x, one, None, qmin, qmax, -1, 0, EPS, 0)
    assert y.tolist() == [min(max(round(v), qmin), qmax) for v in x.tolist()]


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    bits=st.integers(1, 16),
    rules=st.integers(0, 255),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape_layout_and_rule(shape, bits, rules, dtype, data):
    if data.draw(st.booleans(), label="group"):
        group = data.draw(st.integers(1, 40), label="size")
        shape, axis = (*shape[:-1], shape[-1] * group), -1
    else:
        group, axis = 0, data.draw(st.integers(-1, len(shape) - 1), label="axis")
    x, scale, zero_point, gy, ts, tz = arguments(shape, axis, group, dtype, seed=data.draw(st.integers(0, 99)))
    order = data.draw(st.permutations(range(len(shape))), label="order")
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    x = x.permute(order).contiguous().permute(inverse)
    if data.draw(st.booleans(), label="strided"):
        x = torch.stack([x, x], -1)[..., 0]
    zero = data.draw(st.sampled_from([None, zero_point]), label="zero")
    signed = data.draw(st.booleans(), label="signed")
    qmin = -(2 ** (bits - 1)) if signed else 0
    check_call(x, scale, zero, gy, ts, tz, (qmin, qmin + 2**bits - 1, axis, group, EPS, rules))


def test_layouts_of_memory():
    x, scale, zero_point, gy, ts, tz = arguments((4, 6, 5, 8), 1, 0, torch.float32)
    grid = (-8, 7, 1, 0, EPS, 0)
    expanded = x[:, :, :1].expand(4, 6, 5, 8)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, :, ::2], x[1:], expanded):
        check_call(view, scale, zero_point, torch.randn(view.shape), ts, tz, grid)
    # A cotangent of another layout than the data, such as the stride-0 one that sum() sends.
    for g in (torch.ones(()).expand(x.shape), gy.to(memory_format=torch.channels_last)):
        check_call(x, scale, zero_point, g, ts, tz, grid)
    # A base address that no vector instruction likes.
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    check_call(shifted, scale, zero_point, gy, ts, tz, grid)


def test_tangent_in_the_layout_of_data_and_result():
    x, scale, zero_point, gy, ts, tz = arguments((40,), -1, 0, torch.float32)
    grid = (-8, 7, -1, 0, EPS, 0)
    for tx in (gy, gy.bfloat16()):
        ty = ops.fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, *grid, 0.5, torch.bfloat16)
        expected = reference.fake_quantize_jvp(tx, ts, tz, x, scale, zero_point, *grid, 0.5, torch.bfloat16)
        common.assert_same_bits(ty, expected)


_BATTERY = """
import hashlib, sys, torch
import fastflat
from fastflat import _load
assert _load.status()["cpu"].loaded
torch.set_num_threads(int(sys.argv[1]))
ops, digest = torch.ops.fastflat, hashlib.sha256()
for shape, axis, group in {layouts}:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        g = torch.Generator().manual_seed(1)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x = (torch.randn(shape, generator=g) * 2).to(dtype)
        gy = torch.randn(shape, generator=g).to(dtype)
        scales = (*shape[:-1], shape[-1] // group) if group else () if axis < 0 else (shape[axis],)
        s = torch.rand(scales, generator=g).to(compute) + 0.05
        z = torch.randn(scales, generator=g).to(compute)
        grid = (-8, 7, axis, group, 2.0**-126, 0)
        results = (ops.fake_quantize(x, s, z, *grid), *ops.fake_quantize_bwd(gy, x, s, z, *grid, 0.3, True),
                   *ops.fake_quantize_bwd(gy, x, s, None, *grid, 0.3, True), *ops.fake_quantize_absmax(x, *grid))
        for t in results:
            digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
print(digest.hexdigest())
"""


def test_same_bits_for_any_number_of_threads_and_instruction_set():
    """Sums included: their order depends on shape and type only."""
    layouts = [layout for layout in LAYOUTS if layout[0]] + [((3, 50000), 0, 0), ((40000, 12), 1, 0)]
    program = _BATTERY.format(layouts=layouts)
    digests = {}
    for isa, threads in (("avx512", 1), ("avx512", 2), ("avx2", 1), ("baseline", 2)):
        environment = {**os.environ, "FASTFLAT_CPU_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", program, str(threads)], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        digests[isa, threads] = run.stdout.strip()
    assert len(set(digests.values())) == 1, digests
    assert next(iter(digests.values())) != hashlib.sha256().hexdigest()


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_bwd", "fake_quantize_jvp", "fake_quantize_absmax"])
def test_opcheck(name):
    for place in (((6, 4, 5), 1, 0), ((3, 8), -1, 4), ((5,), -1, 0)):
        x, scale, zero_point, gy, ts, tz = arguments(*place, torch.float32, special=False)
        grid = (-8, 7, *place[1:], EPS, 0)
        args = {
            "fake_quantize": (x, scale, zero_point, *grid, torch.bfloat16),
            "fake_quantize_bwd": (gy, x, scale, zero_point, *grid, 0.5, True),
            "fake_quantize_jvp": (gy, ts, tz, x, scale, zero_point, *grid, 0.5),
            "fake_quantize_absmax": (x, *grid),
        }[name]
        torch.library.opcheck(getattr(ops, name).default, args)
        torch.library.opcheck(
            getattr(ops, name).default,
            tuple(
                a.transpose(0, -1) if isinstance(a, torch.Tensor) and a.shape == x.shape and not place[1] else a
                for a in args
            ),
        )


def test_fake_strides_for_groups():
    x = torch.randn(4, 8, 6).transpose(0, 1)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.fake_quantize(mode.from_tensor(x), torch.ones(8, 4, 2), None, -8, 7, -1, 3, EPS, 0)
    real = ops.fake_quantize(x, torch.ones(8, 4, 2), None, -8, 7, -1, 3, EPS, 0)
    assert fake.stride() == real.stride() == (24, 6, 1)


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_bwd", "fake_quantize_jvp", "fake_quantize_absmax"])
def test_raw_ops_refuse_derivatives(name):
    x, scale, _, gy, ts, _ = arguments((6,), -1, 0, torch.float32, special=False)
    x.requires_grad_()
    grid = (-8, 7, -1, 0, EPS, 0)
    args = {
        "fake_quantize": (x, scale, None, *grid),
        "fake_quantize_bwd": (gy, x, scale, None, *grid, 0.5, True),
        "fake_quantize_jvp": (gy, ts, None, x, scale, None, *grid, 0.5),
        "fake_quantize_absmax": (x, *grid),
    }[name]
    op = getattr(ops, name)
    with pytest.raises(NotImplementedError, match=f"fastflat::{name}: a raw op has no derivative"):
        op(*args)
    with torch.no_grad():
        op(*args)
    with pytest.raises(NotImplementedError, match=f"fastflat::{name}: a raw op has no derivative"):
        torch.func.jvp(lambda v: op(*(v if a is x else a for a in args)), (x.detach(),), (gy,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: ops.fake_quantize(x, s.repeat(2), None, -8, 7, 0, 0, EPS, 0), "scale must have 6 values, got 12"),
        (lambda x, s: ops.fake_quantize(x, s.double(), None, -8, 7, 0, 0, EPS, 0), "scale must be float32"),
        (lambda x, s: ops.fake_quantize(x.int(), s, None, -8, 7, 0, 0, EPS, 0), "x must be float32"),
        (lambda x, s: ops.fake_quantize(x, s, s[:1], -8, 7, 0, 0, EPS, 0), "zero_point must have 6 values, got 1"),
        (lambda x, s: ops.fake_quantize(x, s, None, -8, 7, 3, 0, EPS, 0), "axis must be less than 2, got 3"),
        (lambda x, s: ops.fake_quantize(x, s, None, -8, 7, -1, 3, EPS, 0), "group must divide the last axis of x"),
        (
            lambda x, s: ops.fake_quantize_bwd(x[0], x, s, None, -8, 7, 0, 0, EPS, 0, 1.0, True),
            "gy must have the shape",
        ),
        (lambda x, s: ops.fake_quantize(x.half(), s, None, -8, 7, 0, 0, EPS, 0, torch.float32), "the result must have"),
    ],
)
def test_raw_ops_keep_memory_safe(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(6, 4), torch.ones(6))


def test_other_backends_raise_on_cpu_tensors():
    x, s = torch.randn(3), torch.tensor(0.1)
    with ff.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' computes on cuda tensors only"):
        ff.fake_quantize(x, s, spec=ff.QuantSpec())
    if os.environ.get("TRITON_INTERPRET") != "1":
        with ff.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot compute on cpu"):
            ff.fake_quantize(x, s, spec=ff.QuantSpec())


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """bf16, 2^31 + 3 elements: 12 GB. The last elements are the ones that a 32-bit index would miss."""
    n = 2**31 + 3
    x = torch.zeros(n, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([0.26, -7.0, 100.0])
    y = ops.fake_quantize(x, torch.tensor(0.5), None, -8, 7, -1, 0, EPS, 0)
    assert y[-3:].tolist() == [0.5, -4.0, 3.5]
    assert not y[:-3].any()
    del y
    gx, gs, _ = ops.fake_quantize_bwd(x, x, torch.tensor(0.5), None, -8, 7, -1, 0, EPS, 0, 1.0, True)
    assert gx[-3:].tolist() == [torch.tensor(0.26).bfloat16().item(), 0.0, 0.0]
    assert torch.isfinite(gs)
