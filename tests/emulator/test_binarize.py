# SPDX-License-Identifier: Apache-2.0
"""The binarize kernels, executed from their .cu source, against the reference."""

import itertools

import pytest
import torch

from fastflat._ops import compute_dtype, scale_shape
from fastflat.backends import reference

from .cases import LAYOUTS, PAIRS, Layout, data, same_bits, sum_over_scale
from .emulated import expanded

KINDS = ("none", "full", "shared")
# Every layout; storage pairs and kinds of importance walk along, so that each regime meets most of them.
CASES = [
    pytest.param(layout, PAIRS[(i + j) % len(PAIRS)], KINDS[i % 3], i, id=f"{layout}-{i}")
    for i, (layout, j) in enumerate(itertools.product(LAYOUTS, (0, 2)))
]
NAMES = ("layout", "pair", "kind", "seed")
every_case = pytest.mark.parametrize(NAMES, CASES)
some_cases = pytest.mark.parametrize(NAMES, CASES[::5] + CASES[2::5])  # 5 is prime to the walks


def importance(kind, layout, dtype, seed):
    """Multiples of 1/8, a tenth of them 0."""
    if kind == "none":
        return None
    shape = list(layout.shape)
    if kind == "shared" and shape:
        shape[layout.axis] = 1
    h = torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(seed)) / 8
    return h.to(compute_dtype(dtype))


def dyadic(layout, dtype, seed):
    """Multiples of 1/8 up to 2: their sums, and those of their products with importance, are exact in every type."""
    x = data(layout, dtype, seed, special=False)
    return (x * 8).round().div(8).clamp(-2, 2)


def scales(layout, dtype, seed):
    shape = scale_shape(torch.Size(layout.shape), layout.axis, layout.group)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=compute_dtype(dtype))


def ops_on(emulated, x, gy, h, alpha, ga, layout, result):
    """(results of the kernels, results of the reference) for every form of the ops."""
    where = (layout.axis, layout.group)
    tx = gy.to(x.dtype)
    for backend in (emulated, reference):
        yield [
            *backend.binarize(x, h, *where, result),
            backend.binarize_bwd(gy, None, x, h, alpha, 0.8, False, *where),
            backend.binarize_bwd(gy, ga, x, h, alpha, 0.8, False, *where),
            backend.binarize_bwd(gy, None, x, h, alpha, 0.8, True, *where),
            backend.binarize_bwd(gy, ga, x, h, alpha, 0.8, True, *where),
            *backend.binarize_jvp(tx, x, h, alpha, 0.8, False, *where, result),
            *backend.binarize_jvp(tx, x, h, alpha, 0.8, True, *where, result),
        ]


@every_case
def test_every_bit_where_sums_are_exact(emulated, layout, pair, kind, seed):
    x, gy = dyadic(layout, pair[0], seed), dyadic(layout, pair[1], seed + 1)
    h, alpha, ga = importance(kind, layout, pair[0], seed), scales(layout, pair[0], seed), scales(layout, pair[0], -1)
    for got, want in zip(*ops_on(emulated, x, gy, h, alpha, ga, layout, pair[1]), strict=True):
        assert same_bits(got, want)


@some_cases
def test_special_values_go_through_the_maps(emulated, layout, pair, kind, seed):
    """Without sums, and with alpha as it comes: any bits of x and of the cotangent."""
    x, gy = data(layout, pair[0], seed), data(layout, pair[1], seed + 1)
    h, where = importance(kind, layout, pair[0], seed), (layout.axis, layout.group)
    y, alpha = emulated.binarize(x, h, *where, pair[1])
    one = scales(layout, pair[0], seed)
    plain = emulated.binarize_jvp(x, x, h, one, 0.8, False, *where, pair[1])[0]
    assert same_bits(plain, reference.binarize_jvp(x, x, h, one, 0.8, False, *where, pair[1])[0])
    args = (gy, None, x, h, alpha, 0.8, False, *where)
    assert same_bits(emulated.binarize_bwd(*args), reference.binarize_bwd(*args))
    # y is sign(x) alpha: the straight-through part of a tangent that is the sign, nowhere clipped.
    sign = torch.where(x.isnan(), x, torch.where(x < 0, -1.0, 1.0).to(x.dtype))
    assert same_bits(y, reference.binarize_jvp(sign, torch.zeros_like(x), None, alpha, 1.0, False, *where, pair[1])[0])


