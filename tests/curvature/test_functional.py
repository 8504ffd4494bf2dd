# SPDX-License-Identifier: Apache-2.0
"""hvp, linearize and mixed_hvp: closed forms, structures, random draws, constants of autograd, and bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.curvature import hvp, linearize, mixed_hvp


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_quadratic_form():
    a = random(5, 5)
    a = a + a.t()
    w, v = random(5, seed=1), random(7, 5, seed=2)
    torch.testing.assert_close(hvp(lambda p: 0.5 * p @ a @ p, w, v), v @ a)
    torch.testing.assert_close(hvp(lambda p: 0.5 * p @ a @ p, w, v[0]), a @ v[0])


def test_softmax_regression():
    x, w, v = random(6, 3), random(3, 4, seed=1), random(2, 3, 4, seed=2)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    p = torch.softmax(x @ w, 1)
    inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    want = torch.einsum("ni,nab,nj,kjb->kia", x, inner, x, v) / 6
    torch.testing.assert_close(hvp(lambda w: F.cross_entropy(x @ w, y), w, v), want)


def test_structures_of_parameters():
    w, b, x = random(3, 2), random(2, seed=1), random(4, 3, seed=2)
    v, u = random(5, 3, 2, seed=3), random(5, 2, seed=4)

    def loss(w, b):
        return torch.tanh(x @ w + b).square().sum()

    one = hvp(lambda p: loss(*p), [w, b], [v, u])
    two = hvp(lambda p: loss(p["w"], p["deep"][0]), {"w": w, "deep": [b]}, {"w": v, "deep": [u]})
    assert isinstance(one, list)
    assert list(two) == ["w", "deep"]
    torch.testing.assert_close(one[0], two["w"])
    torch.testing.assert_close(one[1], two["deep"][0])
    single = hvp(lambda p: loss(*p), (w, b), (v[2], u[2]))
    torch.testing.assert_close(single, (one[0][2], one[1][2]))
    assert hvp(lambda p: loss(*p), [w, b], [v[:0], u[:0]])[0].shape == (0, 3, 2)


def test_input_space_through_a_quantized_network():
    torch.manual_seed(0)
    spec = ff.QuantSpec.lsq(bits=6)
    model = ff.prepare(nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)).double(), weights=spec)
    x, y, u = random(3, 4), torch.tensor([0, 1, 2]), random(6, 3, 4, seed=1)
    want = torch.autograd.functional.hessian(lambda x: F.cross_entropy(model(x), y), x).reshape(12, 12)
    got = hvp(lambda x: F.cross_entropy(model(x), y), x, u)
    torch.testing.assert_close(got.reshape(6, 12), u.reshape(6, 12) @ want)


def test_mixed_derivative():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3)).double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    x, y, u = random(3, 4), torch.tensor([0, 1, 2]), random(2, 3, 4, seed=1)

    def loss(p, x):
        return F.cross_entropy(torch.func.functional_call(model, p, (x,)), y)

    got = mixed_hvp(loss, params, x, u)
    for k in range(2):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        point = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(leaves, point), point, create_graph=True)
        want = torch.autograd.grad((g * u[k]).sum(), list(leaves.values()), allow_unused=True)
        for n, w in zip(leaves, want):
            torch.testing.assert_close(got[n][k], torch.zeros_like(params[n]) if w is None else w)


def test_linearize_serves_many_products():
    a, w = random(4, 4), random(4, seed=1)
    linear = linearize(lambda p: (a @ torch.sin(p)).square().sum(), w)
    v = random(3, 4, seed=2)
    want = torch.autograd.functional.hessian(lambda p: (a @ torch.sin(p)).square().sum(), w)
    for _ in range(2):
        torch.testing.assert_close(linear.hvp(v), v @ want)
    torch.testing.assert_close(linear.hvp(v[0]), v[0] @ want)


@pytest.mark.parametrize("how", ["detach", "no_grad", "data"])
def test_what_autograd_holds_constant_stays_constant(how):
    w, v = random(4), random(3, 4, seed=1)

    def loss(p):
        if how == "detach":
            factor = torch.sin(p).detach()
        elif how == "data":
            factor = torch.sin(p).data
        else:
            with torch.no_grad():
                factor = torch.sin(p)
        return (factor * p**3 + F.relu(p) * factor.exp()).sum()

    want = torch.autograd.functional.hessian(loss, w)
    torch.testing.assert_close(hvp(loss, w, v), v @ want)


def test_a_penalty_on_the_gradient():
    x, w, v = random(5, 3), random(3, seed=1), random(4, 3, seed=2)

    def loss(p):
        point = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(torch.tanh(point @ p).sum(), point, create_graph=True)
        return g.square().sum()

    torch.testing.assert_close(hvp(loss, w, v), v @ torch.autograd.functional.hessian(loss, w))


def test_one_draw_for_all_products_and_none_taken():
    torch.manual_seed(0)
    model, x, v = (
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double(),
        random(3, 6),
        None,
    )
    params = {k: p.detach() for k, p in model.named_parameters()}
    v = {k: random(4, *p.shape, seed=3) for k, p in params.items()}

    def loss(p):
        return torch.func.functional_call(model, p, (x,)).exp().sum()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    linear = linearize(loss, params)
    first, again = linear.hvp(v), linear.hvp(v)
    assert torch.equal(before, torch.get_rng_state())
    grads = list(params)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    g = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)  # draws the mask of this seed
    for k in range(4):
        want = torch.autograd.grad(g, list(leaves.values()), [v[n][k] for n in grads], retain_graph=True)
        for n, w in zip(grads, want):
            torch.testing.assert_close(first[n][k], w)
            assert torch.equal(first[n], again[n])


def test_an_op_without_a_rule_warns_once_and_is_right():
    w, v = random(4, 4).abs() + 4 * torch.eye(4, dtype=torch.float64), random(3, 4, 4, seed=1)

    def loss(p):
        return torch.linalg.det(p).square() + torch.linalg.inv(p).sum()

    want = torch.autograd.functional.hessian(loss, w).reshape(16, 16)
    from fastflat.curvature._rules import _fallback

    _fallback._warned.clear()
    with pytest.warns(UserWarning, match="has no rule for K tangents"):
        got = hvp(loss, w, v)
    torch.testing.assert_close(got.reshape(3, 16), v.reshape(3, 16) @ want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hvp(loss, w, v)


def test_an_op_without_derivatives_leaves_it_to_double_backward():
    x, w, y, v = random(5, 3), random(3, 4, seed=1), torch.tensor([0, 1, 2, 3, 0]), random(2, 3, 4, seed=2)

    def loss(p):
        return F.multi_margin_loss(x @ p, y, p=2)

    # Nobody has a second derivative of this loss in PyTorch: the warning names the op, the error is PyTorch's.
    with (
        pytest.raises(RuntimeError, match="derivative for aten::multi_margin_loss_backward is not implemented"),
        pytest.warns(
            UserWarning, match="multi_margin_loss_backward.default has no derivative to push tangents through"
        ),
    ):
        hvp(loss, w, v)
    with pytest.raises(RuntimeError, match="no derivative to push tangents through"):
        hvp(loss, w, v, method="engine")
    differences = hvp(loss, w, v, method="finite_difference")
    assert bool(differences.any())


def test_in_place_operations():
    w, v = random(4), random(3, 4, seed=1)

    def loss(p):
        y = p * 2
        y.mul_(p)
        y[1:3] += torch.sin(p[:2])
        z = torch.zeros(4, dtype=p.dtype)
        z[0] = y.sum() ** 2
        return (z + y.tanh_()).sum()

    torch.testing.assert_close(hvp(loss, w, v), v @ torch.autograd.functional.hessian(loss, w))


def test_symmetric_and_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.GELU(), nn.Conv2d(3, 2, 3)).double()
    params, x = {k: p.detach() for k, p in model.named_parameters()}, random(2, 2, 5, 5)
    linear = linearize(lambda p: torch.func.functional_call(model, p, (x,)).exp().mean(), params)
    u, v = ({k: random(*p.shape, seed=s) for k, p in params.items()} for s in (1, 2))
    hu, hv = linear.hvp(u), linear.hvp(v)

    def dot(a, b):
        return sum((a[k] * b[k]).sum() for k in a)

    scale = (dot(hu, hu) * dot(v, v)) ** 0.5
    assert abs(dot(hu, v) - dot(u, hv)) <= 1e-12 * scale
    both = linear.hvp({k: 2 * u[k] - 3 * v[k] for k in u})
    for k in u:
        torch.testing.assert_close(both[k], 2 * hu[k] - 3 * hv[k])


def test_what_is_refused():
    w = random(3)
    cases = [
        (lambda: hvp(lambda p: p * 2, w, w), r"loss_fn must return a scalar, got shape \[3\]"),
        (lambda: hvp(lambda p: 1.0, w, w), "loss_fn must return a tensor"),
        (lambda: hvp(lambda p: p.sum(), w, random(4)), r"tangents must have shape \[3\] or \[K, 3\], got \[4\]"),
        (lambda: hvp(lambda p: p.sum(), w, [w]), "nested like the parameters"),
        (lambda: hvp(lambda p: p.sum(), w, w.float()), "tangents must be torch.float64"),
        (lambda: hvp(lambda p: p[0].sum(), [w, w], [w, w[None]]), "share one leading K"),
        (lambda: hvp(lambda p: p.sum(), torch.arange(3), torch.arange(3)), "floating"),
        (lambda: hvp(lambda p: 0, [], []), "at least one"),
        (lambda: hvp(lambda p: p.sum(), w, w, method="magic"), "method must be one of"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_frozen_residual_surrogate():
    """Of a straight-through quantizer the Hessian is that of y = m x + e s with m and e frozen where they are."""
    torch.manual_seed(0)
    spec = ff.QuantSpec.lsq(bits=3).replace(grad_scale="none")
    x, w = (
        random(6, 4),
        {"w": random(5, 4, seed=1), "s": torch.tensor(0.4, dtype=torch.float64), "v": random(5, seed=2)},
    )

    def loss(quantize):
        return lambda p: (torch.tanh(x @ quantize(p["w"], p["s"]).t()) @ p["v"]).exp().mean()

    u = w["w"] / w["s"]
    mask = (u.clamp(-4, 3) == u).double()
    residual = torch.where(mask.bool(), u.round() - u, u.clamp(-4, 3))
    surrogate = loss(lambda w, s: mask * w + residual * s)
    real = loss(lambda w, s: ff.fake_quantize(w, s, spec=spec))
    torch.testing.assert_close(surrogate(w), real(w))
    assert 0 < float(mask.mean()) < 1
    v = {k: random(4, *t.shape, seed=7) for k, t in w.items()}
    got, want = hvp(real, w, v), hvp(surrogate, w, v)
    differences = hvp(surrogate, w, v, method="finite_difference")
    for k in w:
        torch.testing.assert_close(got[k], want[k], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got[k], differences[k], rtol=1e-6, atol=1e-8)
