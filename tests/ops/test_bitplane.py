# SPDX-License-Identifier: Apache-2.0
"""Weights made of bit planes: the raw ops against the reference, and what the planes stand for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastflat as ff
from fastflat._ops import compute_dtype
from fastflat.backends import reference

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
HARD = [(False, False), (True, False), (False, True), (True, True)]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{str(p[0])[6:]}-{str(p[1])[6:]}")


def arguments(planes, shape, pair, seed=0, special=True, beta=3.0):
    """gw, tp, tq, tm, ts and (p, q, m, scale, beta)."""
    compute = compute_dtype(pair[0])
    p, q = (common.random_data((planes, *shape), pair[0], seed + i, special) for i in range(2))
    m, tm = (common.random_data((planes,), compute, seed + i, special=False) for i in (2, 3))
    gw = common.random_data(shape, pair[1], seed + 4, special=False)
    tp, tq = (common.random_data((planes, *shape), pair[0], seed + i, special=False) for i in (5, 6))
    scale, ts, slope = (torch.tensor(v, dtype=compute) for v in (0.7, -1.3, beta))
    return gw, (tp, tq, tm, ts), (p, q, m, scale, slope)


def assert_close_sums(got, want, magnitude):
    """Sums of the same terms in another order: a few units of rounding of the sum of magnitudes."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    bound = 32 * torch.finfo(want.dtype).eps * magnitude + torch.finfo(want.dtype).tiny
    ok = ((got - want).abs().double() <= bound) | (got == want) | (got.isnan() & want.isnan())
    assert ok.all(), f"got {got[~ok].tolist()}, want {want[~ok].tolist()}"


def compare(gw, tangents, args, hard, result):
    """The three ops as the dispatcher finds them, against the reference."""
    common.assert_same_bits(ops.bitplane(*args, *hard, result), reference.bitplane(*args, *hard, result))
    for keep in (15, 5, 10, 0):
        some = [t if keep >> i & 1 else None for i, t in enumerate(tangents)]
        common.assert_same_bits(
            ops.bitplane_jvp(*some, *args, *hard, result), reference.bitplane_jvp(*some, *args, *hard, result)
        )
    got, want = ops.bitplane_bwd(gw, *args, *hard), reference.bitplane_bwd(gw, *args, *hard)
    common.assert_same_bits(got[0], want[0])
    common.assert_same_bits(got[1], want[1])
    *_, m, scale, beta = args
    total = gw.double().abs().sum().item()
    planes = m.numel()
    steps = 2.0 ** torch.arange(planes - 1, -1, -1, dtype=torch.float64) / (2**planes - 1)
    assert_close_sums(got[2], want[2], steps * scale.double().abs() * beta.double() * total)
    assert_close_sums(got[3], want[3], torch.tensor(total, dtype=torch.float64))


@every_pair
@pytest.mark.parametrize("hard", HARD, ids=lambda h: f"{'hard' if h[0] else 'soft'}-{'hard' if h[1] else 'soft'}")
@pytest.mark.parametrize("planes", [1, 3, 8, 16])
def test_same_bits_as_reference(planes, hard, pair):
    for seed, shape in enumerate([(), (1,), (33,), (3, 5, 7), (511,), (513,), (1025,), (0,), (4, 0)]):
        gw, tangents, args = arguments(planes, shape, pair, 10 * seed)
        compare(gw, tangents, args, hard, pair[1])


@pytest.mark.parametrize("size", [16384, 16385, 40001])
def test_same_bits_as_reference_over_several_tasks(size):
    gw, tangents, args = arguments(2, (size,), PAIRS[0], special=False)
    compare(gw, tangents, args, (False, False), torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    planes=st.integers(1, 16),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    pair=st.sampled_from(PAIRS),
    hard=st.sampled_from(HARD),
    beta=st.sampled_from([1e-3, 1.0, 10.0, 200.0]),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_reference_anywhere(planes, shape, pair, hard, beta, seed):
    gw, tangents, args = arguments(planes, shape, pair, seed, beta=beta)
    compare(gw, tangents, args, hard, pair[1])


def test_layouts_cost_a_copy_and_nothing_else():
    gw, tangents, args = arguments(3, (4, 6), PAIRS[0])
    p, q, m, scale, beta = args
    strided = [torch.stack([t, t], -1)[..., 0] for t in (p, q)]
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (p, q)]
    want = reference.bitplane(*args, False, False)
    for a, b in (strided, swapped, (p, swapped[1]), (p.flip(0).flip(0), q)):
        common.assert_same_bits(ops.bitplane(a, b, torch.stack([m, m], 1)[:, 0], scale, beta, False, False), want)
        compare(gw.t().contiguous().t(), tangents, (a, b, m, scale, beta), (False, False), torch.float32)


