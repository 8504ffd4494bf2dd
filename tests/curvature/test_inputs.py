# SPDX-License-Identifier: Apache-2.0
"""Hessians of samples in their inputs: one by one by autograd, and what is solved with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff
from fastflat.curvature import InputHessian


def network(kind):
    torch.manual_seed(0)
    act = nn.ReLU() if kind in ("relu", "quantized") else nn.Tanh()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), act, nn.Flatten(), nn.Linear(64, 8), act, nn.Linear(8, 3)
    )
    model = model.double().eval()
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    if kind == "quantized":
        spec = ff.QuantSpec.lsq(bits=4)
        model = ff.prepare(model, weights=spec.replace(axis=0), activations=spec)
        ff.calibrate(model, [x])
    return model.eval(), x, y


def one_by_one(model, x, y):
    def loss(flat, i):
        return F.cross_entropy(model(flat.view(1, *x.shape[1:])), y[i : i + 1])

    found = []
    for i in range(len(x)):
        found.append(torch.autograd.functional.hessian(lambda flat, i=i: loss(flat, i), x[i].flatten()))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["tanh", "relu", "quantized"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_products_of_each_sample(kind, reduction):
    model, x, y = network(kind)
    H = InputHessian(model, lambda z, t: F.cross_entropy(z, t, reduction=reduction), x, y, reduction=reduction)
    dense = one_by_one(model, x, y)
    V = torch.randn(3, 5, 36, dtype=torch.float64)
    torch.testing.assert_close(H.matmat(V), torch.einsum("bij,kbj->kbi", dense, V), rtol=1e-9, atol=1e-11)
    assert torch.equal(H.matmat(V)[1], H.matmat(V[1])) or torch.allclose(H.matmat(V)[1], H.matmat(V[1]), rtol=1e-12)
    assert H.shape == (36, 36)
    g = H.gradients()
    for i in range(5):
        xi = x[i : i + 1].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(F.cross_entropy(model(xi), y[i : i + 1]), xi)
        torch.testing.assert_close(g[i], wanted.flatten(), rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_newton_steps_of_each_sample():
    model, x, y = network("tanh")
    H, dense = InputHessian(model, F.cross_entropy, x, y), one_by_one(*network("tanh"))
    shift = float(torch.linalg.eigvalsh(dense).abs().max()) * 1.5
    g = H.gradients()
    found = H.solve(-g, damping=shift, tol=1e-9)
    wanted = torch.linalg.solve(dense + shift * torch.eye(36, dtype=torch.float64), -g.unsqueeze(2)).squeeze(2)
    assert found.converged
    torch.testing.assert_close(found.value, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["relu", "quantized"])
def test_least_squares_of_a_piecewise_linear_network_take_c_minus_1_products(kind):
    model, x, y = network(kind)
    H, dense = InputHessian(model, F.cross_entropy, x, y), one_by_one(*network(kind))
    assert (torch.linalg.matrix_rank(dense, rtol=1e-10) <= 2).all()
    g = H.gradients()
    found = H.solve(-g, tol=1e-8, max_products=2 * 5 + 5)
    # Two products for each sample, and one for its true residual.
    assert found.converged
    assert found.products <= 3 * 5
    wanted = torch.linalg.lstsq(dense, -g.unsqueeze(2), driver="gelsd", rcond=1e-10).solution.squeeze(2)
    torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-8)


def test_what_is_refused():
    model, x, y = network("tanh")
    with pytest.raises(ValueError, match="model must keep samples apart, got 1 in train mode; put it into eval mode"):
        InputHessian(model.train(), F.cross_entropy, x, y)
    model.eval()
    for call, message in (
        (
            lambda: InputHessian(model, F.cross_entropy, x.long(), y),
            r"inputs must be a floating tensor \[B, ...\], got",
        ),
        (lambda: InputHessian(model, F.cross_entropy, x, y, reduction="max"), "reduction must be 'mean' or 'sum'"),
        (lambda: InputHessian(model, F.cross_entropy, x, y).matmat(x[:, 0, 0]), r"V must have shape \[B=5, d=36\]"),
        (lambda: InputHessian(model, F.cross_entropy, x, y).solve(x), r"B must have shape \[B=5, d=36\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
