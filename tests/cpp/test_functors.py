# SPDX-License-Identifier: Apache-2.0
"""The functors of csrc/math, exhaustively: all 2^32 fp32 values through rounding and narrowing, all 2^16 values of each
16-bit type through the grid at every width and convention."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastflat._spec import RULES, TINY
from fastflat.backends import reference

ALL_CODES = np.arange(1 << 16, dtype=np.uint16)
ALL_HALVES = torch.from_numpy(ALL_CODES.view(np.float16).copy())
ALL_BFLOATS = torch.from_numpy(ALL_CODES.view(np.int16).copy()).view(torch.bfloat16)

CONVENTIONS = {
    "lsq": 0,
    "torch_tensor": RULES["reciprocal"] | RULES["mask_after"] | RULES["nan_qmin"] | RULES["positive_zero"],
    "torch_channel": RULES["reciprocal"]
    | RULES["mask_after"]
    | RULES["nan_qmin"]
    | RULES["inf_qmin"]
    | RULES["positive_zero"],
    "inside": RULES["zero_inside"] | RULES["mask_none"],
    "float_zero": RULES["zero_inside"] | RULES["zero_float"],
}
ZERO_POINTS = [None, 0.0, 1.0, 2.5, -1.7, 1e9]


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    integer = {4: np.uint32, 8: np.uint64}[got.dtype.itemsize]
    equal = got.view(integer) == want.view(integer)
    return got.dtype == want.dtype and bool((equal | (np.isnan(got) & np.isnan(want))).all())


def test_the_rule_tables_of_python_and_cpp_agree(functors):
    assert functors.rules() == RULES


def test_rounding_is_to_nearest_even_for_every_float(functors):
    assert functors.rounding_disagreements() == (0, 0)


def test_rounding_of_doubles_at_ties_and_edges(functors):
    g = np.random.default_rng(0)
    whole = np.concatenate([np.arange(-4100.0, 4100.0), 2.0 ** np.arange(0, 60), g.integers(0, 1 << 52, 10000)])
    ties = np.concatenate([whole + 0.5, whole, np.nextafter(whole + 0.5, -np.inf), np.nextafter(whole + 0.5, np.inf)])
    bits = g.integers(0, 1 << 64, 200000, dtype=np.uint64).view(np.float64)
    x = np.concatenate([ties, -ties, bits, [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324]])
    with np.errstate(invalid="ignore"):  # signalling NaNs among the random bits
        want = np.rint(x)
    assert same_bits(functors.round_by_addition(x), want)
    assert same_bits(functors.round(x), want)


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_narrowing_is_to_nearest_even_for_every_float(functors, name):
    every_float = 1 << 32
    assert getattr(functors, f"{name}_disagreements")() == (0, 0, every_float)


def test_widening_is_exact_for_every_code(functors):
    assert same_bits(functors.half_to_float(ALL_CODES), ALL_HALVES.float().numpy())
    assert same_bits(functors.bfloat16_to_float(ALL_CODES), ALL_BFLOATS.float().numpy())


def test_narrowing_agrees_with_torch_around_every_code(functors):
    for codes, narrow, dtype in (
        (ALL_HALVES, functors.float_to_half, torch.float16),
        (ALL_BFLOATS, functors.float_to_bfloat16, torch.bfloat16),
    ):
        ascending = codes.float()[codes.float().isfinite()].sort().values
        middle = ((ascending[1:].double() + ascending[:-1].double()) / 2).float()
        x = torch.cat([ascending, middle, *(torch.nextafter(middle, middle.new_tensor(s)) for s in (-1e39, 1e39))])
        got = torch.from_numpy(narrow(x.numpy()).view(np.int16)).view(dtype)
        assert torch.equal(got.view(torch.int16), x.to(dtype).view(torch.int16))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("bits", range(1, 17))
def test_grid_forward_on_every_16_bit_value(functors, bits, convention):
    rules = CONVENTIONS[convention]
    everything = torch.cat([ALL_HALVES.float(), ALL_BFLOATS.float()])
    zero_points = [None] if convention == "lsq" else ZERO_POINTS
    scales = itertools.cycle([1.0, 0.1, 0.0375, 2.0**-7, 1e-30, 3e38])
    for signed, zero, scale in zip((True, False) * 6, zero_points * 6, scales):
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        got = functors.Grid32(low, high, TINY, 1.0, rules).forward(everything.numpy(), scale, zero)
        point = None if zero is None else torch.tensor(zero)
        want = reference.fake_quantize(everything, torch.tensor(scale), point, low, high, -1, 0, TINY, rules)
        assert same_bits(got, want.numpy()), (signed, zero, scale)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("double", [False, True])
def test_every_tie_and_its_neighbours(functors, convention, double):
    rules = CONVENTIONS[convention]
    dtype = torch.float64 if double else torch.float32
    grid = functors.Grid64 if double else functors.Grid32
    low, high = -128, 127
    ties = torch.arange(low - 3, high + 4, dtype=dtype) + 0.5
    infinity = torch.tensor(math.inf, dtype=dtype)
    codes = torch.cat([ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity), ties - 0.5])
    gy, tx = torch.linspace(-2, 3, codes.numel(), dtype=dtype), torch.linspace(1, -1, codes.numel(), dtype=dtype)
    for scale, zero in itertools.product([1.0, 0.25, 0.1, -1.0, 0.0, math.nan], [None, 3.0, -2.5]):
        x, s = codes * scale, torch.tensor(scale, dtype=dtype)
        z = None if zero is None else torch.tensor(zero, dtype=dtype)
        rest = (low, high, -1, 0, TINY, rules)
        functor = grid(low, high, TINY, 0.3, rules)
        assert same_bits(functor.forward(x.numpy(), scale, zero), reference.fake_quantize(x, s, z, *rest).numpy())

        gx, share, outside = functor.backward(gy.numpy(), x.numpy(), scale, zero)
        want_gx, want_gs, want_gz = reference.fake_quantize_bwd(gy, x, s, z, *rest, 0.3, True)
        assert same_bits(np.ascontiguousarray(gx), want_gx.numpy())
        c = np.float64 if double else np.float32
        with np.errstate(invalid="ignore"):  # inf - inf where the scale is NaN or 0
            gs = functor.scale_gradient(c(share.sum(dtype=np.float64)))
        assert gs == pytest.approx(want_gs.item(), rel=1e-6, nan_ok=True)
        if zero is not None:
            gz = functor.zero_gradient(c(outside.sum(dtype=np.float64)), scale, zero)
            assert gz == pytest.approx(want_gz.item(), rel=1e-6, nan_ok=True)

        ts, tz = 0.7, -1.3
        tangents = tx, torch.tensor(ts, dtype=dtype), torch.tensor(tz, dtype=dtype)
        want = reference.fake_quantize_jvp(*tangents, x, s, z, *rest, 0.3)
        assert same_bits(functor.tangent(tx.numpy(), ts, tz, x.numpy(), scale, zero), want.numpy())


def test_tangent_is_the_transpose_of_backward(functors):
    g = np.random.default_rng(1)
    x, gy, tx = g.normal(size=(3, 1000)) * 4
    for rules in CONVENTIONS.values():
        functor = functors.Grid64(-8, 7, TINY, 0.3, rules)
        gx, share, outside = functor.backward(gy, x, 0.7, 1.6)
        gs, gz = functor.scale_gradient(share.sum()), functor.zero_gradient(outside.sum(), 0.7, 1.6)
        ty = functor.tangent(tx, 0.9, -1.1, x, 0.7, 1.6)
        assert (ty * gy).sum() == pytest.approx((gx * tx).sum() + gs * 0.9 + gz * -1.1, rel=1e-12)


def test_the_larger_magnitude_keeps_nan_on_either_side(functors):
    for a, b in itertools.product([0.0, 1.0, 2.5, math.inf, math.nan], repeat=2):
        got = functors.larger_magnitude(a, b)
        assert math.isnan(got) if math.isnan(a) or math.isnan(b) else got == max(a, b)
    assert functors.absmax_scale(3.0, 7.0) == np.float32(3) / np.float32(7)
    assert functors.absmax_scale(3.0, 0.0) == 3.0


def test_identity_keeps_every_bit(functors):
    x = np.random.default_rng(2).integers(0, 1 << 32, 1000, dtype=np.uint32)
    assert np.array_equal(functors.identity(x), x)
