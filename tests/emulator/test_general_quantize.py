# SPDX-License-Identifier: Apache-2.0
"""The general_quantize kernels, executed from their .cu source, against the reference: maps by bits, sums closely."""

import itertools

import pytest
import torch

from fastflat._ops import compute_dtype
from fastflat._spec import MINIFLOATS, RULES, TINY
from fastflat.backends import reference
from fastflat.backends.reference import _noise
from fastflat.backends.reference.layout import blocked, broadcast

from .cases import LAYOUTS, PAIRS, TORCH, Layout, data, grid, parameters, same_bits, sum_over_scale


def rules_of(*names):
    return sum(RULES[name] for name in names)


INSIDE = rules_of("zero_inside", "zero_float")
NOISES = ("round_stochastic", "noise_uniform", "noise_normal", "noise_temper", "noise_bypass")
RULE_SETS = [
    0,
    TORCH,
    INSIDE,
    rules_of("mask_none"),
    rules_of("nan_passes", "mask_after") | INSIDE,
    rules_of("rectified", "mask_after", "through_chain") | INSIDE,
    *(RULES[name] for name in ("round_away", "pact", "binary", "through_chain", *MINIFLOATS, *NOISES)),
    rules_of("round_away", "mask_after", "zero_inside"),
    rules_of("noise_temper", "mask_after") | TORCH,
    rules_of("noise_uniform", "reciprocal"),
    rules_of("noise_normal", "zero_inside"),
    rules_of("e2m1", "round_stochastic"),
    rules_of("e4m3", "mask_after"),
    rules_of("e2m1", "noise_uniform"),
    rules_of("e2m1", "noise_temper"),
    rules_of("e4m3", "noise_bypass"),
    rules_of("binary", "round_stochastic"),
    rules_of("compute_input", "reciprocal"),
    rules_of("compute_input", "mask_after", "zero_inside"),
    rules_of("compute_input", "through_chain"),
    rules_of("through_chain", "reciprocal", "positive_zero", "mask_after"),
    rules_of("inverse", "mask_absmax"),
    rules_of("inverse", "mask_none"),
]
NO_ZERO_POINT = rules_of("binary", "inverse", *MINIFLOATS)
DRAWS = rules_of(*NOISES)
STATE = torch.tensor([-123456789123456789, 987654321])

ENDS = [(-1, 0), (-4, 0), (0, 1), (1, 3), (-3, -1)]
EVERY_RULE = [pytest.param(Layout((2, 6, 5, 5), axis=1), *case) for case in itertools.product(PAIRS, RULE_SETS)]
EVERY_LAYOUT = [
    pytest.param(layout, pair, RULE_SETS[i % len(RULE_SETS)])
    for i, (layout, pair) in enumerate(itertools.product(LAYOUTS, PAIRS))
]
every_case = pytest.mark.parametrize(
    ("layout", "pair", "rules", "seed"),
    [pytest.param(*case.values, i, id="{}-{}-{}-{}".format(i, *case.values)) for i, case in enumerate(EVERY_LAYOUT)]
    + [pytest.param(*c.values, i, id="rules-{1}-{2}".format(*c.values)) for i, c in enumerate(EVERY_RULE)],
)


def arguments(layout, dtype, rules, seed):
    """scale, zero_point, state, nu, a, and the grid; scalars are there or not, and rules fit the type."""
    if rules & RULES["compute_input"] and dtype.itemsize != 2:
        rules &= ~RULES["compute_input"]
    scale, zero_point = parameters(layout, dtype, seed, seed % 3 != 0 and not rules & NO_ZERO_POINT)
    if rules & RULES["compute_input"]:
        scale = scale.to(dtype).to(scale.dtype)
    if rules & RULES["inverse"]:
        scale = scale.abs() * 4
    scalars = [torch.tensor(v, dtype=scale.dtype) for v in (0.7, 0.3)] if seed % 2 else [None, None]
    state = STATE + seed if rules & DRAWS else None
    return scale, zero_point, state, *scalars, *grid(layout, rules, 2 + seed % 7, seed % 2 == 0)


@every_case
def test_forward(emulated, layout, pair, rules, seed):
    x = data(layout, pair[0], seed)
    args = (x, *arguments(layout, pair[0], rules, seed), pair[1])
    assert same_bits(emulated.general_quantize(*args), reference.general_quantize(*args))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("rules", [0, *(RULES[name] for name in NOISES[:3])])
