# SPDX-License-Identifier: Apache-2.0
"""Mixtures of quantizers: compiled kernels against the reference, the reference against fake_quantize, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat as ff
from fastflat import _checks
from fastflat._ops import compute_dtype, scale_shape
from fastflat.backends import reference
from fastflat.backends.reference import layout as scales_of

from . import comparison as common
from .test_fake_quantize import DTYPES, EPS, LAYOUTS

ops = torch.ops.fastflat
INF, NAN = float("inf"), float("nan")
RULES = (0, 1, 2 + 4, 8 + 32 + 64 + 128, 16)


def limits(bits, dtype, signed=True):
    """qmin and qmax of several widths as the raw ops take them."""
    lowest = [-(2 ** (b - 1)) if signed else 0 for b in bits]
    highest = [low + 2**b - 1 for low, b in zip(lowest, bits, strict=True)]
    return torch.tensor(lowest, dtype=dtype), torch.tensor(highest, dtype=dtype)


def arguments(shape, axis, group, dtype, bits=(2, 4, 8), seed=0, special=True, signed=True):
    """x, the candidates, cotangent, factors and tangents of one call."""
    compute, n = compute_dtype(dtype), len(bits)
    g = torch.Generator().manual_seed(seed)
    x = common.random_data(shape, dtype, seed, special)
    parameters = (n, *scale_shape(x.shape, axis, group))
    scale = torch.rand(parameters, generator=g, dtype=compute) + 0.05
    weight = torch.softmax(torch.randn(n, generator=g, dtype=compute), 0)
    gy = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    factor = torch.rand(n, generator=g, dtype=compute)
    ts, tw = torch.randn(parameters, generator=g, dtype=compute), torch.randn(n, generator=g, dtype=compute)
    return x, (scale, *limits(bits, compute, signed), weight), gy, factor, ts, tw


def assert_close_sums(actual, expected, terms):
    """Equal but for the order of a sum whose terms' magnitudes add up to `terms`: lanes of at most 256 additions in
    the compute type, then double."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    eps = torch.finfo(expected.dtype).eps
    assert torch.equal(actual.isnan(), expected.isnan())
    bound = 64 * eps * terms + 4 * eps * expected.abs()
    assert bool(((actual - expected).abs() <= bound)[expected.isfinite()].all())


def check_call(x, candidates, gy, factor, ts, tw, grid, dtype=None):
    """Every op of the family on one set of arguments, against the reference."""
    out = dtype or x.dtype
    y = ops.mixquant(x, *candidates, *grid, dtype)
    common.assert_same_bits(y, reference.mixquant(x, *candidates, *grid, dtype))
    for tangents in ((gy, ts, tw), (gy.to(out), None, tw), (None, ts, None)):
        args = (*tangents, x, *candidates, factor, *grid, dtype)
        common.assert_same_bits(ops.mixquant_jvp(*args), reference.mixquant_jvp(*args))
    gy = gy.to(out)
    got = ops.mixquant_bwd(gy, x, *candidates, factor, *grid)
    want = reference.mixquant_bwd(gy, x, *candidates, factor, *grid)
    common.assert_same_bits(got[0], want[0])
    # Magnitudes of the terms: t and q are at most the width of the grid, x is finite or the sum is not.
    scale, qmin, qmax, weight = candidates
    size = scales_of.sum_to_scale(
        scales_of.blocked(gy, grid[1]).abs().to(scale.dtype), x, grid[0], grid[1], scale.dtype
    )
    width = (qmax - qmin + 32).view(-1, *[1] * (scale.dim() - 1))
    held = scale.clamp(min=EPS)
    assert_close_sums(got[1], want[1], size * width * (weight * factor).abs().view(width.shape))
    assert_close_sums(got[2], want[2], (size * width * held).reshape(len(weight), -1).sum(1))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout, dtype):
    for rules in RULES if dtype == torch.float32 else (0, 1):
        check_call(*arguments(*layout, dtype), (*layout[1:], EPS, rules))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_candidates(count):
    for shape, axis, group in (((700,), -1, 0), ((40, 30), 1, 0), ((6, 64), -1, 16)):
        bits = (1, 2, 3, 4, 6, 8, 12, 16)[-count:]
        for signed in (True, False):
            check_call(*arguments(shape, axis, group, torch.float32, bits, signed=signed), (axis, group, EPS, 0))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS[::3], ids=str)
def test_cast_in_the_same_pass(layout, dtype):
    check_call(*arguments(*layout, torch.float32), (*layout[1:], EPS, 0), dtype)


