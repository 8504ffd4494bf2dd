# SPDX-License-Identifier: Apache-2.0
"""The sharpness kernels in Triton's interpreter: ascents have the reference's bits; sums, formed in fp64, agree to
1e-12. Not collected by itself: test_triton_interpreter.py runs it in a process of its own."""

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl

from fastflat.backends import reference
from fastflat.triton_kernels import _launch, _multi, sharpness

from . import comparison, list_cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = list_cases.SHAPES
#: A tensor whose sums take two programs.
LONG = (_multi.STEPS.value * _launch.BLOCK + 5,)


@pytest.fixture(params=["listed", "one by one"])
def way(request, monkeypatch):
    """Launches for all tensors of a form, and those for each that a CUDA graph records."""
    if request.param == "one by one":
        monkeypatch.setattr(_multi, "captured", lambda ts: True)


def check_ascent(rise, lists):
    expected = lists.copy()
    sharpness.sharpness_ascent_(*rise.arguments(lists))
    reference.sharpness_ascent_(*rise.arguments(expected))
    list_cases.assert_same(lists.tensors(), expected.tensors())


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("rise", list_cases.RISES, ids=str)
def test_ascent(rise, storage):
    check_ascent(rise, list_cases.make(storage, SHAPES))


@pytest.mark.parametrize("storage", ["fp32", "fp64", "bf16", "master bf16"])
def test_ascent_by_each_way(way, storage):
    for rise in list_cases.RISES[1::3]:
        check_ascent(rise, list_cases.make(storage, SHAPES[-3:]))


@pytest.mark.parametrize("storage", ["bf16", "master bf16", "fp32"])
@pytest.mark.parametrize("rise", list_cases.RISES[1::3], ids=str)
def test_ascent_rounds_bfloat16_by_the_same_draws(rise, storage):
    rise = dataclasses.replace(rise, seeded=True)
    check_ascent(rise, list_cases.make(storage, (*SHAPES, (2, 3, 4, 5))))


@triton.jit
def _stochastic_kernel(y_ptr, v_ptr, u_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _multi.bfloat16_stochastic_bits(tl.load(v_ptr + at), tl.load(u_ptr + at)))


