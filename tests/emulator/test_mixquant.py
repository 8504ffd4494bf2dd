# SPDX-License-Identifier: Apache-2.0
"""The mixquant kernels, executed from their .cu source, against the reference: maps bit for bit, sums closely."""

import itertools

import pytest
import torch

from fastflat._ops import compute_dtype, scale_shape
from fastflat._spec import TINY
from fastflat.backends import reference

from .cases import LAYOUTS, PAIRS, RULE_SETS, Layout, data, same_bits, sum_over_scale

WIDTHS = (3, 2, 8, 1, 4, 16, 6, 5)
# Every second layout with every storage pair; rules and the number of candidates walk along.
CASES = [
    pytest.param(layout, pair, RULE_SETS[i % len(RULE_SETS)], 1 + i % 8, i, id=f"{layout}-{str(pair[0])[6:]}-{i}")
    for i, (layout, pair) in enumerate(itertools.product(LAYOUTS[::2], PAIRS))
]
every_case = pytest.mark.parametrize(("layout", "pair", "rules", "count", "seed"), CASES)


def mixture(layout, dtype, count, seed):
    """(scale, qmin, qmax, weight) and factor; where there are three or more, one weight is 0 and its scale infinite."""
    g = torch.Generator().manual_seed(seed)
    compute = compute_dtype(dtype)
    shape = (count, *scale_shape(torch.Size(layout.shape), layout.axis, layout.group))
    scale = torch.rand(shape, generator=g, dtype=compute) * 0.8 + 0.1
    low = torch.tensor([-(2.0 ** (b - 1)) for b in WIDTHS[:count]], dtype=compute)
    weight = torch.randn(count, generator=g, dtype=compute)
    if count > 2:
        weight[1], scale[1] = 0, torch.inf
    return (scale, low, -low - 1, weight), torch.rand(count, generator=g, dtype=compute)


def arguments(layout, rules):
    return layout.axis, layout.group, TINY, rules


@every_case
def test_forward(emulated, layout, pair, rules, count, seed):
    x = data(layout, pair[0], seed)
    candidates, _ = mixture(layout, pair[0], count, seed)
    args = (x, *candidates, *arguments(layout, rules), pair[1])
    assert same_bits(emulated.mixquant(*args), reference.mixquant(*args))


@every_case
def test_jvp(emulated, layout, pair, rules, count, seed):
    x = data(layout, pair[0], seed)
    candidates, factor = mixture(layout, pair[0], count, seed)
    tx = data(layout, pair[seed % 2], seed + 1, special=False)
    ts, tw = torch.randn_like(candidates[0]), torch.randn_like(factor)
    tangents = [tx if seed % 4 else None, ts if seed % 3 else None, tw if seed % 5 else None]
    args = (*tangents, x, *candidates, factor, *arguments(layout, rules), pair[1])
    assert same_bits(emulated.mixquant_jvp(*args), reference.mixquant_jvp(*args))


@every_case
def test_backward(emulated, layout, pair, rules, count, seed):
    x = data(layout, pair[0], seed)
    gy = data(layout, pair[1], seed + 1, special=False)
    candidates, factor = mixture(layout, pair[0], count, seed)
    args = (gy, x, *candidates, factor, *arguments(layout, rules))
    results = []
    for order in (0, 1, 2):
        emulated.module.set_order(order)
        results.append(emulated.mixquant_bwd(*args))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    expected = reference.mixquant_bwd(*args)
    assert same_bits(results[0][0], expected[0])
    wide, one = x.to(factor.dtype), torch.ones(1, dtype=factor.dtype)
    for j in range(count):
        # The magnitudes of the terms: tangents of this candidate alone, by its scale and by its weight.
        alone = (wide, *(p[j : j + 1] for p in candidates[:3]), one, one, *arguments(layout, rules))
        by_scale = reference.mixquant_jvp(None, torch.ones_like(candidates[0][:1]), None, *alone).double()
        by_weight = reference.mixquant_jvp(None, None, one, *alone).double()
        size = (candidates[3][j] * factor[j]).abs() * sum_over_scale((gy.double() * by_scale).abs(), layout)
        assert_close_sums(results[0][1][j], expected[1][j], size)
        assert_close_sums(results[0][2][j], expected[2][j], (gy.double() * by_weight).abs().sum())


def assert_close_sums(got, want, magnitude):
    info = torch.finfo(want.dtype)
    close = (got - want).abs().double() <= 16 * info.eps * magnitude + info.tiny
    assert (close | (got == want) | (got.isnan() & want.isnan())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "count"),
    [(Layout((1 << 18,)), 4), (Layout((64, 4096), axis=0), 4), (Layout((1 << 16, 64), axis=1), 2)],
    ids=str,
)
def test_bytes_moved(emulated, layout, count, dtype):
    """Data are read once whatever the number of candidates; partial sums stay small beside them."""
    x = data(layout, dtype, 0, special=False)
    candidates, factor = mixture(layout, dtype, count, 0)
    rest, size = arguments(layout, 0), x.numel() * dtype.itemsize

    def moved(call, *args):
        emulated.module.take_counts()
        call(*args)
        counts = emulated.module.take_counts()
        return counts["read"], counts["written"]

    assert moved(emulated.mixquant, x, *candidates, *rest) == (size, size)
    assert moved(emulated.mixquant_jvp, x, None, None, x, *candidates, factor, *rest) == (2 * size, size)
    read, written = moved(emulated.mixquant_bwd, x, x, *candidates, factor, *rest)
    assert 2 * size <= read
    assert size <= written
    # Blocks that own columns leave two sums a candidate and column each: a sixth of the data at this size.
    slack = 1.2 if layout.axis == 1 else 1.05
    assert read + written <= slack * 3 * size
