# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel, executed from its .cu source, against the reference backend: maps bit for bit, sums closely."""

import itertools

import pytest
import torch

from fastflat._spec import TINY
from fastflat.backends import reference

from .cases import LAYOUTS, PAIRS, RULE_SETS, Layout, data, grid, parameters, same_bits, sum_over_scale

# Every layout with every storage pair; rules, zero-point, bits and sign walk along.
CASES = [
    pytest.param(
        layout, pair, RULE_SETS[i % len(RULE_SETS)], i % 3 != 0, i, id=f"{layout}-{str(pair[0])[6:]}-{str(pair[1])[6:]}"
    )
    for i, (layout, pair) in enumerate(itertools.product(LAYOUTS, PAIRS))
]
every_case = pytest.mark.parametrize(("layout", "pair", "rules", "zero", "seed"), CASES)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 4095, 8192, 8193, 30011])
def test_identity_keeps_every_bit(emulated, n, dtype):
    raw = torch.randint(256, (n * dtype.itemsize,), dtype=torch.uint8)
    x = raw.clone().view(dtype)  # NaN payloads included
    assert torch.equal(emulated.identity(x).view(torch.uint8), raw)


@every_case
def test_forward(emulated, layout, pair, rules, zero, seed):
    x = data(layout, pair[0], seed)
    scale, zero_point = parameters(layout, pair[0], seed, zero)
    args = (x, scale, zero_point, *grid(layout, rules, 1 + seed % 16, seed % 2 == 0), pair[1])
    assert same_bits(emulated.fake_quantize(*args), reference.fake_quantize(*args))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("ends", [(-1, 0), (-4, 0), (0, 1), (1, 3), (-3, -1)], ids=str)
def test_grids_that_end_at_zero_or_beyond(emulated, ends, pair):
    for layout in (Layout((2049,)), Layout((9, 5), axis=1)):
        x = data(layout, pair[0], 3) / 8
        scale, _ = parameters(layout, pair[0], 3, False)
        rest = (*ends, layout.axis, layout.group, TINY, 0)
        args = (x, scale, None, *rest, pair[1])
        assert same_bits(emulated.fake_quantize(*args), reference.fake_quantize(*args))
        back = (data(layout, pair[1], 4, special=False), x, scale, None, *rest, 0.37, False)
        assert same_bits(emulated.fake_quantize_bwd(*back)[0], reference.fake_quantize_bwd(*back)[0])


@every_case
def test_jvp(emulated, layout, pair, rules, zero, seed):
    x = data(layout, pair[0], seed)
    scale, zero_point = parameters(layout, pair[0], seed, zero)
    tx = data(layout, pair[seed % 2], seed + 1, special=False)
    ts, tz = torch.randn_like(scale), torch.randn_like(scale)
    tangents = [tx if seed % 4 else None, ts if seed % 3 else None, tz if zero and seed % 5 else None]
    args = (*tangents, x, scale, zero_point, *grid(layout, rules, 1 + seed % 8), 0.37, pair[1])
    assert same_bits(emulated.fake_quantize_jvp(*args), reference.fake_quantize_jvp(*args))


@every_case
def test_backward(emulated, layout, pair, rules, zero, seed):
    x = data(layout, pair[0], seed)
    gy = data(layout, pair[1], seed + 1, special=False)
    scale, zero_point = parameters(layout, pair[0], seed, zero)
    args = (gy, x, scale, zero_point, *grid(layout, rules, 2 + seed % 7, seed % 2 == 0), 0.37)
    expected = reference.fake_quantize_bwd(*args, True)
    results = []
    for order in (0, 1, 2):
        emulated.module.set_order(order)
        results.append(emulated.fake_quantize_bwd(*args, True))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other))
    gx, gs, gz = results[0]
    assert same_bits(gx, expected[0])
    assert same_bits(emulated.fake_quantize_bwd(*args, False)[0], expected[0])
    # fp32 partial sums against fp64 ones: a few units in the last place of the sum of magnitudes
    ones = torch.ones_like(scale)
    shares = gy.double() * reference.fake_quantize_jvp(None, ones, None, x.to(scale.dtype), scale, *args[3:]).double()
    assert_close_sums(gs, expected[1], sum_over_scale(shares.abs(), layout))
    if zero:
        assert_close_sums(gz, expected[2], 0.37 * scale.clamp(min=TINY) * sum_over_scale(gy.abs(), layout))
    else:
        assert gz.numel() == 0


def assert_close_sums(got, want, magnitude):
    info = torch.finfo(want.dtype)
    close = (got - want).abs().double() <= 16 * info.eps * magnitude + info.tiny
    assert (close | (got == want) | (got.isnan() & want.isnan())).all()


@every_case
def test_absmax(emulated, layout, pair, rules, zero, seed):
    x = data(layout, pair[0], seed, special=seed % 2 == 0)
    args = (x, *grid(layout, rules, 1 + seed % 16), pair[1])
    y, scale = emulated.fake_quantize_absmax(*args)
    expected = reference.fake_quantize_absmax(*args)
    assert same_bits(scale, expected[1])
    assert same_bits(y, expected[0])


@pytest.mark.parametrize("layout", [Layout((4099,)), Layout((3, 16, 9, 9), 1, 0, True), Layout((2, 40000), 0)])
def test_maps_do_not_depend_on_the_order_of_blocks_and_threads(emulated, layout):
    x = data(layout, torch.float32, 0)
    scale, _ = parameters(layout, torch.float32, 0, False)
    args = grid(layout, 0)
    expected = reference.fake_quantize(x, scale, None, *args), *reference.fake_quantize_absmax(x, *args)
    for order in (1, 2, 3):
        emulated.module.set_order(order)
        got = emulated.fake_quantize(x, scale, None, *args), *emulated.fake_quantize_absmax(x, *args)
        assert all(same_bits(a, b) for a, b in zip(got, expected))


def test_every_launch_gets_the_stream_and_an_empty_tensor_none(emulated):
    stream = 0x57
    for layout, launches in ((Layout((9,)), 1), (Layout((0,)), 0)):
        x = data(layout, torch.float32, 0)
        scale, _ = parameters(layout, torch.float32, 0, False)
        args = (x, scale, None, *grid(layout, 0))
        emulated.module.take_counts()
        for call in (
            lambda: emulated.identity(x),
            lambda: emulated.fake_quantize(*args),
            lambda: emulated.fake_quantize_jvp(x, None, None, *args, 1.0),
            lambda: emulated.fake_quantize_bwd(x, *args, 1.0, False),
        ):
            call()
            counts = emulated.module.take_counts()
            assert counts["launches"] == launches
            assert counts["stream"] == (stream if launches else 0)
        emulated.fake_quantize_bwd(x, *args, 1.0, True)  # even an empty sum is written
        assert emulated.module.take_counts()["stream"] == stream


def test_misaligned_storage_is_refused_and_untouched(emulated):
    cuda_misaligned = "716"
    base = torch.ones(33)
    x, scale = base[1:], torch.ones(())
    with pytest.raises(RuntimeError, match=cuda_misaligned):
        emulated.fake_quantize(x, scale, None, *grid(Layout((32,)), 0))
    with pytest.raises(RuntimeError, match=cuda_misaligned):
        emulated.fake_quantize_bwd(x, x, scale, None, *grid(Layout((32,)), 0), 1.0, True)
    with pytest.raises(RuntimeError, match=cuda_misaligned):
        emulated.fake_quantize_absmax(x, *grid(Layout((32,)), 0))
    assert emulated.module.take_counts()["launches"] == 0