def test_grids_that_end_at_zero_or_beyond(emulated, rules, ends, pair):
    layout = Layout((2049,))
    x, gy = data(layout, pair[0], 3) / 8, data(layout, pair[1], 4, special=False)
    args = (*arguments(layout, pair[0], rules, 3)[:5], *ends, layout.axis, layout.group, TINY, rules)
    args = (args[0], None, *args[2:])
    assert same_bits(emulated.general_quantize(x, *args, pair[1]), reference.general_quantize(x, *args, pair[1]))
    back = (gy, x, *args[:5], None, *args[5:], 0.37, False, False)
    assert same_bits(emulated.general_quantize_bwd(*back)[0], reference.general_quantize_bwd(*back)[0])


@every_case
def test_jvp(emulated, layout, pair, rules, seed):
    x = data(layout, pair[0], seed)
    args = arguments(layout, pair[0], rules, seed)
    tx = data(layout, pair[seed % 2], seed + 1, special=False)
    ts, tz = torch.randn_like(args[0]), torch.randn_like(args[0])
    tangents = tx if seed % 4 else None, ts if seed % 3 else None, tz if args[1] is not None and seed % 5 else None
    args = (*tangents, x, *args, 0.37, pair[1])
    assert same_bits(emulated.general_quantize_jvp(*args), reference.general_quantize_jvp(*args))


@every_case
def test_backward(emulated, layout, pair, rules, seed):
    x, gy = data(layout, pair[0], seed), data(layout, pair[1], seed + 1, special=False)
    args = arguments(layout, pair[0], rules, seed)
    scale, zero_point, delta = args[0], args[1], torch.tensor(0.4, dtype=args[0].dtype)
    full = (gy, x, *args[:5], delta, *args[5:], 0.37)
    expected = reference.general_quantize_bwd(*full, True, True)
    results = []
    for order in (0, 1, 2):
        emulated.module.set_order(order)
        results.append(emulated.general_quantize_bwd(*full, True, True))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    assert same_bits(results[0][0], expected[0])
    # Magnitudes of the terms: fp32 partial sums are close to fp64 ones in units of them.
    without = (gy, x, *args[:5], None, *args[5:], 0.37)
    straight = reference.general_quantize_bwd(*without, False, False)[0]
    extra = (expected[0].double() - straight.double()).abs()
    reach = broadcast(scale.double().clamp(min=args[9]), x, layout.axis, layout.group)
    per_unit = args[6] / reach if rules & RULES["inverse"] else 1 / reach
    u = (blocked(x, layout.group).double() * per_unit).reshape(x.shape)
    share = reference.general_quantize_jvp(None, torch.ones_like(scale), None, x.to(scale.dtype), *args_wide(args), 1.0)
    size = (gy.double() * share.double()).abs() + product(extra, u) + gy.double().abs()
    _, gs, gz, gd = results[0]
    assert_close_sums(gs, expected[1], sum_over_scale(size, layout))
    if zero_point is None:
        assert gz.numel() == 0
    else:
        size = scale.clamp(min=args[9]).double() * sum_over_scale(gy.double().abs() + extra, layout)
        assert_close_sums(gz, expected[2], size)
    assert_close_sums(gd, expected[3], product(extra / 0.4 + straight.double().abs(), x.double()).sum())
    # What is not asked for is left out and changes no bit of the rest.
    alone = emulated.general_quantize_bwd(*full, False, False)
    assert same_bits(alone[0], expected[0])
    assert [t.numel() for t in alone[1:]] == [0, 0, 0]
    only_delta = emulated.general_quantize_bwd(*full, False, True)
    assert same_bits(only_delta[3], gd)
    no_delta = emulated.general_quantize_bwd(*full, True, False)
    assert same_bits(no_delta[1], gs)
    assert no_delta[3].numel() == 0
    plain = emulated.general_quantize_bwd(*without, True, True)
    assert same_bits(plain[0], straight)
    size = sum_over_scale((gy.double() * share.double()).abs(), layout)
    assert_close_sums(plain[1], reference.general_quantize_bwd(*without, True, False)[1], size)
    assert plain[3].numel() == 0


def product(a, b):
    """|a b|, and 0 where a is: infinite data beyond the mask."""
    return torch.where(a == 0, 0.0, (a * b).abs())


def args_wide(args):
    """The same arguments for data in the compute type."""
    return *args[:10], args[10] & ~RULES["compute_input"]


def assert_close_sums(got, want, magnitude):
    info = torch.finfo(want.dtype)
    close = (got - want).abs().double() <= 16 * info.eps * magnitude + info.tiny
    assert (close | (got == want) | (got.isnan() & want.isnan())).all()


