# SPDX-License-Identifier: Apache-2.0
"""Derivatives of weights made of bit planes: closed form, gradcheck, every order and every mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import fastflat as ff

BETA = 1.7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def leaves(planes=3, shape=(4, 5), dtype=torch.float64):
    small = torch.float64 if dtype is torch.float64 else torch.float32
    p, q = (torch.randn(planes, *shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    m, scale = torch.randn(planes, dtype=small, requires_grad=True), torch.tensor(0.7, dtype=small, requires_grad=True)
    return p, q, m, scale


def composed(p, q, m, scale, beta=BETA):
    """The formula as a chain of PyTorch operations."""
    planes = p.shape[0]
    power = (2.0 ** torch.arange(planes - 1, -1, -1, dtype=m.dtype) / (2**planes - 1)).view(-1, *[1] * (p.dim() - 1))
    soft = lambda t: torch.sigmoid(beta * t)  # noqa: E731
    return scale * (power * (soft(p) - soft(q)) * soft(m).view(power.shape)).sum(0)


def ours(p, q, m, scale):
    return ff.bitplane(p, q, m, scale, BETA)


@pytest.mark.parametrize("hard", [{}, {"hard_weights": True}, {"hard_mask": True}], ids=["soft", "weights", "mask"])
def test_gradcheck_of_first_and_second_order(on_backend, hard):
    args = leaves(planes=2, shape=(3,))
    f = lambda *a: ff.bitplane(*a, BETA, **hard)  # noqa: E731
    assert torch.autograd.gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, args, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("planes", [1, 4, 8])
def test_gradients_are_the_closed_form(on_backend, planes):
    p, q, m, scale = leaves(planes, (50,))
    gw = torch.randn(50, dtype=torch.float64)
    gp, gq, gm, gs = torch.autograd.grad(ours(p, q, m, scale), (p, q, m, scale), gw)
    with torch.no_grad():
        e = 2.0 ** torch.arange(planes - 1, -1, -1, dtype=torch.float64) / (2**planes - 1)
        sp, sq, mask = (torch.sigmoid(BETA * t) for t in (p, q, m))
        d = ((sp - sq) * gw).sum(1)
        want = [sign * scale * (e * mask)[:, None] * BETA * s * (1 - s) * gw for sign, s in ((1, sp), (-1, sq))]
        want += [scale * BETA * mask * (1 - mask) * e * d, (e * mask * d).sum()]
    for got, expected in zip((gp, gq, gm, gs), want):
        assert (got - expected).abs().max() <= 2e-15 * expected.abs().max()


def test_gradient_keeps_its_digits_where_a_bit_is_saturated(on_backend):
    # sigmoid(x) (1 - sigmoid(x)) has lost all digits at x = 40 in fp64; the slope is exp(-40) to rounding.
    p = torch.tensor([[0.2, -0.2]], dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    w = ff.bitplane(p, torch.zeros_like(p), one.view(1), one, 200.0)
    (gp,) = torch.autograd.grad(w.sum(), p)
    want = 200 * torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    assert ((gp - want).abs() <= 1e-14 * want).all()


def test_hard_forms_have_the_gradient_zero(on_backend):
    args, gw = leaves(), torch.randn(4, 5, dtype=torch.float64)
    args[2].data[0] = 1.0  # a plane that the hard mask keeps
    weights = torch.autograd.grad(ff.bitplane(*args, BETA, hard_weights=True), args, gw)
    assert [bool(g.count_nonzero()) for g in weights] == [False, False, True, True]
    mask = torch.autograd.grad(ff.bitplane(*args, BETA, hard_mask=True), args, gw)
    assert [bool(g.count_nonzero()) for g in mask] == [True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_fp64_gradient_rounded(on_backend, dtype):
    args = leaves(4, (300,), dtype)
    gw = torch.randn(300, dtype=torch.float64).to(dtype)
    w = ff.bitplane(*args, BETA)
    assert w.dtype == dtype
    got = torch.autograd.grad(w, args, gw)
    wide = [a.detach().double().requires_grad_() for a in args]
    want = torch.autograd.grad(composed(*wide), wide, gw.double())
    for g, h, leaf in zip(got, want, args):
        assert g.dtype == leaf.dtype
        assert (g.double() - h).abs().max() <= 4 * torch.finfo(g.dtype).eps * h.abs().max()


def test_a_cast_in_the_same_pass():
    p, q, m, scale = leaves(4, (30,), torch.float32)
    gw = torch.randn(30).bfloat16()
    w = ff.bitplane(p, q, m, scale, BETA, dtype=torch.bfloat16)
    assert torch.equal(w, ff.bitplane(p, q, m, scale, BETA).bfloat16())
    cast = torch.autograd.grad(w, (p, q, m, scale), gw)
    plain = torch.autograd.grad(ff.bitplane(p, q, m, scale, BETA), (p, q, m, scale), gw.float())
    assert all(torch.equal(a, b) for a, b in zip(cast, plain))


def test_small_tensors_may_have_the_dtype_of_the_planes():
    p, q, m, scale = leaves(4, (30,), torch.bfloat16)
    low = [t.detach().bfloat16().requires_grad_() for t in (m, scale)]
    w = ff.bitplane(p, q, *low, BETA)
    assert torch.equal(w, ff.bitplane(p, q, *(t.float() for t in low), BETA))
    assert [g.dtype for g in torch.autograd.grad(w.sum(), low)] == [torch.bfloat16] * 2


def test_hessians_of_all_compositions_agree(on_backend):
    args = leaves(2, (3,))
    loss = lambda *a: (ours(*a) ** 3).sum()  # noqa: E731
    plain = lambda *a: (composed(*a) ** 3).sum()  # noqa: E731
    every = (0, 1, 2, 3)
    want = torch.func.hessian(plain, every)(*args)
    outer = (torch.func.jacfwd, torch.func.jacrev)
    for f in outer:
        for g in outer:
            got = f(g(loss, every), every)(*args)
            for row, expected in zip(got, want):
                for a, b in zip(row, expected):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_third_order(on_backend):
    # Not forward over forward over another: PyTorch loses a term there with any Function that has a jvp.
    args = leaves(2, (2,))
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    for a, b, c in ((reverse, forward, reverse), (forward, reverse, reverse), (reverse, reverse, reverse)):
        third = a(b(c(lambda p: ours(p, *args[1:]).sin().sum())))(args[0])
        want = a(b(c(lambda p: composed(p, *args[1:]).sin().sum())))(args[0])
        torch.testing.assert_close(third, want, rtol=1e-11, atol=1e-12)


def test_forward_mode_is_the_transpose_of_backward(on_backend):
    args = leaves()
    tangents = [torch.randn_like(a) for a in args]
    gw = torch.randn(4, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        w = ours(*(forward_ad.make_dual(a.detach(), t) for a, t in zip(args, tangents)))
        tw = forward_ad.unpack_dual(w).tangent
    gradients = torch.autograd.grad(ours(*args), args, gw)
    inner = sum((g * t).sum() for g, t in zip(gradients, tangents))
    torch.testing.assert_close((tw * gw).sum(), inner, rtol=1e-13, atol=1e-14)


def test_hvp_by_forward_over_reverse(on_backend):
    args = leaves()
    v = torch.randn_like(args[0])
    grad = lambda f: torch.func.grad(lambda p: (f(p, *args[1:]) ** 2).sum())  # noqa: E731
    got, want = (torch.func.jvp(grad(f), (args[0].detach(),), (v,))[1] for f in (ours, composed))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None), (1, 2, None, None), (0, 0, 0, 0), (None, None, 0, None), (None, 3, None, 0)]
)
def test_vmap(on_backend, in_dims):
    size = 3
    base = [a.detach() for a in leaves()]
    moved = [a if d is None else torch.randn(*a.shape[:d], size, *a.shape[d:]).double() for a, d in zip(base, in_dims)]
    sample = lambda i: [a if d is None else a.select(d, i) for a, d in zip(moved, in_dims)]  # noqa: E731
    got = torch.func.vmap(ours, in_dims)(*moved)
    assert torch.equal(got, torch.stack([ours(*sample(i)) for i in range(size)]))
    gradient = torch.func.grad(lambda *a: ours(*a).pow(2).sum(), (0, 1, 2, 3))
    batched = torch.func.vmap(gradient, in_dims)(*moved)
    for i in range(size):
        for a, b in zip(batched, gradient(*sample(i))):
            torch.testing.assert_close(a[i], b, rtol=1e-13, atol=1e-15)


def test_batches_of_cotangents(on_backend):
    args = leaves()
    w, gw = ours(*args), torch.randn(3, 4, 5, dtype=torch.float64)
    batched = torch.autograd.grad(w, args, gw, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(w, args, gw[i], retain_graph=True)
        for a, b in zip(batched, single):
            torch.testing.assert_close(a[i], b, rtol=1e-13, atol=1e-15)


def test_torch_compile_of_forward_and_backward_survives_a_schedule():
    args = leaves(4, (33,), torch.float32)
    calls = []

    def counting(graph, _):
        calls.append(1)
        return graph.forward

    f = lambda beta, *a: ff.bitplane(*a, beta) * 2  # noqa: E731
    traced = torch.compile(f, fullgraph=True, backend=counting)
    full = torch.compile(f, fullgraph=True, backend="aot_eager")
    for value in (1.0, 3.0, 200.0):
        beta = torch.tensor(value)
        want = f(beta, *args)
        assert torch.equal(traced(beta, *args), want)
        got = full(beta, *args)
        gradients = [torch.autograd.grad(w.sum(), args) for w in (got, want)]
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert len(calls) == 1


def test_beta_has_no_derivative():
    args = [a.detach() for a in leaves()]
    beta = torch.tensor(BETA, dtype=torch.float64)
    with pytest.raises(ValueError, match="beta must carry no tangent"):
        torch.func.jvp(lambda b: ff.bitplane(*args, b), (beta,), (beta,))


def test_training_moves_a_weight_to_its_target():
    target = torch.randn(20, 5)
    p, q, m, scale = (t.requires_grad_() for t in ff.bitplane_init(torch.randn(20, 5), 6))
    optimizer = torch.optim.Adam([p, q, m, scale], lr=0.05)
    first = None
    for step in range(200):
        loss = (ff.bitplane(p, q, m, scale, 1.0 + step / 40) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.05 * first
