# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the weight-normalising quantizer: closed form, the frozen form by itself, every mode."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import forward_ad

import fastflat as ff

BITS = 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def leaves(shape=(5, 7)):
    w = 0.4 + 2 * torch.randn(shape, dtype=torch.float64)
    return w.requires_grad_(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)


def normalised(w, axis):
    along = {} if axis is None else {"dim": [d for d in range(w.dim()) if d != axis], "keepdim": True}
    return w.detach().mean(**along), w.detach().std(**along)


def frozen(w, clip, axis=None, bits=BITS):
    """The formula in PyTorch operations with the straight-through rule for round and constant moments."""
    mean, std = normalised(w, axis)
    count = 2**bits - 1
    u = ((w - mean) / std) / clip
    half = (u.clamp(-1, 1) + 1) / 2 * count
    half = half + (half.round() - half).detach()
    return clip * (2 * half / count - 1)


def ours(w, clip, axis=None, bits=BITS):
    return ff.liq_quantize(w, clip, bits=bits, axis=axis)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_are_the_closed_form(on_backend, bits, axis):
    w, clip = leaves((30, 40))
    gy = torch.randn_like(w)
    y = ours(w, clip, axis, bits)
    gw, gclip = torch.autograd.grad(y, (w, clip), gy)
    with torch.no_grad():
        mean, std = normalised(w, axis)
        v = (w - mean) / std
        inside = v.abs() <= clip
        want_w = torch.where(inside, gy, 0) / std
        want_clip = (gy * torch.where(inside, y / clip - v / clip, v.sign())).sum()
    assert (gw - want_w).abs().max() <= 1e-14 * want_w.abs().max()
    assert (gclip - want_clip).abs() <= 1e-14 * gy.abs().sum()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_are_those_of_the_composed_form(on_backend, bits, axis):
    args = leaves((30, 40))
    gy = torch.randn_like(args[0])
    got, want = (torch.autograd.grad(f(*args, axis, bits), args, gy) for f in (ours, frozen))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_gradient_ignores_the_normalisation(on_backend):
    # As published: through the moments the gradient would be orthogonal to 1 and to w - mean, and it is not.
    w, clip = leaves((30, 40))
    (gw,) = torch.autograd.grad(ours(w, clip).pow(2).sum(), w)
    assert gw.sum().abs() > 1e-2 * gw.abs().sum() or (gw * w.detach()).sum().abs() > 1e-2 * gw.abs().sum()


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_hessians_of_all_compositions_agree(on_backend, axis):
    args = [a.detach() for a in leaves((3, 4))]
    mean, std = normalised(args[0], axis)
    u = ((args[0] - mean) / std) / args[1]
    count = 2**BITS - 1
    q = 2 * torch.round((u.clamp(-1, 1) + 1) / 2 * count) / count - 1
    inside = (u.abs() <= 1).double()

    def linear(w, clip):
        """y with mask and residual frozen, the surrogate of second order."""
        return inside * ((w - mean) / std) + (q - inside * u) * clip

    torch.testing.assert_close(linear(*args), ours(*args, axis), rtol=1e-14, atol=1e-14)
    loss = lambda f: lambda *a: (f(*a) ** 3).sum()  # noqa: E731
    want = torch.func.hessian(loss(linear), (0, 1))(*args)
    f = loss(lambda *a: ours(*a, axis))
    for outer, inner in itertools.product((torch.func.jacfwd, torch.func.jacrev), repeat=2):
        got = outer(inner(f, (0, 1)), (0, 1))(*args)
        for row, expected in zip(got, want):
            for a, b in zip(row, expected):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    matrix = torch.autograd.functional.hessian(f, tuple(args))
    torch.testing.assert_close(matrix[0][0], want[0][0], rtol=1e-12, atol=1e-13)