def test_sums_do_not_depend_on_threads():
    gw, _, args = arguments(5, (300001,), PAIRS[0], special=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(ops.bitplane_bwd(gw, *args, False, False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("beta", [1.0, 10.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_is_the_formula(on_backend, dtype, beta):
    planes = 6
    p, q, m = (torch.randn(planes, *s, dtype=dtype) for s in ((50,), (50,), ()))
    scale = torch.tensor(0.3, dtype=dtype)
    power = 2.0 ** torch.arange(planes - 1, -1, -1, dtype=torch.float64)
    soft = lambda t: torch.sigmoid(beta * t.double())  # noqa: E731
    want = (0.3 / (2**planes - 1) * power * soft(m)) @ (soft(p) - soft(q))
    got = ff.bitplane(p, q, m, scale, beta).double()
    assert (got - want).abs().max() <= 1.5 * beta * torch.finfo(dtype).eps


@pytest.mark.parametrize("planes", [1, 2, 5, 8, 12, 16])
def test_initial_planes_keep_the_function(on_backend, planes):
    w = torch.randn(40, 9, dtype=torch.float64)
    p, q, m, scale = ff.bitplane_init(w, planes)
    assert (p.shape, m.shape, scale.shape) == ((planes, 40, 9), (planes,), ())
    assert set(p.unique().tolist()) <= {-1.0, 1.0}
    codes = ff.bitplane_codes(p, q, m)
    levels = 2**planes - 1
    assert torch.equal(codes, torch.round(w / scale * levels).to(torch.int32))
    exact = scale / levels * codes
    assert (exact - w).abs().max() <= scale / levels / 2 * (1 + 1e-12)
    # A kept bit is sigmoid(beta)^2 in place of 1: off by 2 exp(-beta).
    assert (ff.bitplane(p, q, m, scale, 10.0) - exact).abs().max() <= 2.0 * math.exp(-10) * 1.5 * scale
    assert (ff.bitplane(p, q, m, scale, 200.0) - exact).abs().max() <= 4e-16 * scale
    assert torch.equal(ff.bitplane(p, q, m, scale, 10.0, hard_weights=True, hard_mask=True), exact)


def test_initial_planes_of_nothing_and_of_zeros():
    for w in (torch.zeros(3, 4), torch.zeros(0, 4)):
        p, q, m, scale = ff.bitplane_init(w, 4)
        assert scale == 1
        assert torch.equal(ff.bitplane(p, q, m, scale, 5.0), w)
    p, q, m, scale = ff.bitplane_init(torch.tensor([-1.5, 0.75], dtype=torch.bfloat16), 3)
    assert (p.dtype, q.dtype, m.dtype, scale.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    assert ff.bitplane_codes(p, q, m).tolist() == [-7, 4]  # 3.5 goes to the even neighbour


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_hard_weights_are_codes_times_the_step(on_backend, dtype):
    for planes in range(1, 17):
        p, q = (torch.randn(planes, 200, dtype=torch.float64).to(dtype) for _ in range(2))
        m = torch.randn(planes, dtype=compute_dtype(dtype))
        p[:, 0] = 0.0
        scale = torch.tensor(0.37, dtype=m.dtype)
        codes = ff.bitplane_codes(p, q, m)
        w = ff.bitplane(p, q, m, scale, 7.0, hard_weights=True, hard_mask=True)
        levels = 2**planes - 1
        assert torch.equal(w, ((scale / levels) * codes.to(m.dtype)).to(dtype))
        if dtype in (torch.float32, torch.float64):
            assert torch.equal(torch.round(w.double() * levels / scale.double()).to(torch.int32), codes)


def test_hard_bits_keep_nan_and_drop_zero(on_backend):
    p = torch.tensor([[math.nan, 0.0, -0.0, math.inf, -math.inf, 1e-45]])
    w = ff.bitplane(p, -torch.ones_like(p), torch.ones(1), torch.tensor(1.0), 1.0, hard_weights=True, hard_mask=True)
    assert torch.equal(w.nan_to_num(9.0), torch.tensor([9.0, 0, 0, 1, 0, 1]))


def test_saved_memory_is_p_and_q_and_small_vectors():
    p, q = (torch.randn(8, 1000, requires_grad=True) for _ in range(2))
    m, scale, beta = torch.randn(8, requires_grad=True), torch.tensor(0.5, requires_grad=True), torch.tensor(3.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ff.bitplane(p, q, m, scale, beta)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (p, q, m, scale, beta)}
    assert sum(t.numel() for t in saved) == p.numel() + q.numel() + 8 + 2


def peak_growth(call) -> int:
    """Bytes by which the resident memory of this process peaks above where it was, during one call."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    before = kilobytes("VmRSS")
    call()
    return 1024 * (kilobytes("VmHWM") - before)


def test_no_tensor_of_the_planes_size_is_made(compiled):
    planes, n = 4, 1 << 21
    p, q = (torch.zeros(planes, n).fill_(0.5).requires_grad_() for _ in range(2))
    m, scale, beta = torch.randn(planes, requires_grad=True), torch.tensor(0.5, requires_grad=True), torch.tensor(3.0)
    gw, kept = torch.ones(n), []
    small = ff.bitplane(p[:, :8], q[:, :8], m, scale, beta)
    torch.autograd.grad(small, (m, scale), gw[:8])  # imports what a first call imports
    plane = 4 * n
    slack = plane // 2
    assert peak_growth(lambda: kept.append(ff.bitplane(p, q, m, scale, beta))) <= plane + slack
    gradients = lambda: kept.extend(torch.autograd.grad(kept[0], (p, q, m, scale), gw))  # noqa: E731
    assert peak_growth(gradients) <= 2 * planes * plane + slack


@pytest.mark.parametrize("name", ["bitplane", "bitplane_bwd", "bitplane_jvp"])
def test_opcheck(name):
    gw, tangents, args = arguments(3, (4, 5), PAIRS[0], special=False)
    for planes in (args, (args[0].transpose(1, 2), args[1].transpose(1, 2), *args[2:])):
        if name == "bitplane":
            call = (*planes, False, True, torch.bfloat16)
        elif name == "bitplane_bwd":
            call = (gw if planes is args else gw.t(), *planes, False, False)
        else:
            call = (tangents[0].view(planes[0].shape), None, tangents[2], tangents[3], *planes, False, False)
        torch.library.opcheck(getattr(ops, name).default, call)


def test_raw_op_refuses_a_gradient_and_bad_shapes():
    _, _, (p, q, m, scale, beta) = arguments(3, (4,), PAIRS[0])
    with pytest.raises(NotImplementedError, match="fastflat::bitplane: a raw op has no derivative"):
        ops.bitplane(p.requires_grad_(), q, m, scale, beta, False, False)


def test_raw_op_refuses_what_would_leave_its_memory(compiled):
    gw, _, (p, q, m, scale, beta) = arguments(3, (4,), PAIRS[0])
    for bad, text in (
        ((p, q[:, :3], m, scale, beta), "q must have the shape of p"),
        ((p, q.double(), m, scale, beta), "q must have the dtype of p"),
        ((p, q, m[:2], scale, beta), "m must have 3 values"),
        ((p, q, m.double(), scale, beta), "m must be float32"),
        ((p, q, m, torch.ones(2), beta), "scale must have 1 value"),
        ((p.int(), q.int(), m, scale, beta), "p must be float32"),
        ((torch.zeros(17, 2), torch.zeros(17, 2), torch.zeros(17), scale, beta), "1 to 16 planes"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.bitplane(*bad, False, False)
    with pytest.raises(RuntimeError, match="gw must have the shape of a plane"):
        ops.bitplane_bwd(gw[:3], p, q, m, scale, beta, False, False)
    with pytest.raises(RuntimeError, match="tq must have the shape of p"):
        ops.bitplane_jvp(None, q[:2], None, None, p, q, m, scale, beta, False, False)


def test_bad_input_is_one_clear_line():
    p, q, m, s = ff.bitplane_init(torch.randn(4, 3), 5)
    for call, text in (
        (lambda: ff.bitplane(1, q, m, s, 1.0), "fastflat::bitplane: p must be a tensor, got int"),
        (lambda: ff.bitplane(p.int(), q, m, s, 1.0), "p must be float32, bfloat16, float16 or float64, got"),
        (lambda: ff.bitplane(torch.zeros(17, 3), q, m, s, 1.0), r"p must have shape \[N, ...\] with 1 to 16 planes"),
        (lambda: ff.bitplane(p, q[:4], m, s, 1.0), r"q must have the shape of p, \[5, 4, 3\], got \[4, 4, 3\]"),
        (lambda: ff.bitplane(p, q.double(), m, s, 1.0), "q must be torch.float32 like p, got torch.float64"),
        (lambda: ff.bitplane(p, q, m[1:], s, 1.0), r"m must have shape \[N=5\], got \[4\]"),
        (lambda: ff.bitplane(p, q, m, 0.5, 1.0), r"scale must be a tensor, got float; write torch.tensor\(0.5\)"),
        (lambda: ff.bitplane(p, q, m, s.double(), 1.0), "scale must be torch.float32, got torch.float64"),
        (lambda: ff.bitplane(p, q, m, s, torch.ones(1)), r"beta must have shape \[\], got \[1\]"),
        (lambda: ff.bitplane(p, q, m, s, s.clone().requires_grad_()), "beta must need no gradient, got"),
        (lambda: ff.bitplane(p, q, m, s, 1.0, dtype=torch.float64), "dtype must be one of"),
        (lambda: ff.bitplane(p.to_sparse(), q, m, s, 1.0), "p must be a dense tensor"),
        (lambda: ff.bitplane(p, q.to("meta"), m, s, 1.0), r"q must be on the device of p \(cpu\), got meta"),
        (lambda: ff.bitplane_codes(p, q, None), "fastflat::bitplane_codes: m must be a tensor, got NoneType"),
        (lambda: ff.bitplane_init(torch.ones(3), 0), r"planes must lie in \[1, 16\], got 0"),
        (lambda: ff.bitplane_init(torch.ones(3), 4.0), "planes must be an int, got float"),
        (lambda: ff.bitplane_init([1.0], 4), "fastflat::bitplane_init: w must be a tensor, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=text) as caught:
            call()
        assert "\n" not in str(caught.value)