@some_cases
def test_sums_are_close_and_do_not_depend_on_the_order(emulated, layout, pair, kind, seed):
    x, tx = data(layout, pair[0], seed, special=False), data(layout, pair[0], seed + 1, special=False)
    h, where = importance(kind, layout, pair[0], seed), (layout.axis, layout.group)
    gy, ga = tx.to(pair[1]), scales(layout, pair[0], -1)
    runs = []
    for order in (0, 1, 2):
        emulated.module.set_order(order)
        y, alpha = emulated.binarize(x, h, *where, pair[1])
        gx = emulated.binarize_bwd(gy, ga, x, h, alpha, 0.8, True, *where)
        runs.append((y, alpha, gx, *emulated.binarize_jvp(tx, x, h, alpha, 0.8, True, *where, pair[1])))
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))
    _, alpha, _, _, ta = runs[0]
    want = reference.binarize(x, h, *where, pair[1])[1]
    eps, tiny = torch.finfo(want.dtype).eps, torch.finfo(want.dtype).tiny
    assert ((alpha - want).abs() <= 8 * eps * want.abs()).all()
    want = reference.binarize_jvp(tx, x, h, alpha, 0.8, True, *where, pair[1])[1]
    weight = torch.ones_like(x, dtype=torch.float64) if h is None else expanded(h, x).double()
    size = sum_over_scale((weight * tx.double()).abs(), layout) / sum_over_scale(weight, layout)
    assert ((ta - want).abs().double() <= 8 * eps * size.nan_to_num(0.0) + tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", [Layout((1 << 18,)), Layout((64, 4096), axis=0), Layout((1 << 12, 64), axis=1)], ids=str
)
def test_bytes_moved(emulated, layout, dtype):
    """A sum and a map: two passes; importance is read where it counts; partial sums are written and read once."""
    x = data(layout, dtype, 0, special=False)
    h, alpha = importance("full", layout, dtype, 0), scales(layout, dtype, 0)
    where, size, weights = (layout.axis, layout.group), x.numel() * dtype.itemsize, h.numel() * h.itemsize
    plan = emulated.module.reduce_plan(emulated.geometry(x, *where), 16 // dtype.itemsize)
    partials = 0 if plan["direct"] else plan["parts"] * plan["width"] * h.itemsize

    def check(call, *args, reads, sums):
        emulated.module.take_counts()
        call(*args)
        counts = emulated.module.take_counts()
        moved = sums * partials
        assert (counts["read"], counts["written"]) == (reads + moved, size + moved)

    check(emulated.binarize, x, None, *where, reads=2 * size, sums=1)
    check(emulated.binarize, x, h, *where, reads=2 * size + weights, sums=2)
    rest = (alpha, 1.0, True, *where)
    check(emulated.binarize_bwd, x, None, x, None, *rest, reads=4 * size, sums=1)
    check(emulated.binarize_bwd, x, None, x, h, *rest, reads=4 * size + 2 * weights, sums=2)
    check(emulated.binarize_jvp, x, x, h, *rest, reads=4 * size + weights, sums=2)
    rest = (alpha, 1.0, False, *where)
    check(emulated.binarize_bwd, x, None, x, h, *rest, reads=2 * size, sums=0)
    check(emulated.binarize_bwd, x, alpha, x, None, *rest, reads=2 * size, sums=0)
    check(emulated.binarize_bwd, x, alpha, x, h, *rest, reads=2 * size + 2 * weights, sums=2)
