# SPDX-License-Identifier: Apache-2.0
"""Binarization: the raw ops against the reference, and what its scale and gradient are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat as ff
from fastflat._ops import compute_dtype, scale_shape
from fastflat.backends import reference
from fastflat.backends.reference.layout import blocked, broadcast

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
    ((), -1, 0),
    ((1,), 0, 0),
    ((33,), -1, 0),
    ((33,), 0, 0),
    ((5, 3, 7), 0, 0),
    ((5, 3, 7), 1, 0),
    ((5, 3, 7), 2, 0),
    ((70, 515), 0, 0),
    ((70, 515), 1, 0),
    ((3, 130, 67), 1, 0),
    ((6, 32), -1, 8),
    ((3, 130), -1, 65),
    ((0,), -1, 0),
    ((0, 4), 1, 0),
    ((4, 0), 0, 0),
]


def importance(kind, x, axis, seed=9):
    if kind == "none":
        return None
    shape = list(x.shape)
    if kind == "shared" and shape:
        shape[axis] = 1
    h = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(h < 0.1, 0.0, h).to(compute_dtype(x.dtype))


def weights(x, h, axis, group):
    """1 / sum h of each scale, and h in the blocked shape."""
    full = torch.ones_like(x, dtype=torch.float64) if h is None else h.double().expand_as(x)
    full = blocked(full, group)
    total = full.sum(-1) if group else full.sum() if axis < 0 else full.sum([d for d in range(x.dim()) if d != axis])
    return torch.where(total == 0, 0.0, 1 / total), full


def assert_close_sums(got, want, magnitude):
    """Values whose error is that of a sum of terms of the given magnitude."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    bound = 32 * torch.finfo(want.dtype).eps * magnitude + torch.finfo(want.dtype).tiny
    ok = ((got.double() - want.double()).abs() <= bound) | (got == want) | (got.isnan() & want.isnan())
    assert ok.all(), f"got {got[~ok].tolist()[:5]}, want {want[~ok].tolist()[:5]}"


def spread(values, x, axis, group):
    return broadcast(values, x, axis, group).expand_as(blocked(x, group)).reshape(x.shape)


def compare(x, gy, h, axis, group, result):
    """The three ops as the dispatcher finds them, against the reference."""
    y, alpha = ops.binarize(x, h, axis, group, result)
    _, want = reference.binarize(x, h, axis, group, result)
    inverse, full = weights(x, h, axis, group)
    assert alpha.shape == scale_shape(x.shape, axis, group)
    # Terms are not negative: the error is relative.
    assert_close_sums(alpha, want, want.double().abs())
    sign = torch.where(x < 0, -1.0, 1.0).to(alpha.dtype).masked_fill(x.isnan(), math.nan)
    common.assert_same_bits(y, torch.empty_like(y).copy_(sign * spread(alpha, x, axis, group)))
    rule = (0.8, False, axis, group)
    common.assert_same_bits(
        ops.binarize_bwd(gy, None, x, h, alpha, *rule), reference.binarize_bwd(gy, None, x, h, alpha, *rule)
    )
    ga = torch.linspace(-1, 1, alpha.numel(), dtype=alpha.dtype).reshape(alpha.shape)
    tx = gy.to(x.dtype)
    magnitude = gy.double().abs().sum() + 1
    for through, cotangent in ((True, None), (True, ga), (False, ga)):
        rule = (0.8, through, axis, group)
        got, want = (f.binarize_bwd(gy, cotangent, x, h, alpha, *rule) for f in (ops, reference))
        assert got.stride() == want.stride()
        terms = magnitude * spread(inverse, x, axis, group) * full.reshape(x.shape)
        terms = terms + (gy.double() * spread(alpha.double(), x, axis, group)).abs()
        assert_close_sums(got, want, terms.nan_to_num(math.inf, math.inf, math.inf))
        (ty, ta), (wanted_y, wanted_a) = (f.binarize_jvp(tx, x, h, alpha, *rule, result) for f in (ops, reference))
        assert ty.stride() == wanted_y.stride()
        moved = inverse * tx.double().abs().sum() * (1 if h is None else h.max() if h.numel() else 1)
        assert_close_sums(ta, wanted_a, moved)
        terms = spread(moved, x, axis, group) + (tx.double() * spread(alpha.double(), x, axis, group)).abs()
        assert_close_sums(ty, wanted_y, terms.nan_to_num(math.inf, math.inf, math.inf))