@pytest.mark.usefixtures("compiled")
@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    bits=st.lists(st.integers(1, 16), min_size=1, max_size=8),
    rules=st.integers(0, 255),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape_layout_and_rule(shape, bits, rules, dtype, data):
    if data.draw(st.booleans(), label="group"):
        group = data.draw(st.integers(1, 70), label="size")
        shape, axis = (*shape[:-1], shape[-1] * group), -1
    else:
        group, axis = 0, data.draw(st.integers(-1, len(shape) - 1), label="axis")
    signed = data.draw(st.booleans(), label="signed")
    seed = data.draw(st.integers(0, 99), label="seed")
    x, candidates, *rest = arguments(shape, axis, group, dtype, bits, seed, signed=signed)
    order = data.draw(st.permutations(range(len(shape))), label="order")
    x = x.permute(order).contiguous().permute(sorted(range(len(shape)), key=order.__getitem__))
    if data.draw(st.booleans(), label="strided"):
        x = torch.stack([x, x], -1)[..., 0]
    weight = data.draw(st.sampled_from([0.0, -0.0, 1.0, -2.5, INF, NAN, None]), label="weight")
    if weight is not None:
        candidates[3][data.draw(st.integers(0, len(bits) - 1), label="where")] = weight
    check_call(x, candidates, *rest, (axis, group, EPS, rules))


@pytest.mark.usefixtures("compiled")
def test_layouts_of_memory():
    x, candidates, gy, *rest = arguments((4, 6, 5, 8), 1, 0, torch.float32)
    grid = (1, 0, EPS, 0)
    expanded = x[:, :, :1].expand(4, 6, 5, 8)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, :, ::2], x[1:], expanded):
        check_call(view, candidates, torch.randn(view.shape), *rest, grid)
    for g in (torch.ones(()).expand(x.shape), gy.to(memory_format=torch.channels_last)):
        check_call(x, candidates, g, *rest, grid)
    # Parameters of any layout, data at a base address that no vector instruction likes.
    strided = tuple(torch.stack([p, p], -1)[..., 0] for p in candidates)
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    check_call(shifted, strided, gy, *rest, grid)


_BATTERY = """
import hashlib, sys, torch
import fastflat
from fastflat import _load
assert _load.status()["cpu"].loaded
torch.set_num_threads(int(sys.argv[1]))
ops, digest = torch.ops.fastflat, hashlib.sha256()
for shape, axis, group in {layouts}:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        g = torch.Generator().manual_seed(1)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        x = (torch.randn(shape, generator=g) * 2).to(dtype)
        gy = torch.randn(shape, generator=g).to(dtype)
        scales = (*shape[:-1], shape[-1] // group) if group else () if axis < 0 else (shape[axis],)
        s = torch.rand((3, *scales), generator=g).to(compute) + 0.05
        v = [torch.tensor(a, dtype=compute) for a in ((-2, -8, -128), (1, 7, 127), (.2, .5, .3), (1., .5, .1))]
        grid = (axis, group, 2.0**-126, 0)
        results = (ops.mixquant(x, s, *v[:3], *grid), *ops.mixquant_bwd(gy, x, s, *v, *grid))
        for t in results:
            digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
print(digest.hexdigest())
"""


@pytest.mark.usefixtures("compiled")
def test_same_bits_for_any_number_of_threads_and_instruction_set():
    layouts = [layout for layout in LAYOUTS if layout[0]] + [((3, 50000), 0, 0), ((40000, 12), 1, 0)]
    program = _BATTERY.format(layouts=layouts)
    digests = set()
    for isa, threads in (("avx512", 1), ("avx512", 2), ("avx2", 1), ("baseline", 2)):
        environment = {**os.environ, "FASTFLAT_CPU_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", program, str(threads)], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.strip())
    assert len(digests) == 1