def test_every_fraction_meets_the_draws_beside_it():
    """A draw of 16 bits rounds up below the 16 bits that are cut; infinities and NaN stay what they are."""
    cut = torch.arange(2**16, dtype=torch.int32)
    for top in (0x3F80, -0x4001, 0x0000, 0x7F7F):
        for drawn in ((cut - 1).clamp(min=0), cut, (cut + 1).clamp(max=2**16 - 1)):
            v, u = ((top << 16) + cut).view(torch.float32), (drawn.float() + 0.5) * 2.0**-16
            y = torch.empty(2**16, dtype=torch.int16)
            _stochastic_kernel[(4,)](y, v, u, 2**14)
            assert torch.equal(y, (top + (drawn < cut)).to(torch.int16))
    special = torch.tensor([0x7F800001, -0x7FFFFF, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)
    y = torch.empty(4, dtype=torch.int16)
    _stochastic_kernel[(1,)](y, special, torch.ones(4), 4)
    comparison.assert_same_bits(y.view(torch.bfloat16), special.to(torch.bfloat16))


def test_draws_do_not_depend_on_the_way(way):
    check_ascent(
        list_cases.Rise("backup", 1, seeded=True), list_cases.make("bf16", ((5,), (0,), (33, 7), (2, 3, 4, 5)))
    )


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(_launch, "_NARROW_LIMIT", 0)
    for seeded in (False, True):
        check_ascent(list_cases.Rise("backup", 1, seeded=seeded), list_cases.make("bf16", SHAPES))
    lists = list_cases.make("fp32", ((5,), LONG), special=False)
    check_sums(lists.gs, lists.ws, [1])


def test_a_backup_keeps_payloads_of_nan():
    """Signalling NaN among them: weights are moved, not converted."""
    for dtype, bits in ((torch.float32, torch.int32), (torch.float16, torch.int16), (torch.bfloat16, torch.int16)):
        quiet = {torch.float32: 0x7F800001, torch.float16: 0x7C01, torch.bfloat16: 0x7F81}[dtype]
        w = torch.full((70,), quiet, dtype=bits).view(dtype)
        kept = torch.zeros(320, dtype=torch.uint8)
        scale = torch.ones(1, dtype=torch.float64)
        sharpness.sharpness_ascent_([w], [torch.ones_like(w)], [], kept, [0], scale, [0], 0.0)
        assert (kept[: 70 * w.element_size()].view(bits) == quiet).all()


def test_layouts_and_places_in_memory():
    """Strided weights, gradients in another order, storage that does not start on 16 bytes."""
    base = torch.randn(2, 3, 4, 12)
    ws = [base[..., ::2], torch.randn(61)[1:], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    ws += [torch.randn(8, 6, 1, 1).to(memory_format=torch.channels_last), torch.randn(5, 7).t()]
    gs = [torch.randn(2, 3, 4, 6), torch.randn(60), torch.randn(2, 3, 4, 5), torch.randn(8, 6, 1, 1), torch.randn(7, 5)]
    scale = torch.full((5,), 0.25, dtype=torch.float64)
    backup, at = list_cases.backup_of([torch.empty_like(w) for w in ws])
    for kept in (backup, torch.cat((backup[:1], backup))[1:]):
        given = [w.as_strided(w.shape, w.stride(), w.storage_offset()) for w in ws]
        wanted = [torch.empty_strided(w.shape, w.stride()).copy_(w) for w in ws]
        wanted_kept = torch.empty_like(backup).copy_(kept)
        before = base[..., 1::2].clone()
        sharpness.sharpness_ascent_(given, gs, [], kept, at, scale, [1], 0.0)
        reference.sharpness_ascent_(wanted, gs, [], wanted_kept, at, scale, [1], 0.0)
        list_cases.assert_same(given, wanted)
        assert torch.equal(kept, wanted_kept)
        assert torch.equal(base[..., 1::2], before)


def test_kernels_get_addresses_of_16_bytes(monkeypatch):
    """Of every stream of a list whose tensors start anywhere."""
    tables = []
    monkeypatch.setattr(_multi, "table", lambda rows, device: tables.append(rows) or torch.tensor(rows))
    ws, gs, outs = ([torch.ones(n)[n - 9 :] for n in (10, 11, 12, 13)] for _ in range(3))
    scale = torch.ones(4, dtype=torch.float64)
    sharpness.sharpness_ascent_(ws, gs, outs, None, [], scale, [0], 0.0)
    assert len(tables) == 1
    assert not any(address % 16 for row in tables[0] for address in row[5:])
    assert all(torch.equal(out, torch.full((9,), 2.0)) for out in outs)


def test_partners_in_the_same_order_are_not_copied():
    """Strides of an axis of one element say nothing."""
    w, g = torch.randn(8, 6, 1, 1), torch.randn(8, 6, 1, 1).to(memory_format=torch.channels_last)
    assert w.stride() != g.stride()
    work = _multi.Work([w])
    assert work.weights(w, True) is w
    assert work.partner(g, w, False) is g


def check_sums(gs, others, kinds, eta=0.25):
    ours = sharpness.sharpness_sums(gs, others, kinds, eta)
    want = reference.sharpness_sums(gs, others, kinds, eta)
    # A product of two different tensors may cancel: its error is one of its terms.
    terms = reference.sharpness_sums([g.abs() for g in gs], [o.abs() for o in others], kinds, eta)
    assert ((ours - want).abs() <= 1e-12 * terms).all()
    assert torch.equal(sharpness.sharpness_sums(gs, others, kinds, eta), ours)


@pytest.mark.parametrize("storage", list_cases.STORAGES)
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_sums(storage, kind):
    lists = list_cases.make(storage, (*SHAPES, LONG), special=False)
    check_sums(lists.gs, lists.ws, [kind if t % 3 else 0 for t in range(len(SHAPES))] + [kind])


def test_sums_by_each_way(way):
    lists = list_cases.make("master bf16", (*SHAPES[-2:], LONG), special=False)
    check_sums(lists.gs, lists.ws, [0, 2, 1])


def test_sums_of_many_programs(way, monkeypatch):
    """More of them than the second kernel has lanes."""
    monkeypatch.setattr(_multi, "_LANES", 4)
    share = _multi.STEPS.value * _launch.BLOCK
    gs = [torch.zeros(share * n + 1) for n in (10, 1)]
    for g in gs:
        g[::share] = torch.arange(1.0, 2.0 + g.numel() // share)
    assert sharpness.sharpness_sums(gs, [], [0], 0.0).tolist() == [[506.0, 0.0, 0.0], [5.0, 0.0, 0.0]]


def test_sums_of_nothing():
    assert sharpness.sharpness_sums([], [], [], 0.0).shape == (0, 3)
    assert sharpness.sharpness_sums([torch.ones(0, 3)], [torch.ones(0, 3)], [1], 0.0).tolist() == [[0.0, 0.0, 0.0]]


def test_sums_see_what_is_not_finite_and_overflow_nothing():
    big, tiny = torch.full((100,), 3e38), torch.full((100,), 1e-40)
    sums = sharpness.sharpness_sums([big, tiny], [], [0], 0.0)
    assert sums[:, 0].tolist() == pytest.approx([9e78, 1e-78], rel=1e-3)
    for bad in (math.inf, -math.inf, math.nan):
        g = torch.randn(5000)
        g[4321] = bad
        assert not sharpness.sharpness_sums([g], [], [0], 0.0)[0, 0].isfinite()


@pytest.mark.parametrize("linf", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("special", [None, 0.0, math.inf, math.nan])
def test_scale(special, eps, linf):
    generator = torch.Generator().manual_seed(1)
    # Sums of whole numbers are exact in any order, so that the bits are those of the reference.
    sums = torch.randint(1, 1000, (700, 3), dtype=torch.float64, generator=generator)
    if special == 0.0:
        sums[:, 0] = 0.0
    elif special is not None:
        sums[600, 0] = special
    rho = torch.randn(300, dtype=torch.float64, generator=generator)
    for given, wanted in ((sums, rho), (sums[:1], rho[:1])):
        comparison.assert_same_bits(
            sharpness.sharpness_scale(given, wanted, eps, linf), reference.sharpness_scale(given, wanted, eps, linf)
        )


def test_launches_are_few(monkeypatch):
    """Tensors of one form are one launch."""
    launched = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append((self.kernel.fn.__name__, grid))
            return self.kernel[grid]

    for name in ("_sharpness_ascent_list_kernel", "_sharpness_sums_list_kernel"):
        monkeypatch.setattr(sharpness, name, Counting(getattr(sharpness, name)))
    lists = list_cases.make("fp32", ((3,),) * 50)
    sharpness.sharpness_ascent_(*list_cases.Rise("backup", 1).arguments(lists))
    sharpness.sharpness_sums(lists.gs, lists.ws, [1], 0.0)
    assert launched == [("_sharpness_ascent_list_kernel", (50,)), ("_sharpness_sums_list_kernel", (50,))]