@every_pair
@pytest.mark.parametrize("kind", ["none", "full", "shared"])
@pytest.mark.parametrize("special", [False, True], ids=["ordinary", "special"])
def test_ops_are_the_reference(pair, kind, special):
    for seed, (shape, axis, group) in enumerate(LAYOUTS):
        x = common.random_data(shape, pair[0], seed, special)
        gy = common.random_data(shape, pair[1], seed + 50, special=False)
        compare(x, gy, importance(kind, x, axis), axis, group, pair[1])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    pair=st.sampled_from(PAIRS),
    kind=st.sampled_from(["none", "full", "shared"]),
    axis=st.integers(-1, 3),
    seed=st.integers(0, 1000),
)
def test_ops_are_the_reference_anywhere(shape, pair, kind, axis, seed):
    axis = min(axis, len(shape) - 1)
    x = common.random_data(shape, pair[0], seed, special=False)
    gy = common.random_data(shape, pair[1], seed + 1, special=False)
    compare(x, gy, importance(kind, x, axis), axis, 0, pair[1])


@pytest.mark.parametrize("axis", [-1, 0, 1, 3])
@pytest.mark.parametrize("kind", ["none", "full", "shared"])
def test_layouts(axis, kind):
    x = common.random_data((4, 6, 5, 3), seed=3, special=False)
    gy = common.random_data((4, 6, 5, 3), seed=4, special=False)
    channels_last = x.to(memory_format=torch.channels_last)
    strided = torch.stack([x, x], -1)[..., 0]
    h = importance(kind, x, axis)
    want = ops.binarize(x, h, axis, 0)
    for view in (channels_last, strided, x.transpose(0, 3).contiguous().transpose(0, 3)):
        compare(view, gy, h, axis, 0, torch.float32)
        torch.testing.assert_close(ops.binarize(view, h, axis, 0), want, rtol=1e-6, atol=0)
    if h is not None:
        other = torch.stack([h, h], -1)[..., 0]
        assert torch.equal(ops.binarize(x, other, axis, 0)[0], want[0])


