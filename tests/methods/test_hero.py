# SPDX-License-Identifier: Apache-2.0
"""HERO with the exact product, beyond its checks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastflat as ff


def _problem(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,))


def _closure(opt, model, x, y):
    def closure():
        opt.zero_grad()
        loss = opt.penalized(F.cross_entropy(model(x), y))
        loss.backward()
        return loss

    return closure


def test_direction_is_that_of_the_penalty():
    """The step against autograd of L(w + e) + R, written out."""
    model, x, y = _problem(torch.float64)
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    g = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    norm = torch.stack([(p * h).square().sum() for p, h in zip(start, g, strict=True)]).sum().sqrt()
    with torch.no_grad():
        for p, h in zip(params, g, strict=True):
            p.add_(0.3 * p.square() * h / norm)
    loss = F.cross_entropy(model(x), y)
    g2 = torch.autograd.grad(loss, params, create_graph=True)
    penalty = sum((b - a).square().mean() for a, b in zip(g, g2, strict=True) if a.dim() > 1)
    want = torch.autograd.grad(loss + 2.0 * penalty, params)

    model, x, y = _problem(torch.float64)
    opt = ff.methods.ExactHERO(model, lr=1.0, rho=0.3, strength=2.0)
    opt.step(_closure(opt, model, x, y))
    for p, before, u in zip(model.parameters(), start, want, strict=True):
        torch.testing.assert_close(before - p.detach(), u, rtol=1e-10, atol=1e-12)
    assert int(model[1].num_batches_tracked) == 1


def test_quantized_network():
    model, x, y = _problem()
    model = ff.prepare(model, weights=ff.QuantSpec(bits=4, axis=0))
    opt = ff.methods.ExactHERO(model, lr=0.05, rho=0.1, strength=1.0)
    losses = [opt.step(_closure(opt, model, x, y)).item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_refused():
    model, x, y = _problem()
    with pytest.raises(ValueError, match="strength must be a finite number of at least 0, got -1"):
        ff.methods.ExactHERO(model, strength=-1)
    with pytest.raises(ValueError, match="adaptive must be True"):
        ff.methods.ExactHERO(model, adaptive=False)
    opt = ff.methods.ExactHERO([p for p in model.parameters() if p.dim() < 2], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no tensor of two axes or more has both gradients"):
        opt.step(_closure(opt, model, x, y))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