def test_third_order(on_backend):
    args = [a.detach() for a in leaves((2, 3))]
    reverse, forward = torch.func.jacrev, torch.func.jacfwd
    results = [
        a(b(c(lambda w: ours(w, args[1]).exp().sum())))(args[0])
        for a, b, c in ((reverse, forward, reverse), (forward, reverse, reverse), (reverse, reverse, reverse))
    ]
    mean, std = normalised(args[0], None)
    inside = ((args[0] - mean) / std).abs() <= args[1]
    want = (ours(*args).exp() * inside / std**3).flatten()
    for third in results:
        full = third.reshape(6, 6, 6)
        torch.testing.assert_close(torch.einsum("iii->i", full), want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(full.abs().sum(), want.abs().sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_forward_mode_is_the_transpose_of_backward(on_backend, axis):
    args = leaves()
    tangents, gy = [torch.randn_like(a) for a in args], torch.randn_like(args[0])
    with forward_ad.dual_level():
        y = ours(*(forward_ad.make_dual(a.detach(), t) for a, t in zip(args, tangents)), axis)
        ty = forward_ad.unpack_dual(y).tangent
    gradients = torch.autograd.grad(ours(*args, axis), args, gy)
    inner = sum((g * t).sum() for g, t in zip(gradients, tangents))
    torch.testing.assert_close((ty * gy).sum(), inner, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dims", [(0, None), (2, None), (None, 0), (1, 0)])
def test_vmap(on_backend, axis, dims):
    size = 3
    base = [a.detach() for a in leaves()]
    moved = [a if d is None else 1 + torch.rand(*a.shape[:d], size, *a.shape[d:]).double() for a, d in zip(base, dims)]
    take = lambda i: [a if d is None else a.select(d, i) for a, d in zip(moved, dims)]  # noqa: E731
    value = lambda *a: (ours(*a, axis),)  # noqa: E731
    gradient = torch.func.grad(lambda *a: ours(*a, axis).pow(3).sum(), (0, 1))
    product = lambda *a: torch.func.jvp(gradient, a, tuple(map(torch.ones_like, a)))[1]  # noqa: E731
    for f in (value, gradient, product):
        batched = torch.func.vmap(f, dims)(*moved)
        for i in range(size):
            for a, b in zip(batched, f(*take(i))):
                torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-13)


def test_batches_of_cotangents(on_backend):
    args = leaves()
    y, gy = ours(*args), torch.randn(3, 5, 7).double()
    batched = torch.autograd.grad(y, args, gy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(y, args, gy[i], retain_graph=True)
        for a, b in zip(batched, single):
            torch.testing.assert_close(a[i], b, rtol=1e-13, atol=1e-15)


def test_torch_compile_of_forward_and_backward():
    w, clip = (a.detach().float().requires_grad_() for a in leaves((33, 5)))
    f = lambda w, clip: ff.liq_quantize(w, clip * 2, bits=2, axis=0, dtype=torch.bfloat16)  # noqa: E731
    full = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for g in (f, full):
        y = g(w, clip)
        results.append((y, *torch.autograd.grad(y.float().pow(2).sum(), (w, clip))))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_autograd_keeps_inputs_and_moments_only(on_backend):
    w, clip = torch.randn(50, 40, requires_grad=True), torch.tensor(1.2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ff.liq_quantize(w, clip, bits=2, axis=0)
    assert sorted(kept) == [1, 50, 50, 2000]


def test_quantized_weight_keeps_its_gradient(on_backend):
    # What SAQ perturbs is the quantized weight: its gradient is at hand by autograd alone.
    w, clip = leaves()
    y = ours(w, clip)
    y.retain_grad()
    y.pow(2).sum().backward()
    torch.testing.assert_close(y.grad, 2 * y.detach())
    again = torch.autograd.grad((ours(w, clip) + 0.1 * y.grad).pow(2).sum(), w)[0]
    assert not torch.equal(again, w.grad)


def test_training_lowers_the_loss(on_backend):
    target = torch.sign(torch.randn(20, 10))
    w, clip = torch.randn(20, 10, requires_grad=True), torch.tensor(2.5, requires_grad=True)
    optimizer = torch.optim.Adam([w, clip], lr=0.05)
    losses = []
    for _ in range(150):
        loss = (ff.liq_quantize(w, clip, bits=2) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