@pytest.mark.parametrize(("shape", "axis"), [((300001,), -1), ((70, 3001), 0), ((30001, 7), 1)])
def test_sums_do_not_depend_on_threads(shape, axis):
    x, gy = torch.randn(shape), torch.randn(shape)
    h = torch.rand(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            y, alpha = ops.binarize(x, h, axis, 0)
            results.append((y, alpha, ops.binarize_bwd(gy, None, x, h, alpha, 1.0, True, axis, 0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_scale_is_the_mean_magnitude_without_importance(on_backend):
    x = torch.randn(7, 40, dtype=torch.float64)
    for axis, want in ((None, x.abs().mean()), (0, x.abs().mean(1)), (-1, x.abs().mean(0))):
        y, alpha = ff.binarize(x, axis=axis, return_scale=True)
        torch.testing.assert_close(alpha, want, rtol=1e-14, atol=0)
        assert torch.equal(ff.binarize(x, torch.ones_like(x), axis=axis), y)
    y, alpha = ff.binarize(x, group=8, return_scale=True)
    torch.testing.assert_close(alpha, x.abs().view(7, 5, 8).mean(-1), rtol=1e-14, atol=0)


def test_scale_loses_least_of_all_on_a_grid(on_backend):
    torch.manual_seed(1)
    x, h = torch.randn(3, 200, dtype=torch.float64), torch.rand(200, dtype=torch.float64) ** 3
    alpha = ff.binarize(x, h, axis=0, return_scale=True)[1]
    grid = torch.linspace(0.2, 2.0, 1801, dtype=torch.float64)
    # sum h (x - a sign x)^2 = sum h x^2 - 2 a sum h|x| + a^2 sum h, evaluated from its definition
    loss = torch.stack([(h * (x - a * x.sign()) ** 2).sum(1) for a in grid])
    best = grid[loss.argmin(0)]
    assert ((alpha - best).abs() <= 0.5 * (grid[1] - grid[0]) * 1.001).all()
    assert (alpha - x.abs().mean(1)).abs().max() > 1e-2


def test_importance_shapes_say_the_same(on_backend):
    x, h = torch.randn(4, 5, 3), torch.rand(4, 3)
    want = ff.binarize(x, h.unsqueeze(1).expand(4, 5, 3).contiguous(), axis=1)
    assert torch.equal(ff.binarize(x, h, axis=1), want)
    assert torch.equal(ff.binarize(x, h.unsqueeze(1), axis=-2), want)
    assert torch.equal(
        ff.binarize(x, torch.full((1, 1, 1), 0.5), axis=1), ff.binarize(x, torch.full_like(x, 0.5), axis=1)
    )
    low = x.bfloat16()
    assert torch.equal(ff.binarize(low, h.bfloat16(), axis=1), ff.binarize(low, h.bfloat16().float(), axis=1))


def test_edges(on_backend):
    inf, nan = math.inf, math.nan
    x = torch.tensor([[0.0, -0.0, 1.0], [nan, 1.0, -1.0], [inf, -1.0, 1.0], [1.0, -2.0, 3.0]])
    h = torch.ones_like(x)
    h[3] = 0
    y, alpha = ff.binarize(x, h, axis=0, return_scale=True)
    assert torch.equal(alpha[[0, 2, 3]], torch.tensor([1 / 3, inf, 0.0]))
    assert alpha[1].isnan()
    assert torch.equal(y[0], alpha[0].expand(3)), "sign of both zeros is +1"
    assert y[1].isnan().all()
    assert torch.equal(y[2], torch.tensor([inf, -inf, inf]))
    assert torch.equal(y[3], torch.zeros(3))
    leaf = x[3:].clone().requires_grad_()
    ff.binarize(leaf, h[3:], axis=0).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros(1, 3)), "no importance, no gradient"
    for shape, axis in (((0,), None), ((4, 0), 0), ((0, 4), 1)):
        y, alpha = ff.binarize(torch.empty(shape), axis=axis, return_scale=True)
        assert y.shape == shape
        assert torch.equal(alpha, torch.zeros_like(alpha))


def test_a_cast_in_the_same_pass(on_backend):
    x = torch.randn(6, 40, requires_grad=True)
    y = ff.binarize(x, axis=0, dtype=torch.bfloat16)
    assert torch.equal(y, ff.binarize(x, axis=0).bfloat16())
    gy = torch.randn(6, 40).bfloat16()
    (cast,) = torch.autograd.grad(y, x, gy)
    (plain,) = torch.autograd.grad(ff.binarize(x, axis=0), x, gy.float())
    assert torch.equal(cast, plain)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"x": [1.0]}, "x must be a tensor, got list"),
        ({"x": torch.ones(3, dtype=torch.int32)}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"axis": 2}, r"axis must lie in \[-2, 1\] for x of shape \[4, 6\], got 2"),
        ({"axis": 0.5}, "axis must be an int or None, got float"),
        ({"group": 4}, r"group must divide the last axis of x, of shape \[4, 6\], got 4"),
        ({"group": 3, "axis": 0}, "group must be None when axis is given, got 3"),
        ({"clip": 0.0}, "clip must be positive, got 0.0; math.inf lets all gradients pass"),
        ({"clip": math.nan}, "clip must be positive, got nan"),
        ({"clip": "1"}, "clip must be a number, got str"),
        ({"importance": 1.0}, "importance must be a tensor, got float"),
        ({"importance": torch.ones(6)}, r"importance must have shape \[4, 6\], with 1 for any size, got \[6\]"),
        ({"importance": torch.ones(4), "axis": 0}, r"with 1 for any size, or \[6\], got \[4\]"),
        ({"importance": torch.ones(4, 6, dtype=torch.float64)}, "importance must be torch.float32, got torch.float64"),
        ({"importance": torch.ones(4, 6, requires_grad=True)}, "importance must need no gradient"),
        ({"dtype": torch.float64}, "dtype must be one of"),
    ],
)
def test_bad_input_in_one_line(kwargs, text):
    arguments = {"x": torch.ones(4, 6), "importance": None, **kwargs}
    with pytest.raises((TypeError, ValueError), match=f"fastflat::binarize: .*{text}") as failure:
        ff.binarize(arguments.pop("x"), arguments.pop("importance"), **arguments)
    assert "\n" not in str(failure.value)


def test_opcheck():
    x, h = torch.randn(4, 6), torch.rand(4, 6)
    alpha = torch.rand(4)
    rule = (1.0, True, 0, 0)
    for name, args in (
        ("binarize", (x, h, 0, 0, torch.bfloat16)),
        ("binarize_bwd", (x, alpha, x, h, alpha, *rule)),
        ("binarize_jvp", (x, x, None, alpha, *rule)),
    ):
        torch.library.opcheck(getattr(ops, name).default, args, test_utils=("test_schema", "test_faketensor"))
