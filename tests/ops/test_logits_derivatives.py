# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the logits functions: against finite differences, torch's own formulas, and in every mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jvp, vmap

import fastflat

from . import logits_cases as cases

MODES = {
    "kl": lambda z0, z, y, w: fastflat.softmax_kl(z0, z, w),
    "js": lambda z0, z, y, w: fastflat.softmax_js(z0, z, w),
    "loss": lambda z0, z, y, w: fastflat.rebalanced_ce(z0, y, margin=w[: z0.shape[1]], s=2.0, reduction="none"),
    "stats": lambda z0, z, y, w: torch.stack(fastflat.softmax_stats(z0, y)[:2]),
    "scan": lambda z0, z, y, w: fastflat.affine_logit_scan(z0, z[0], y, w[:2]),
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def problem(dtype=torch.float64, classes=4):
    data = cases.Problem((2, 5, classes), dtype)
    return data.z0, data.z, data.y, data.g.abs()


def gradients(function, z0, z, y, w, create_graph=False):
    leaves = [t.detach().clone().requires_grad_() for t in (z0, z)]
    value = function(*leaves, y, w)
    cotangent = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return leaves, torch.autograd.grad(value, leaves, cotangent, create_graph=create_graph, allow_unused=True)


def test_backward_is_the_derivative(on_backend, mode):
    z0, z, y, w = problem()
    leaves = [t.clone().requires_grad_() for t in (z0, z)]
    assert torch.autograd.gradcheck(lambda z0, z: mode(z0, z, y, w), leaves, check_forward_ad=True)


def test_second_derivatives(on_backend, mode):
    z0, z, y, w = problem(classes=3)
    leaves = [t[..., :3, :].clone().requires_grad_() for t in (z0, z)]
    assert torch.autograd.gradgradcheck(lambda z0, z: mode(z0, z, y[:3], w[:3]), leaves)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_kernels_have_the_gradients_of_the_composed_form(on_backend, mode, dtype):
    z0, z, y, w = problem(dtype, 40 if mode is not MODES["loss"] else 5)
    _, plain = gradients(mode, z0, z, y, w)
    _, composed = gradients(mode, z0, z, y, w, create_graph=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for got, want in zip(plain, composed, strict=True):
        if want is not None:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want.detach(), rtol=tolerance, atol=tolerance)


def test_transforms_are_those_of_torch(on_backend):
    z0, z, *_ = problem()

    def theirs(z0, z):
        log_p, log_q = z0.log_softmax(-1), z.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(0)

    def ours(z0, z):
        return fastflat.softmax_kl(z0, z)

    args = (z0, z)
    torch.testing.assert_close(ours(*args), theirs(*args))
    for transform in (
        lambda f: grad(lambda *a: f(*a).sum(), (0, 1))(*args),
        lambda f: hessian(lambda z0: f(z0, z).sum())(z0),
        lambda f: jvp(f, args, (z0.cos(), z.sin())),
        lambda f: vmap(lambda z0: f(z0, z))(torch.stack([z0, z0 * 2])),
        lambda f: vmap(f)(z0[:, None], z.transpose(0, 1)[:, :, None]),
        lambda f: jvp(lambda z: grad(lambda z: f(z0, z).sum())(z), (z,), (z.cos(),)),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


def test_batched_cotangents(on_backend, mode):
    z0, z, y, w = problem()
    leaves = [t.clone().requires_grad_() for t in (z0, z)]
    value = mode(*leaves, y, w)
    cotangents = torch.randn(3, *value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3))
    options = {"allow_unused": True, "retain_graph": True}
    batched = torch.autograd.grad(value, leaves, cotangents, is_grads_batched=True, **options)
    for i, cotangent in enumerate(cotangents):
        for got, want in zip(batched, torch.autograd.grad(value, leaves, cotangent, **options), strict=True):
            if want is not None:
                torch.testing.assert_close(got[i], want)


def test_numbers_of_the_classes_have_gradients():
    data = cases.Problem((1, 9, 4), torch.float64)
    classes = [t.clone().requires_grad_() for t in data.classes]
    z, y = data.z0.clone().requires_grad_(), data.y

    def loss(z, mult, add, margin, weight):
        return fastflat.rebalanced_ce(z, y, mult=mult, add=add, margin=margin, s=2.0, class_weight=weight)

    assert torch.autograd.gradcheck(loss, (z, *classes))
    w = data.g.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: fastflat.softmax_js(data.z0, data.z, w), (w,))


def test_gap_and_curvature_are_constants():
    z0, _, y, _ = problem()
    found = fastflat.softmax_stats(z0.requires_grad_(), y)
    assert [t.requires_grad for t in found] == [True, True, False, False]


@pytest.mark.parametrize("name", [n for n in MODES if n != "scan"])
def test_compile_has_no_graph_break(compiled, name):
    mode, (z0, z, y, w) = MODES[name], problem(torch.float32)
    ours = torch.compile(mode, fullgraph=True, backend="aot_eager")
    _, want = gradients(mode, z0, z, y, w)
    _, got = gradients(ours, z0, z, y, w)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_training_step_of_consistency_loss_is_that_of_torch(on_backend):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(6, 5).double()
    x = torch.randn(3, 8, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (8,), generator=generator)

    def step(kl, ce):
        model.zero_grad()
        z0, *z = (model(part) for part in x)
        (ce(z0, y) + 0.5 * kl(z0, torch.stack(z)).mean()).backward()
        return [p.grad.clone() for p in model.parameters()]

    def theirs(z0, z):
        log_q = z.log_softmax(-1)
        return F.kl_div(log_q, z0.log_softmax(-1).expand_as(log_q), reduction="none", log_target=True).sum(-1).mean(0)

    for got, want in zip(step(fastflat.softmax_kl, fastflat.rebalanced_ce), step(theirs, F.cross_entropy), strict=True):
        torch.testing.assert_close(got, want)
