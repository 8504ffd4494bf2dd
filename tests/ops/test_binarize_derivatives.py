# SPDX-License-Identifier: Apache-2.0
"""Derivatives of binarization: the frozen form by itself, every order and every mode."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.autograd import forward_ad

import fastflat as ff

LAYOUTS = [{}, {"axis": 0}, {"axis": 1}, {"group": 3}]
IMPORTANCES = ["none", "full", "shared"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
every_importance = pytest.mark.parametrize("kind", IMPORTANCES)
both_scales = pytest.mark.parametrize("through", [True, False], ids=["through", "constant"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def data(kind):
    h = {"none": None, "full": torch.rand(4, 6).double(), "shared": torch.rand(1, 6).double()}[kind]
    return torch.randn(4, 6, dtype=torch.float64), h


def ours(h, layout, through=True, clip=1.0):
    return lambda x: ff.binarize(x, h, **layout, through_alpha=through, clip=clip, return_scale=True)


def frozen(h, layout, through=True, clip=1.0):
    """alpha (s + m (x - x0)) in PyTorch operations, with the signs, the masks and x0 constant."""

    def sums(t):
        if "group" in layout:
            return t.unflatten(-1, (-1, layout["group"])).sum(-1, keepdim=True)
        return t.sum(1 - layout["axis"], keepdim=True) if "axis" in layout else t.sum()

    def f(x):
        still = x.detach()
        sign = torch.where(still < 0, -1.0, 1.0).double()
        weight = torch.ones_like(still) if h is None else h.expand_as(still)
        alpha = sums(weight * sign * x) / sums(weight)
        b = sign + (still.abs() <= clip) * (x - still)
        if "group" in layout:
            b = b.unflatten(-1, (-1, layout["group"]))
        y = (alpha if through else alpha.detach()) * b
        shape = {"group": (4, -1), "axis": (-1,)}.get(next(iter(layout), ""), ())
        return y.reshape(x.shape), alpha.reshape(shape)

    return f


@every_layout
@every_importance
@both_scales
@pytest.mark.parametrize("clip", [0.7, math.inf])
def test_gradient_is_that_of_the_frozen_form(on_backend, layout, kind, through, clip):
    x, h = data(kind)
    x.requires_grad_()
    results = [f(h, layout, through, clip)(x) for f in (ours, frozen)]
    gy, ga = torch.randn(4, 6, dtype=torch.float64), torch.randn_like(results[0][1])
    for cotangents in ((gy, ga), (gy, None), (None, ga)):
        # The derivative of alpha is there for whoever uses alpha, whatever y takes it for.
        kept = [i for i, c in enumerate(cotangents) if c is not None]
        got, want = (
            torch.autograd.grad([r[i] for i in kept], x, [cotangents[i] for i in kept], retain_graph=True)[0]
            for r in results
        )
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_the_part_through_alpha_is_the_derivative_of_alpha(on_backend):
    x, h = data("full")
    alpha = lambda x: ff.binarize(x, h, axis=0, return_scale=True)[1]  # noqa: E731
    assert torch.autograd.gradcheck(alpha, x.requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    x = x.detach().requires_grad_()
    gy = torch.randn(4, 6, dtype=torch.float64)
    whole, direct = (torch.autograd.grad(ff.binarize(x, h, axis=0, through_alpha=t), x, gy)[0] for t in (True, False))
    sums = (gy * x.detach().sign()).sum(1)
    (want,) = torch.autograd.grad(alpha(x), x, sums)
    torch.testing.assert_close(whole - direct, want, rtol=1e-12, atol=1e-14)


@every_layout
@every_importance
@both_scales
def test_hessians_of_all_compositions_are_symmetric_and_agree(on_backend, layout, kind, through):
    x, h = data(kind)

    def loss(f):
        return lambda x: (f(x)[0] ** 3).sum() + f(x)[1].sin().sum()

    want = torch.func.hessian(loss(frozen(h, layout, through)))(x)
    f = loss(ours(h, layout, through))
    for outer, inner in itertools.product((torch.func.jacfwd, torch.func.jacrev), repeat=2):
        torch.testing.assert_close(outer(inner(f))(x), want, rtol=1e-12, atol=1e-13)
    matrix = torch.autograd.functional.hessian(f, x)
    torch.testing.assert_close(matrix, want, rtol=1e-12, atol=1e-13)
    matrix = matrix.reshape(24, 24)
    torch.testing.assert_close(matrix, matrix.t(), rtol=1e-12, atol=1e-13)


def test_third_order(on_backend):
    x, h = data("full")
    x, h = x[:2, :3], h[:2, :3]
    reverse, forward = torch.func.jacrev, torch.func.jacfwd
    loss = lambda f: lambda x: f(x)[0].exp().sum()  # noqa: E731
    for a, b, c in ((reverse, forward, reverse), (forward, reverse, reverse), (reverse, reverse, reverse)):
        got, want = (a(b(c(loss(f(h, {"axis": 0})))))(x) for f in (ours, frozen))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@every_layout
@both_scales
def test_forward_mode_is_the_transpose_of_backward(on_backend, layout, through):
    x, h = data("full")
    tx, gy = torch.randn_like(x), torch.randn_like(x)
    f = ours(h, layout, through)
    with forward_ad.dual_level():
        ty, ta = (forward_ad.unpack_dual(r).tangent for r in f(forward_ad.make_dual(x, tx)))
    ga = torch.randn_like(ta)
    (gx,) = torch.autograd.grad(f(x.requires_grad_()), x, (gy, ga))
    torch.testing.assert_close((gx * tx).sum(), (ty * gy).sum() + (ta * ga).sum(), rtol=1e-13, atol=1e-14)


@every_layout
@pytest.mark.parametrize("dims", [(0, None), (2, None), (1, 0), (0, 2), (None, 1)])
@pytest.mark.parametrize("kind", ["full", "shared"])
def test_vmap(on_backend, layout, dims, kind):
    size, (x, h) = 3, data(kind)
    x = x if dims[0] is None else torch.randn(*x.shape[: dims[0]], size, *x.shape[dims[0] :]).double()
    h = h if dims[1] is None else torch.rand(*h.shape[: dims[1]], size, *h.shape[dims[1] :]).double()
    take = lambda t, d, i: t if d is None else t.select(d, i)  # noqa: E731
    value = lambda x, h: ours(h, layout)(x)  # noqa: E731
    gradient = torch.func.grad(lambda x, h: sum(r.pow(3).sum() for r in value(x, h)))
    product = lambda x, h: torch.func.jvp(lambda x: gradient(x, h), (x,), (torch.ones_like(x),))[1]  # noqa: E731
    for f in (value, lambda x, h: (gradient(x, h),), lambda x, h: (product(x, h),)):
        batched = torch.func.vmap(f, dims)(x, h)
        for i in range(size):
            single = f(take(x, dims[0], i), take(h, dims[1], i))
            for a, b in zip(batched, single):
                torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-13)


def test_batches_of_cotangents(on_backend):
    x, h = data("full")
    y, alpha = ours(h, {"axis": 1})(x.requires_grad_())
    gy, ga = torch.randn(3, 4, 6).double(), torch.randn(3, 6).double()
    (batched,) = torch.autograd.grad((y, alpha), x, (gy, ga), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (single,) = torch.autograd.grad((y, alpha), x, (gy[i], ga[i]), retain_graph=True)
        torch.testing.assert_close(batched[i], single, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", IMPORTANCES)
def test_torch_compile_of_forward_and_backward(kind):
    x, h = data(kind)
    x, h = x.float().requires_grad_(), None if h is None else h.float()
    f = lambda x: ff.binarize(x * 2, h, axis=0, dtype=torch.bfloat16, return_scale=True)  # noqa: E731
    full = torch.compile(f, fullgraph=True, backend="aot_eager")
    results = []
    for g in (f, full):
        y, alpha = g(x)
        results.append((y, alpha, torch.autograd.grad(y.float().pow(2).sum() + alpha.sum(), x)[0]))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_importance_has_no_derivative():
    x, h = data("full")
    with pytest.raises(ValueError, match="importance must carry no tangent"):
        torch.func.jvp(lambda h: ff.binarize(x, h), (h,), (h,))


def test_autograd_keeps_the_inputs_only(on_backend):
    x, h = torch.randn(50, 40, requires_grad=True), torch.rand(1, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ff.binarize(x, h, axis=0)
    assert sorted(t.numel() for t in kept) == [40, 50, 2000]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    y.sum().backward()


def test_training_moves_binary_weights_to_their_target(on_backend):
    signs, inputs = torch.where(torch.randn(8, 16) < 0, -1.0, 1.0), torch.randn(200, 16)
    wanted = inputs @ (0.3 * signs).t()
    w = (0.1 * torch.randn(8, 16)).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.02)
    for _ in range(300):
        loss = (inputs @ ff.binarize(w, axis=0).t() - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(w.detach().sign(), signs)