@pytest.mark.parametrize("rules", [0, RULES["noise_temper"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout",
    [
        Layout((1 << 18,)),
        Layout((64, 4096), axis=0),
        Layout((16, 16, 32, 32), axis=1),
        Layout((1 << 16, 64), axis=1),
        Layout((64, 4096), group=32),
    ],
    ids=str,
)
def test_bytes_moved(emulated, layout, dtype, rules):
    """Noise costs no memory, and the three sums next to none."""
    x = data(layout, dtype, 0, special=False)
    scale, zero_point = parameters(layout, dtype, 0, True)
    half = torch.tensor(0.5)
    args = (x, scale, zero_point, STATE, half, half)
    rest, size = grid(layout, rules), x.numel() * dtype.itemsize

    def moved(call, *args):
        emulated.module.take_counts()
        call(*args)
        counts = emulated.module.take_counts()
        return counts["read"], counts["written"]

    assert moved(emulated.general_quantize, *args, *rest) == (size, size)
    assert moved(emulated.general_quantize_jvp, x, scale, None, *args, *rest, 1.0) == (2 * size, size)
    backward = (x, *args, half, *rest, 1.0)
    assert moved(emulated.general_quantize_bwd, *backward, False, False) == (2 * size, size)
    for need_delta in (False, True):
        read, written = moved(emulated.general_quantize_bwd, *backward, True, need_delta)
        assert 2 * size <= read
        assert size <= written
        assert read + written <= 1.05 * 3 * size


@pytest.mark.parametrize("rules", [RULES["round_away"], RULES["round_stochastic"], RULES["noise_normal"]])
def test_maps_do_not_depend_on_the_order_of_blocks_and_threads(emulated, rules):
    layout = Layout((3, 16, 9, 9), 1, 0, True)
    x = data(layout, torch.bfloat16, 0)
    scale, zero_point = parameters(layout, torch.bfloat16, 0, True)
    args = (x, scale, zero_point, STATE, None, None, *grid(layout, rules))
    expected = reference.general_quantize(*args)
    for order in (1, 2, 3):
        emulated.module.set_order(order)
        assert same_bits(emulated.general_quantize(*args), expected)


def test_rules_that_draw_are_refused_without_a_state(emulated):
    layout = Layout((9,))
    x = data(layout, torch.float32, 0)
    scale, _ = parameters(layout, torch.float32, 0, False)
    with pytest.raises(RuntimeError, match="cudaError_t 1"):
        emulated.general_quantize(x, scale, None, None, None, None, *grid(layout, RULES["noise_uniform"]))
    assert emulated.module.take_counts()["launches"] == 0


def test_misaligned_storage_is_refused_and_untouched(emulated):
    x, scale = torch.ones(33)[1:], torch.ones(())
    args = (x, scale, None, None, None, None, *grid(Layout((32,)), 0))
    with pytest.raises(RuntimeError, match="716"):
        emulated.general_quantize(*args)
    with pytest.raises(RuntimeError, match="716"):
        emulated.general_quantize_bwd(x, *args[:6], scale, *args[6:], 1.0, True, True)
    assert emulated.module.take_counts()["launches"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rules", [RULES["round_stochastic"], RULES["noise_normal"]])
def test_the_draw_of_an_element_is_that_of_its_storage_offset(emulated, dtype, rules):
    """Elements that a pack, a block and a grid of threads see at other places draw what the reference draws there."""
    n, layout = 20000, Layout((20000,))
    x = torch.full((n,), 0.5, dtype=dtype)
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    y = emulated.general_quantize(x, one, None, STATE, None, None, *grid(layout, rules, 8))
    if rules == RULES["round_stochastic"]:
        expected = (_noise.uniform(STATE, n) < 0.5).to(dtype)
    else:
        expected = (x.to(one.dtype) + _noise.normal(STATE, n).to(one.dtype)).to(dtype)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("rule", ["absmax", "floor", "ceil", "even", "rceil", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dynamic_scales(emulated, rule, dtype):
    outer = torch.tensor(0.01, dtype=compute_dtype(dtype)) if rule == "e4m3" else None
    places = {
        "e2m1": Layout((6, 96), group=32),
        "e4m3": Layout((3, 2049), axis=0),
        "e5m2": Layout((2, 6, 5, 5), axis=1),
        "e3m2": Layout((16385,)),
        "e2m3": Layout((0, 32), group=16),
    }
    for name, layout in places.items():
        x = data(layout, dtype, 3)
        rules = RULES[name] | (RULES[f"scale_{rule}"] if rule != "absmax" else 0)
        call = (x, None, None, None, outer, 0, 0, layout.axis, layout.group, TINY, rules)
        expected = reference.general_quantize_dynamic(*call)
        for got, want in zip(emulated.general_quantize_dynamic(*call), expected, strict=True):
            assert same_bits(got, want)