# The reference and what users call ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4, axis=1), ff.QuantSpec.torch(4, group=8)])
def test_one_hot_weight_is_fake_quantize_in_every_bit(spec, dtype):
    bits = (1, 3, 8)
    x = common.random_data((5, 40), dtype)
    gy = torch.randn(5, 40).to(dtype)
    gy[0, :2], gy[2, 3] = torch.tensor([INF, NAN]), -0.0
    scales = torch.rand((3, *scale_shape(x.shape, 1 if spec.axis else -1, spec.group or 0))) + 0.1
    scales = scales.to(compute_dtype(dtype))
    for j, b in enumerate(bits):
        poisoned = scales.clone()
        poisoned[j - 1], poisoned[j - 2] = INF, NAN  # left out, so they must not show
        weight = torch.zeros(3, dtype=scales.dtype)
        weight[j] = 1
        leaf = x.clone().requires_grad_()
        y = ff.mixquant(leaf, poisoned, weight, bits=bits, spec=spec)
        other = x.clone().requires_grad_()
        z = ff.fake_quantize(other, scales[j], spec=spec.replace(bits=b))
        common.assert_same_bits(y.detach(), z.detach())
        gx, gz = torch.autograd.grad(y, leaf, gy)[0], torch.autograd.grad(z, other, gy)[0]
        common.assert_same_bits(gx, gz)


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize("spec", [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4, axis=0), ff.QuantSpec.lsq(4, group=4)])
def test_value_and_gradients_are_those_of_composed_calls(spec):
    bits = [2, 4, 4, 7]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 4, generator=g, dtype=torch.float64)
    shape = (4, *scale_shape(x.shape, -1 if spec.axis is None else 0, spec.group or 0))
    leaves = [x, torch.rand(shape, generator=g, dtype=torch.float64) + 0.1]
    leaves = [t.requires_grad_() for t in (*leaves, torch.randn(4, generator=g, dtype=torch.float64))]
    y = ff.mixquant(*leaves, bits=bits, spec=spec)
    z = sum(leaves[2][j] * ff.fake_quantize(x, leaves[1][j], spec=spec.replace(bits=b)) for j, b in enumerate(bits))
    torch.testing.assert_close(y, z, rtol=1e-14, atol=1e-14)
    gy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, gy), torch.autograd.grad(z, leaves, gy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    values = torch.stack([ff.fake_quantize(x, leaves[1][j], spec=spec.replace(bits=b)) for j, b in enumerate(bits)])
    by_weight = torch.autograd.grad(ff.mixquant(*leaves, bits=bits, spec=spec), leaves[2], gy)[0]
    torch.testing.assert_close(by_weight, (values * gy).reshape(4, -1).sum(1))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("grad_scale", ["none", "lsq", "lsq_channel", 0.3])
def test_bits_as_a_tensor_are_bits_as_a_list(signed, narrow, grad_scale):
    spec = ff.QuantSpec.lsq(4, signed=signed, axis=0, narrow=narrow, grad_scale=grad_scale)
    bits = list(range(2 if narrow else 1, 17))[-8:]
    x, scales, weight = torch.randn(3, 50) * 5, torch.rand(8, 3) + 0.01, torch.rand(8)
    results = []
    for form in (bits, torch.tensor(bits), torch.tensor(bits, dtype=torch.float32), torch.tensor(bits).half()):
        s = scales.clone().requires_grad_()
        y = ff.mixquant(x, s, weight, bits=form, spec=spec)
        results.append((y, torch.autograd.grad(y.square().sum(), s)[0]))
    for y, gs in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gs, results[0][1])
    one = [spec.replace(bits=b) for b in bits]
    expected = [s.grad_factor(x.numel(), 3) for s in one]
    from fastflat.functional import _mixquant

    candidates = _mixquant._candidates(torch.tensor(bits), spec, torch.float64, x.numel(), 3)
    assert candidates.qmin.tolist() == [s.qmin for s in one]
    assert candidates.qmax.tolist() == [s.qmax for s in one]
    assert candidates.factor.tolist() == pytest.approx(expected, rel=1e-15)


