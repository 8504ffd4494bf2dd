# SPDX-License-Identifier: Apache-2.0
"""The sharpness kernels, executed from their .cu source, against the reference: the ascent by bits, sums closely."""

import dataclasses
import math

import pytest
import torch

from fastflat.backends import reference
from tests.ops import list_cases

from .cases import same_bits

#: More tensors than the arguments of one launch name, with some of a size of their own.
MANY = tuple((n,) for n in (*range(80), 16384, 16385, 40003, 3))
RISES = [*list_cases.RISES, list_cases.Rise("into", 1, eta=0.0, one_for_all=True)]
SEEDED = [dataclasses.replace(rise, seeded=True) for rise in list_cases.RISES if rise.metric < 2]


def shifted(tensors, by):
    """The same tensors one after another in a buffer that starts `by` elements off the 16-byte grid."""
    made = []
    for t in tensors:
        buffer = torch.empty(t.numel() + 16, dtype=t.dtype)
        while buffer.data_ptr() % 16:
            buffer = buffer[1:]
        view = buffer[by : by + t.numel()].as_strided(t.shape, torch.empty_like(t).stride())
        made.append(view.copy_(t))
    return made


def check(emulated, rise, lists):
    expected = lists.copy()
    emulated.sharpness_ascent_(*rise.arguments(lists))
    reference.sharpness_ascent_(*rise.arguments(expected))
    list_cases.assert_same(lists.tensors(), expected.tensors())


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("rise", RISES, ids=str)
def test_ascent(emulated, storage, rise):
    check(emulated, rise, list_cases.make(storage, (*list_cases.SHAPES, (33000,))))


@pytest.mark.parametrize("storage", ["bf16", "master bf16"])
@pytest.mark.parametrize("rise", SEEDED, ids=str)
def test_ascent_rounds_bfloat16_by_the_same_draws(emulated, storage, rise):
    check(emulated, rise, list_cases.make(storage, (*list_cases.SHAPES, (17001,))))


@pytest.mark.parametrize("storage", list_cases.STORAGES)
def test_ascent_over_more_tensors_than_a_launch_takes(emulated, storage):
    lists = list_cases.make(storage, MANY)
    check(emulated, list_cases.Rise("into", 1), lists)
    assert 2 <= emulated.module.take_counts()["launches"] <= 4
    lists = list_cases.make(storage, MANY)
    emulated.module.set_order(5)
    check(emulated, list_cases.Rise("backup", 2), lists)


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize(("of_w", "of_g", "of_out"), [(1, 1, 1), (3, 3, 3), (1, 2, 0), (0, 1, 3), (2, 0, 0)])
@pytest.mark.parametrize("rise", [list_cases.Rise("backup", 1), list_cases.Rise("into", 2, seeded=True)], ids=str)
def test_ascent_off_the_16_byte_grid(emulated, storage, rise, of_w, of_g, of_out):
    if rise.seeded and storage in ("fp16", "master fp16"):
        rise = dataclasses.replace(rise, seeded=False)
    lists = list_cases.make(storage, (*list_cases.SHAPES, (16383,)))
    lists.ws, lists.gs = shifted(lists.ws, of_w), shifted(lists.gs, of_g)
    lists.outs = shifted(lists.outs, of_out)
    expected = lists.copy()
    emulated.sharpness_ascent_(*rise.arguments(lists))
    reference.sharpness_ascent_(*rise.arguments(expected))
    list_cases.assert_same(lists.tensors(), expected.tensors())


def test_streams_that_are_moved_together_stay_wide(emulated):
    """Weights and gradients that start on one element of the grid cost no narrow access but at their ends."""
    lists = list_cases.make("fp32", ((5000,),))
    lists.ws, lists.gs = shifted(lists.ws, 3), shifted(lists.gs, 3)
    check(emulated, list_cases.Rise("inplace", 0), lists)
    counts = emulated.module.take_counts()
    assert (counts["read"], counts["written"]) == (40000, 20000)


