# SPDX-License-Identifier: Apache-2.0
"""The general_quantize ops: bits of the CPU kernels against the reference by every rule, and against the fast forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import MINIFLOATS, RULES
from fastflat.backends import reference
from fastflat.backends.reference import layout

from . import comparison as common

ops = torch.ops.fastflat
pytestmark = pytest.mark.usefixtures("compiled")

EPS = 2.0**-126
STATE = torch.tensor([-123456789123456789, 987654321])
_R = RULES
_TORCH = _R["reciprocal"] | _R["mask_after"] | _R["nan_qmin"] | _R["inf_qmin"] | _R["positive_zero"]
#: Every rule at least once, and the pairs that share code.
RULE_SETS = {
    "lsq": 0,
    "torch": _TORCH,
    "inside": _R["zero_inside"] | _R["zero_float"],
    "outside_float": _R["zero_float"] | _R["mask_none"],
    "away": _R["round_away"],
    "away_after": _R["round_away"] | _R["mask_after"] | _R["zero_inside"],
    "pact": _R["pact"],
    "stochastic": _R["round_stochastic"],
    "uniform": _R["noise_uniform"],
    "normal": _R["noise_normal"],
    "temper": _R["noise_temper"],
    "temper_torch": _R["noise_temper"] | _TORCH,
    "bypass": _R["noise_bypass"],
    "binary": _R["binary"],
    "binary_stochastic": _R["binary"] | _R["round_stochastic"],
    **{name: _R[name] for name in MINIFLOATS},
    "e2m1_stochastic": _R["e2m1"] | _R["round_stochastic"],
    "e2m1_uniform": _R["e2m1"] | _R["noise_uniform"],
    "e4m3_after": _R["e4m3"] | _R["mask_after"] | _R["round_away"],
    "e3m2_temper": _R["e3m2"] | _R["noise_temper"],
    "e4m3_bypass": _R["e4m3"] | _R["noise_bypass"],
    "chain": _R["through_chain"],
    "chain_reciprocal": _R["through_chain"] | _R["reciprocal"] | _R["mask_after"] | _R["positive_zero"],
    "inverse": _R["inverse"] | _R["mask_absmax"],
    "inverse_none": _R["inverse"] | _R["mask_none"],
    "nan_passes": _R["nan_passes"] | _R["mask_after"] | _R["zero_inside"] | _R["zero_float"],
    "rectified": _R["rectified"] | _R["mask_after"] | _R["through_chain"] | _R["zero_inside"] | _R["zero_float"],
    "rectified_before": _R["rectified"],
    "rectified_chain": _R["rectified"] | _R["through_chain"] | _R["mask_none"],
    "rectified_away": _R["rectified"] | _R["round_away"],
    "input": _R["compute_input"] | _R["reciprocal"],
    "input_after": _R["compute_input"] | _R["mask_after"] | _R["zero_inside"],
    "input_chain": _R["compute_input"] | _R["through_chain"],
}
SYMMETRIC = _R["binary"] | _R["inverse"] | sum(_R[name] for name in MINIFLOATS)
LAYOUTS = [
    ((), -1, 0),
    ((0,), -1, 0),
    ((7,), -1, 0),
    ((1025,), -1, 0),
    ((9000,), -1, 0),
    ((5, 3, 3, 3), 0, 0),
    ((3, 700), 0, 0),
    ((2, 6, 5, 5), 1, 0),
    ((70, 30), 1, 0),
    ((2, 2, 1100), 1, 0),
    ((6, 96), -1, 32),
    ((3, 33), -1, 11),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def arguments(place, dtype, rules, zero=True, seed=0):
    """(x, scale, zero_point, state, nu, a) and the grid of one call."""
    shape, axis, group = place
    compute = compute_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    x = common.random_data(shape, dtype, seed)
    parameters = scale_shape(x.shape, axis, group)
    scale = torch.rand(parameters, generator=generator, dtype=compute) + 0.05
    if rules & RULES["compute_input"]:
        scale = scale.to(dtype).to(compute)
    if scale.numel() > 2:
        scale.view(-1)[0], scale.view(-1)[1] = 0.5, 0.0  # ties; held at eps, or dead
    zero_point = None
    if zero and not rules & SYMMETRIC:
        zero_point = torch.randn(parameters, generator=generator, dtype=compute) * 3
    nu, a = torch.tensor(0.7, dtype=compute), torch.tensor(0.3, dtype=compute)
    return (x, scale, zero_point, STATE, nu, a), (-8, 7, axis, group, EPS, rules)


def check_call(place, dtype, rules, zero, seed=0, stored=None, ops=ops):
    """Every op of the family on one set of arguments, by `ops`, against the reference."""
    tensors, grid = arguments(place, dtype, rules, zero, seed)
    x, scale, zero_point = tensors[:3]
    call = (*tensors, *grid)
    common.assert_same_bits(ops.general_quantize(*call, stored), reference.general_quantize(*call, stored))
    gy = common.random_data(x.shape, stored or dtype, seed + 1)
    ts = torch.randn_like(scale)
    tz = None if zero_point is None else torch.randn_like(scale)
    for tx in (None, gy):
        tangent = ops.general_quantize_jvp(tx, ts, tz, *call, 0.3, stored)
        common.assert_same_bits(tangent, reference.general_quantize_jvp(tx, ts, tz, *call, 0.3, stored))
    for delta in (None, torch.tensor(0.4, dtype=scale.dtype)):
        wanted = delta is not None
        back = (gy, *tensors, delta, *grid, 0.3)
        gx = ops.general_quantize_bwd(*back, True, wanted)[0]
        common.assert_same_bits(gx, reference.general_quantize_bwd(*back, True, wanted)[0])
        alone, *empty = ops.general_quantize_bwd(*back, False, False)
        common.assert_same_bits(alone, gx)
        assert all(t.shape == (0,) for t in empty)
        check_sums(back, wanted, ops)


def check_sums(back, wanted, ops):
    """Sums of finite data agree to the rounding of their terms: fp32 lanes of at most 256 additions, then double."""
    gy, x, scale, zero_point, *rest = back
    gy, x = (torch.nan_to_num(t, 0.0, 0.0, 0.0).clamp(-9, 9) for t in (gy, x))
    scale = scale.clamp(min=0.05)
    back = (gy, x, scale, zero_point, *rest)
    actual, expected = (f(*back, True, wanted)[1:] for f in (ops.general_quantize_bwd, reference.general_quantize_bwd))
    axis, group = rest[6], rest[7]
    # Each term is at most |gy| times the width of the data in units of the scale, and of codes.
    width = 9 / 0.05 + 16 + 448
    terms = layout.sum_to_scale(layout.blocked(gy, group).abs().to(scale.dtype) * width, x, axis, group, scale.dtype)
    eps = torch.finfo(scale.dtype).eps
    for a, e in zip(actual[:2], expected[:2]):
        assert a.shape == e.shape
        if e.numel():
            assert bool(((a - e).abs() <= 64 * eps * terms + 4 * eps * e.abs()).all())
    assert actual[2].shape == expected[2].shape
    if wanted:
        assert float((actual[2] - expected[2]).abs()) <= 64 * eps * 9 * float(terms.sum()) + 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULE_SETS.values(), ids=RULE_SETS)
def test_rules(rules, dtype):
    if rules & RULES["compute_input"] and dtype.itemsize > 2:
        dtype = torch.bfloat16
    # Storage types other than fp32 differ by their conversions alone: a part of the places is enough.
    for i, place in enumerate(LAYOUTS if dtype == torch.float32 else LAYOUTS[2::3]):
        check_call(place, dtype, rules, zero=i % 2 == 1)


@pytest.mark.parametrize("ends", [(-1, 0), (-4, 0), (0, 1), (1, 3), (-3, -1)], ids=str)
@pytest.mark.parametrize("name", ["stochastic", "uniform", "normal", "away", "nan_passes", "chain", "rectified_chain"])
def test_grids_that_end_at_zero_or_beyond(name, ends):
    for place in LAYOUTS[3:5]:
        (x, scale, *draws), grid = arguments(place, torch.float32, RULE_SETS[name])
        call = (x / 8, scale, *draws, *ends, *grid[2:])
        common.assert_same_bits(ops.general_quantize(*call), reference.general_quantize(*call))
        back = (common.random_data(x.shape, x.dtype, 3), *call[:6], None, *call[6:], 0.3, False, False)
        common.assert_same_bits(ops.general_quantize_bwd(*back)[0], reference.general_quantize_bwd(*back)[0])


@pytest.mark.parametrize("rules", [_R["noise_uniform"], _R["e4m3"], _R["round_away"]])
def test_cast_in_the_same_pass(rules):
    for stored in (torch.bfloat16, torch.float16):
        check_call(((5, 300), 0, 0), torch.float32, rules, True, stored=stored)


@pytest.mark.parametrize("rules", [r for r in RULE_SETS.values() if r < 256])
def test_the_fast_forms_have_the_same_bits(rules):
    for place in LAYOUTS:
        tensors, grid = arguments(place, torch.float32, rules)
        x, scale, zero_point = tensors[:3]
        common.assert_same_bits(ops.general_quantize(*tensors, *grid), ops.fake_quantize(x, scale, zero_point, *grid))
        gy = common.random_data(x.shape, x.dtype, 5)
        general = ops.general_quantize_bwd(gy, *tensors, None, *grid, 0.3, True, False)
        common.assert_same_bits(general[0], ops.fake_quantize_bwd(gy, x, scale, zero_point, *grid, 0.3, True)[0])


@settings(max_examples=40, deadline=None)
@given(
    rules=st.sampled_from(sorted(RULE_SETS.values())),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    outer=st.integers(0, 5),
    channels=st.integers(1, 70),
    inner=st.integers(0, 200),
    zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shapes(rules, dtype, outer, channels, inner, zero, seed):
    if rules & RULES["compute_input"] and dtype == torch.float32:
        dtype = torch.float16
    check_call(((outer, channels, inner), 1, 0), dtype, rules, zero, seed)


def test_layouts_draw_by_storage():
    """channels_last data draw by their place in memory; strided data as their dense copy does."""
    rules = RULES["noise_uniform"]
    x = torch.randn(2, 8, 5, 5)
    scale = torch.tensor(0.3)
    grid = (-8, 7, -1, 0, EPS, rules)
    last = x.contiguous(memory_format=torch.channels_last)
    y = ops.general_quantize(last, scale, None, STATE, None, None, *grid)
    flat = ops.general_quantize(last.permute(0, 2, 3, 1).reshape(-1), scale, None, STATE, None, None, *grid)
    assert torch.equal(y.permute(0, 2, 3, 1).reshape(-1), flat)
    strided = torch.randn(6, 20)[:, ::2]
    y = ops.general_quantize(strided, scale, None, STATE, None, None, *grid)
    common.assert_same_bits(y, ops.general_quantize(strided.contiguous(), scale, None, STATE, None, None, *grid))
    common.assert_same_bits(y, reference.general_quantize(strided, scale, None, STATE, None, None, *grid))


def test_threads_change_nothing():
    x, gy = torch.randn(2, 1 << 18)
    scale = torch.tensor(0.3)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for rules in (RULES["noise_normal"], RULES["round_stochastic"]):
                grid = (-8, 7, -1, 0, EPS, rules)
                y = ops.general_quantize(x, scale, None, STATE, None, None, *grid)
                results.append((y, *ops.general_quantize_bwd(gy, x, scale, None, STATE, None, None, None, *grid,
                                                             1.0, True, False)))  # fmt: skip
        finally:
            torch.set_num_threads(before)
    for once, twice in zip(results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(once, twice))


def encodings(name):
    """Every value of a minifloat format, from its definition: sign, exponent and mantissa bits."""
    largest, smallest, unit = MINIFLOATS[name]
    values, steps = {0.0}, round(1 / unit)
    exponent = round(math.log2(smallest))
    values |= {k * unit * smallest for k in range(steps)}
    while 2.0**exponent <= largest:
        values |= {2.0**exponent * (1 + k * unit) for k in range(steps)}
        exponent += 1
    return torch.tensor(sorted(v for v in values if v <= largest), dtype=torch.float64)


@pytest.mark.parametrize(("name", "codes"), [("e4m3", 127), ("e5m2", 124), ("e3m2", 32), ("e2m3", 32), ("e2m1", 8)])
def test_all_encodings(name, codes):
    """Each value stays, each midpoint goes to the even code, all else to the nearest; the table counts right."""
    grid = encodings(name)
    assert len(grid) == codes
    one = torch.ones(())
    call = (one, None, None, None, None, 0, 0, -1, 0, EPS, RULES[name])

    def quantized(v):
        return ops.general_quantize(v.float(), *call).double()

    for sign in (1.0, -1.0):
        assert torch.equal(quantized(sign * grid), sign * grid)
        middle = (grid[:-1] + grid[1:]) / 2
        even = torch.where(torch.arange(codes - 1) % 2 == 0, grid[:-1], grid[1:])
        assert torch.equal(quantized(sign * middle), sign * even)
        for side, want in ((-1, grid[:-1]), (1, grid[1:])):
            near = torch.nextafter(middle.float(), torch.tensor(side * math.inf))
            assert torch.equal(quantized(sign * near.double()), sign * want)
    beyond = torch.tensor([1e6, math.inf, -math.inf, math.nan])
    largest = float(grid[-1])
    assert quantized(beyond)[:3].tolist() == [largest, largest, -largest]
    assert bool(quantized(beyond)[3].isnan())


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_float8_agrees_with_torch(name):
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= MINIFLOATS[name][0]]
    y = ops.general_quantize(x, torch.ones(()), None, None, None, None, 0, 0, -1, 0, EPS, RULES[name])
    assert torch.equal(y, x.to(dtype).float())


@pytest.mark.parametrize("rule", ["absmax", "floor", "ceil", "even", "rceil", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_scales(rule, dtype):
    compute = compute_dtype(dtype)
    for name, place in (("e2m1", ((6, 96), -1, 32)), ("e4m3", ((3, 700), 0, 0)), ("e5m2", ((2, 5, 9), 1, 0)),
                        ("e3m2", ((1000,), -1, 0)), ("e2m3", ((0, 32), -1, 16))):  # fmt: skip
        shape, axis, group = place
        x = common.random_data(shape, dtype, 4)
        if x.numel() and group:
            x[1] = 0
        outer = torch.tensor(0.01, dtype=compute) if rule == "e4m3" else None
        rules = RULES[name] | (RULES[f"scale_{rule}"] if rule != "absmax" else 0)
        call = (x, None, None, None, outer, 0, 0, axis, group, EPS, rules)
        for actual, expected in zip(ops.general_quantize_dynamic(*call), reference.general_quantize_dynamic(*call)):
            common.assert_same_bits(actual, expected)


def test_fake_kernels_and_schemas():
    for rules in (RULES["noise_uniform"], RULES["e2m1"]):
        tensors, grid = arguments(((4, 6, 8), 1, 0), torch.float32, rules, zero=not rules & SYMMETRIC)
        # opcheck compares results by value: no NaN among them.
        tensors = (torch.randn(4, 6, 8), torch.rand(6) + 0.1, tensors[2], *tensors[3:])
        x, scale, zero_point = tensors[:3]
        torch.library.opcheck(ops.general_quantize.default, (*tensors, *grid, torch.bfloat16))
        delta = torch.tensor(0.1)
        torch.library.opcheck(ops.general_quantize_bwd.default, (x, *tensors, delta, *grid, 0.5, True, True))
        tz = None if zero_point is None else zero_point
        torch.library.opcheck(ops.general_quantize_jvp.default, (x, scale, tz, *tensors, *grid, 0.5))
        torch.library.opcheck(ops.general_quantize_dynamic.default, (x, *tensors[3:], None, *grid))


def test_raw_ops_refuse_gradients():
    tensors, grid = arguments(((8,), -1, 0), torch.float32, RULES["noise_uniform"], False)
    with pytest.raises(NotImplementedError, match="a raw op has no derivative"):
        ops.general_quantize(tensors[0].requires_grad_(), *tensors[1:], *grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: None}, "state must be given with rules that draw noise"),
        ({3: torch.zeros(3, dtype=torch.int64)}, "state must be a contiguous int64 tensor of 2 values"),
        ({4: torch.zeros(2)}, "nu must have 1 values"),
        ({11: RULES["compute_input"]}, "only where x has 16 bits"),
    ],
)
def test_raw_ops_keep_memory_safe(change, message):
    tensors, grid = arguments(((8,), -1, 0), torch.float32, RULES["noise_uniform"], False)
    call = [*tensors, *grid]
    for at, value in change.items():
        call[at] = value
    with pytest.raises(RuntimeError, match=message):
        ops.general_quantize(*call)