# A real-valued width --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize("spec", [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4, axis=0, signed=False)])
@pytest.mark.parametrize("b", [1, 2, 5, 15, 16])
def test_whole_width_is_the_quantizer_of_that_width(spec, b):
    x = common.random_data((6, 30))
    half_range = torch.full(() if spec.axis is None else (6,), 2.5)
    grid = spec.replace(bits=b)
    y = ff.frac_quantize(x, half_range, float(b), spec=spec)
    common.assert_same_bits(y, ff.fake_quantize(x, half_range / max(grid.qmax, 1), spec=grid))
    common.assert_same_bits(y, ff.frac_quantize(x, half_range, torch.tensor(float(b)), spec=spec))


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize("spec", [ff.QuantSpec.lsq(4), ff.QuantSpec.lsq(4, axis=0, signed=False)])
@pytest.mark.parametrize("b", [1.0, 1.3, 3.75, 15.5, 16.0])
def test_fractional_width_and_its_slope(spec, b):
    x = torch.randn(6, 30, dtype=torch.float64, requires_grad=True)
    r = torch.full(() if spec.axis is None else (6,), 2.5, dtype=torch.float64, requires_grad=True)
    width = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    k = min(int(b), 15)

    def at(bits):
        grid = spec.replace(bits=bits)
        return ff.fake_quantize(x, r / max(grid.qmax, 1), spec=grid)

    low, high = at(k), at(k + 1)
    expected = (1 - (b - k)) * low + (b - k) * high
    y = ff.frac_quantize(x, r, width, spec=spec)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    gy = torch.randn_like(y)
    gx, gr, gb = torch.autograd.grad(y, (x, r, width), gy)
    ex, er = torch.autograd.grad(expected, (x, r), gy, retain_graph=True)
    torch.testing.assert_close(gx, ex)
    torch.testing.assert_close(gr, er)
    torch.testing.assert_close(gb, (gy * (high - low)).sum())


def test_width_carried_outside_is_held_and_finds_back():
    x, gy, r, spec = torch.randn(50), torch.randn(50), torch.tensor(2.0), ff.QuantSpec.lsq(4)
    for outside, inside in ((0.3, 1.0), (-7.0, 1.0), (16.01, 16.0), (99.0, 16.0)):
        b = torch.tensor(outside, requires_grad=True)
        y = ff.frac_quantize(x, r, b, spec=spec)
        at = torch.tensor(inside, requires_grad=True)
        z = ff.frac_quantize(x, r, at, spec=spec)
        common.assert_same_bits(y.detach(), z.detach())
        slopes = [torch.autograd.grad(v, p, gy)[0] for v, p in ((y, b), (z, at))]
        assert torch.equal(*slopes)
        assert slopes[0] != 0
    assert ff.frac_quantize(x, r, torch.tensor(NAN), spec=spec).isnan().all()


def test_learning_the_width_finds_the_cheapest_that_is_good_enough():
    """Gradient descent on error plus cost settles where the slope of the error is the price of a bit."""
    torch.manual_seed(0)
    x, r, spec = torch.randn(4000), torch.tensor(4.0), ff.QuantSpec.lsq(4)
    error = [float((ff.frac_quantize(x, r, float(b), spec=spec) - x).square().mean()) for b in range(1, 9)]
    price = (error[3] - error[4] + error[4] - error[5]) / 2  # between the gains of the fifth and the sixth bit
    b = torch.tensor(8.0, requires_grad=True)
    for _ in range(300):
        loss = (ff.frac_quantize(x, r, b, spec=spec) - x).square().mean() + price * b
        (slope,) = torch.autograd.grad(loss, b)
        with torch.no_grad():
            b -= 0.02 * slope.sign()
    best = min(range(1, 9), key=lambda k: error[k - 1] + price * k)
    assert abs(b.item() - best) < 0.6


# Bad input and torch's own checks -------------------------------------------------------------------------------------

X, S, W = torch.randn(4, 6), torch.ones(2), torch.ones(2)
LSQ = ff.QuantSpec.lsq(4)