def test_backup_keeps_every_bit(emulated):
    """The payload of a NaN and the sign of zero."""
    for dtype, integer in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
        bits = bits << 16 | 0x1234 if integer == torch.int32 else bits.to(integer)
        for of_g in (dtype, torch.bfloat16, torch.float32):
            w, backup = bits.view(dtype).clone(), torch.zeros(bits.numel() * dtype.itemsize, dtype=torch.uint8)
            scale = torch.ones(1, dtype=torch.float64)
            emulated.sharpness_ascent_([w], [torch.ones(len(w), dtype=of_g)], [], backup, [0], scale, [0], 0.0)
            assert torch.equal(backup.view(integer), bits)


PARTNERS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp64": (torch.float64, torch.float64),
    "bf16 fp32": (torch.bfloat16, torch.float32),
    "fp16 fp32": (torch.float16, torch.float32),
    "fp32 bf16": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("partners", PARTNERS)
@pytest.mark.parametrize("shift", [0, 1])
def test_sums(emulated, partners, shift):
    g = torch.Generator().manual_seed(3)
    shapes = (*list_cases.SHAPES, (16384,), (33001,))
    gs, others = (
        [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
        for dtype in PARTNERS[partners]
    )
    args = (gs, others, [(0, 1, 2)[t % 3] for t in range(len(gs))], 0.01)
    sums = emulated.sharpness_sums(*args)
    torch.testing.assert_close(sums, reference.sharpness_sums(*args), rtol=1e-12, atol=1e-30)
    # Blocks and threads in any order, tensors at any address: the same bits.
    emulated.module.set_order(9)
    moved = (shifted(gs, shift), shifted(others, 3 * shift), *args[2:])
    assert torch.equal(emulated.sharpness_sums(*moved), sums)


def test_sums_of_more_tensors_than_a_launch_takes(emulated):
    gs = [torch.randn(n % 7 + n // 600 * 20000) for n in range(620)]
    for kind, others in (([0], []), ([1], gs)):
        emulated.module.take_counts()
        sums = emulated.sharpness_sums(gs, others, kind, 0.0)
        assert 5 <= emulated.module.take_counts()["launches"] <= 12
        torch.testing.assert_close(sums, reference.sharpness_sums(gs, others, kind, 0.0), rtol=1e-12, atol=0)


def test_sums_overflow_nothing_and_see_what_is_not_finite(emulated):
    big = torch.full((20000,), 3e38)
    sums = emulated.sharpness_sums([big, big * 1e-38 * 1e-7, torch.empty(0)], [], [0], 0.0)
    assert sums[0, 0] == pytest.approx(20000 * 9e76, rel=1e-6)
    assert sums[2].tolist() == [0.0, 0.0, 0.0]
    for bad in (math.inf, math.nan):
        g = torch.ones(20000)
        g[19999] = bad
        assert not emulated.sharpness_sums([g], [g], [1], 0.0)[0].isfinite().any()


@pytest.mark.parametrize("squares", [[9.0, 16.0], [0.0], [1.0, math.inf], [math.nan, 1.0], [0.5] * 1000, []])
@pytest.mark.parametrize("linf", [False, True])
def test_scale(emulated, squares, linf):
    sums = torch.tensor([[s, 7.0, 7.0] for s in squares], dtype=torch.float64).view(-1, 3)
    rho = torch.rand(300, dtype=torch.float64)
    for eps in (0.0, 1e-3):
        args = (sums, rho, eps, linf)
        assert same_bits(emulated.sharpness_scale(*args), reference.sharpness_scale(*args))


@pytest.mark.parametrize(("storage", "bytes_each"), [("fp32", 16), ("bf16", 8), ("master bf16", 14)])
def test_bytes_moved(emulated, storage, bytes_each):
    """Ascent with a backup: weights and gradients read once, weights and backup written once; sums read once."""
    lists = list_cases.make(storage, ((40000,),), special=False)
    emulated.module.take_counts()
    emulated.sharpness_ascent_(*list_cases.Rise("backup", 1).arguments(lists))
    counts = emulated.module.take_counts()
    assert counts["read"] + counts["written"] == bytes_each * 40000
    emulated.sharpness_sums(lists.gs, lists.ws, [1], 0.0)
    counts = emulated.module.take_counts()
    size = lists.gs[0].element_size() + lists.ws[0].element_size()
    assert size * 40000 <= counts["read"] <= 1.01 * size * 40000
