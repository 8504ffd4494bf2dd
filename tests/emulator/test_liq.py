# SPDX-License-Identifier: Apache-2.0
"""The liq kernels, executed from their .cu source, against the reference: maps bit for bit, sums closely."""

import math

import pytest
import torch

from fastflat._ops import compute_dtype, scale_shape
from fastflat.backends import reference

from .cases import LAYOUTS, PAIRS, Layout, data, same_bits

EPS = 1e-8
# The last has more channels than one team sums.
WITHOUT_GROUPS = [*(layout for layout in LAYOUTS if not layout.group), Layout((2, 10001), axis=1)]
# Every layout with two of the six storage pairs; the levels walk along.
CASES = [
    pytest.param(layout, PAIRS[(j + 3 * k) % 6], 2 ** (1 + (3 * j + k) % 8) - 1, 3 * j + k, id=f"{layout}-{k}")
    for j, layout in enumerate(WITHOUT_GROUPS)
    for k in range(2)
]
every_case = pytest.mark.parametrize(("layout", "pair", "levels", "seed"), CASES)


def moments(layout, dtype, seed):
    """mean and std; where there are channels enough, one with constant and one with NaN weights."""
    g = torch.Generator().manual_seed(seed)
    shape, compute = scale_shape(torch.Size(layout.shape), layout.axis, 0), compute_dtype(dtype)
    mean, std = torch.randn(shape, generator=g, dtype=compute), torch.rand(shape, generator=g, dtype=compute) + 1
    if std.numel() > 2:
        std[1], std[2] = 0, math.nan
    return mean, std


def point(layout, dtype, levels, seed):
    clip = (1.7, 0.0, 2.5, math.inf)[seed % 4]
    return *moments(layout, dtype, seed), torch.tensor(clip, dtype=compute_dtype(dtype)), levels, layout.axis, EPS


@every_case
def test_forward(emulated, layout, pair, levels, seed):
    args = (data(layout, pair[0], seed), *point(layout, pair[0], levels, seed), pair[1])
    assert same_bits(emulated.liq(*args), reference.liq(*args))


@every_case
def test_jvp(emulated, layout, pair, levels, seed):
    tw = data(layout, pair[0], seed + 1, special=False)
    at = (data(layout, pair[0], seed), *point(layout, pair[0], levels, seed), pair[1])
    tclip = torch.tensor(-0.7, dtype=at[3].dtype)
    args = (tw if seed % 4 else None, tclip if seed % 3 else None, *at)
    assert same_bits(emulated.liq_jvp(*args), reference.liq_jvp(*args))


@every_case
def test_backward(emulated, layout, pair, levels, seed):
    special = seed % 5 < 2
    w, gy = data(layout, pair[0], seed, special), data(layout, pair[1], seed + 1, special=False)
    mean, std, clip, *rest = point(layout, pair[0], levels, seed)
    if not special:  # sums that are numbers
        std = std.nan_to_num(1.0)
    args = (gy, w, mean, std, clip, *rest)
    results = in_any_order(emulated, seed, emulated.liq_bwd, *args)
    (gw, gclip), (wanted_w, wanted_clip) = results, reference.liq_bwd(*args)
    assert same_bits(gw, wanted_w)
    assert special or clip.isinf() or gclip.isfinite()
    assert (gclip.dtype, gclip.shape) == (wanted_clip.dtype, wanted_clip.shape)
    # |q - m u| <= 1 where the mask passes, |q| = 1 where not.
    bound = 16 * torch.finfo(clip.dtype).eps * gy.double().abs().sum()
    assert (gclip - wanted_clip).abs().double() <= bound or same_bits(gclip, wanted_clip)


@every_case
def test_moments(emulated, layout, pair, levels, seed):
    w = data(layout, pair[0], seed, special=False) + (1e4 if seed % 5 < 2 else 0.0)
    results = in_any_order(emulated, seed, emulated.liq_moments, w, layout.axis)
    for got, want in zip(results, reference.liq_moments(w, layout.axis), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        if not w.numel():
            assert same_bits(got, want)
            continue
        # One unit in the last place; of double, the rounding of sums about the mean.
        unit = torch.finfo(got.dtype).eps * want.abs().double() + 1e-15 * w.double().abs().max()
        wide = 1e-13 * w.double().abs().max()
        assert ((got - want).abs().double() <= (wide if got.dtype == torch.float64 else unit)).all()


def test_moments_of_what_is_not_a_number(emulated):
    w = torch.randn(6, 513)
    w[1, 7], w[2, 500], w[3] = math.nan, math.inf, 0.3
    results = emulated.liq_moments(w, 0)
    torch.testing.assert_close(results, reference.liq_moments(w, 0), rtol=2e-7, atol=1e-8, equal_nan=True)
    assert results[1][1:3].isnan().all()
    assert results[1][3] == 0  # the mean in double is the constant itself


def in_any_order(emulated, seed, call, *args):
    """The results of a call, the same bits with blocks and threads shuffled."""
    results = call(*args)
    emulated.module.set_order(1 + seed)
    assert all(same_bits(a, b) for a, b in zip(results, call(*args), strict=True))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", [Layout((1 << 18,)), Layout((64, 4096), axis=0), Layout((1 << 16, 64), axis=1)], ids=str
)
def test_bytes_moved(emulated, layout, dtype):
    """Data are read once, by the moments twice; partial sums stay small beside them."""
    w = data(layout, dtype, 0, special=False)
    at, size = point(layout, dtype, 15, 0), w.numel() * dtype.itemsize

    def moved(call, *args):
        emulated.module.take_counts()
        call(*args)
        counts = emulated.module.take_counts()
        return counts["read"], counts["written"]

    assert moved(emulated.liq, w, *at) == (size, size)
    assert moved(emulated.liq_jvp, w, None, w, *at) == (2 * size, size)
    read, written = moved(emulated.liq_bwd, w, w, *at)
    assert 2 * size <= read
    assert size <= written
    assert read + written <= 1.05 * 3 * size
    read, written = moved(emulated.liq_moments, w, layout.axis)
    assert 2 * size <= read
    assert read + written <= 1.15 * 2 * size  # partial sums in double


def test_misaligned_storage_is_refused_and_untouched(emulated):
    w = torch.ones(33)[1:]
    at = point(Layout((32,)), torch.float32, 15, 0)
    for call, args in (
        (emulated.liq_moments, (w, -1)),
        (emulated.liq, (w, *at)),
        (emulated.liq_bwd, (w, w, *at)),
        (emulated.liq_jvp, (w, None, w, *at)),
    ):
        with pytest.raises(RuntimeError, match="716"):
            call(*args)
    assert emulated.module.take_counts()["launches"] == 0