@pytest.mark.parametrize(
    ("text", "args", "options"),
    [
        ("x must be a tensor, got list", ([1.0], S, W), {}),
        ("spec must be a QuantSpec", (X, S, W), {"spec": 4}),
        ("scales must have shape [2], got [3] (axis None, group None)", (X, torch.ones(3), W), {}),
        ("scales must have shape [2, 4], got [2, 6]", (X, torch.ones(2, 6), W), {"spec": LSQ.replace(axis=0)}),
        ("scales must be torch.float32", (X, S.double(), W), {}),
        ("scales must need no gradient", (X, torch.ones(2, requires_grad=True), W), {"spec": ff.QuantSpec(4)}),
        ("weight must have shape [2], got []", (X, S, torch.ones(())), {}),
        ("weight must be a tensor, got list", (X, S, [1.0, 0.0]), {}),
        ("bits must be integers from 1 to 16, got 17", (X, S, W), {"bits": [2, 17]}),
        ("bits must be integers from 1 to 16, got 2.0", (X, S, W), {"bits": [2.0, 4]}),
        ("bits must be integers from 2 to 16, got 1", (X, S, W), {"bits": [1, 4], "spec": LSQ.replace(narrow=True)}),
        ("bits must name 1 to 8 candidates, got 9", (X, S, W), {"bits": [4] * 9}),
        ("bits must name 1 to 8 candidates, got 0", (X, S, W), {"bits": []}),
        ("bits must be a list of integers or a numeric tensor [n]", (X, S, W), {"bits": torch.tensor(2)}),
        ("bits must need no gradient", (X, S, W), {"bits": torch.tensor([2.0, 4.0], requires_grad=True)}),
        ("dtype must be one of", (X, S, W), {"dtype": torch.float64}),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(text, args, options):
    with pytest.raises((TypeError, ValueError)) as raised:
        ff.mixquant(*args, **{"bits": [2, 4], "spec": LSQ, **options})
    assert str(raised.value).startswith("fastflat::mixquant: ")
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("bits must lie in 1..16, got 0.5; learnable bits outside 1..16", 0.5),
        ("bits must lie in 1..16, got 16.5; learnable bits outside 1..16", 16.5),
        ("bits must lie in 1..16, got nan", NAN),
        ("bits must be a number or a 0-dim tensor, got str", "4"),
        ("bits must be a floating 0-dim tensor, got torch.float32 [1]", torch.ones(1)),
        ("bits must be a floating 0-dim tensor, got torch.int64 []", torch.tensor(4)),
    ],
)
def test_bad_width_is_one_line(text, bits):
    with pytest.raises((TypeError, ValueError)) as raised:
        ff.frac_quantize(X, torch.ones(()), bits, spec=LSQ)
    assert str(raised.value).startswith("fastflat::frac_quantize: " + text)


def test_values_are_checked_where_asked(monkeypatch):
    monkeypatch.setattr(_checks, "VALUES_WANTED", True)
    with pytest.raises(ValueError, match=r"learnable bits outside 1\.\.16"):
        ff.frac_quantize(X, torch.ones(()), torch.tensor(17.0), spec=LSQ)
    with pytest.raises(ValueError, match="bits must be integers from 1 to 16"):
        ff.mixquant(X, S, W, bits=torch.tensor([2.5, 4]), spec=LSQ)
    with pytest.raises(ValueError, match="scales must be finite and positive, got 0"):
        ff.mixquant(X, S * 0, W, bits=[2, 4], spec=LSQ)
    ff.mixquant(X, S, W, bits=torch.tensor([2.0, 4]), spec=LSQ)


@pytest.mark.usefixtures("compiled")
def test_raw_ops_hold_what_memory_needs():
    _, candidates, gy, factor, ts, tw = arguments((4, 6), -1, 0, torch.float32)
    grid = (-1, 0, EPS, 0)
    for text, wrong in (
        ("scale must have 3 values", (torch.ones(2), *candidates[1:])),
        ("qmin must be float32", (candidates[0], candidates[1].double(), *candidates[2:])),
        ("qmax must have 3 values", (*candidates[:2], torch.ones(4), candidates[3])),
        ("from 1 to 8 candidates", tuple(torch.ones(9) for _ in range(4))),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.mixquant(X, *wrong, *grid)
    with pytest.raises(RuntimeError, match="gy must have the shape of x"):
        ops.mixquant_bwd(gy[1:], X, *candidates, factor, *grid)
    with pytest.raises(RuntimeError, match="factor must have 3 values"):
        ops.mixquant_bwd(gy, X, *candidates, factor[1:], *grid)
    with pytest.raises(RuntimeError, match="tx must have the dtype of x"):
        ops.mixquant_jvp(gy.half(), ts, tw, X, *candidates, factor, *grid)


@pytest.mark.parametrize("name", ["mixquant", "mixquant_bwd", "mixquant_jvp"])
def test_opcheck(name):
    for layout in (((6, 4, 5), 1, 0), ((3, 8), -1, 4), ((5,), -1, 0)):
        x, candidates, gy, factor, ts, tw = arguments(*layout, torch.float32, special=False)
        grid = (*layout[1:], EPS, 0)
        args = {
            "mixquant": (x, *candidates, *grid, torch.bfloat16),
            "mixquant_bwd": (gy, x, *candidates, factor, *grid),
            "mixquant_jvp": (gy, ts, tw, x, *candidates, factor, *grid),
        }[name]
        torch.library.opcheck(getattr(ops, name).default, args)


def test_raw_ops_refuse_derivatives():
    x, candidates, *_ = arguments((6,), -1, 0, torch.float32, special=False)
    with pytest.raises(NotImplementedError, match="a raw op has no derivative"):
        ops.mixquant(x, *candidates[:3], candidates[3].requires_grad_(), -1, 0, EPS, 0)
