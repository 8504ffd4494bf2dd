# SPDX-License-Identifier: Apache-2.0
"""The optimizers against closed forms and the papers' formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastflat import optim

from . import problems


def quadratic(model, a):
    return lambda: (0.5 * (a * model.w * model.w).sum()).backward()


def run(opt, backward, steps):
    for _ in range(steps):
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step(zero_grad=True)


def test_sam_ends_in_its_two_cycle(on_backend):
    """L = a w^2/2: |w| = lr a rho/(2 - lr a) = 0.0055555556 for a = 2, lr = 0.1, rho = 0.05."""
    model = problems.Vector(1.0)
    opt = optim.SAM(model.parameters(), lr=0.1, rho=0.05)
    run(opt, quadratic(model, 2.0), 400)
    assert abs(model.w.item()) == pytest.approx(0.0055555556, abs=1e-10)


@pytest.mark.parametrize(("normed", "want"), [(False, 0.0020512821), (True, 0.0071428571)])
def test_gnp_stalls_at_its_radius(on_backend, normed, want):
    """a = 1, lr = 0.05, alpha = 0.8, r = 0.1: lr a alpha r/(2 - lr a) with the published update, further out with the
    released one, lr ((1 - alpha) + alpha a r)/(2 - lr alpha a)."""
    model = problems.Vector(1.0)
    opt = optim.GNP(model.parameters(), lr=0.05, rho=0.1, alpha=0.8, normed=normed)
    run(opt, quadratic(model, 1.0), 600)
    assert abs(model.w.item()) == pytest.approx(want, abs=1e-10)


def test_gnp_direction_is_the_gradient_of_its_objective():
    """On a quadratic, the published mixture is that of L + lambda |g| with lambda = alpha r, to 1e-12."""
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T
    model = problems.Vector(*torch.randn(6).tolist())
    start = model.w.detach().clone().requires_grad_()
    g = a @ start
    (wanted,) = torch.autograd.grad(0.5 * start @ a @ start + 0.8 * 0.1 * (a @ start).norm(), start)
    opt = optim.GNP(model.parameters(), lr=1.0, rho=0.1, alpha=0.8)
    run(opt, lambda: (0.5 * model.w @ a @ model.w).backward(), 1)
    torch.testing.assert_close(start.detach() - model.w.detach(), wanted, rtol=1e-12, atol=1e-12)
    assert g.norm() > 0


def test_gnp_at_its_ends(on_backend):
    """alpha 1 is SAM bit for bit, alpha 0 the base."""
    for alpha, other in ((1.0, lambda p: optim.SAM(p, lr=0.1, rho=0.1)), (0.0, lambda p: optim.SGD(p, lr=0.1))):
        x, y = problems.batch()
        results = []
        for make in (lambda p, a=alpha: optim.GNP(p, lr=0.1, rho=0.1, alpha=a), other):
            model = problems.net().eval()
            opt = make(model.parameters())
            for _ in range(3):
                opt.step(problems.closure_of(opt, model, x, y))
            results.append(problems.bits(model))
        assert problems.same(*results)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_gsam_direction(on_backend, alpha):
    """u = g2 - alpha (g1 - (g1.g2) g2/|g2|^2); alpha 0 is SAM."""
    torch.manual_seed(1)
    a = torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64))
    model = problems.Vector(0.3, -1.0, 2.0)
    w = model.w.detach().clone()
    g1 = a @ w
    g2 = a @ (w + 0.2 * g1 / g1.norm())
    wanted = g2 - alpha * (g1 - (g1 @ g2) / (g2 @ g2) * g2)
    opt = optim.GSAM(model.parameters(), lr=1.0, rho=0.2, alpha=alpha)
    run(opt, lambda: (0.5 * model.w @ a @ model.w).backward(), 1)
    torch.testing.assert_close(w - model.w.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_hero_on_a_quadratic(on_backend):
    """L = w'Aw/2 of a [1, 6] weight: u = g2 + (2 strength/n) A^2 (A... ) e: the finite difference is exact to 1e-8."""
    torch.manual_seed(2)
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T / 6
    w = torch.nn.Parameter(torch.randn(1, 6, dtype=torch.float64))
    start = w.detach().clone().flatten()
    rho, strength = 0.5, 5.0
    g1 = a @ start
    e = rho * start.square() * g1 / (start.abs() * g1).norm()
    g2 = a @ (start + e)
    wanted = g2 + a @ ((2 * strength / 6) * (g2 - g1))
    opt = optim.HERO([w], lr=1.0, rho=rho, strength=strength)

    def closure():
        opt.zero_grad()
        loss = 0.5 * w.flatten() @ a @ w.flatten()
        loss.backward()
        return loss

    opt.step(closure)
    torch.testing.assert_close(start - w.detach().flatten(), wanted, rtol=1e-8, atol=1e-8)


def test_hero_follows_the_exact_product():
    """On a network: against autograd's product with the Hessian, 1e-3 of its length (fp64, radius 1e-3)."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    rho, strength = 0.5, 5.0

    def gradient(create_graph=False):
        return torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=create_graph)

    g1 = gradient()
    norm = math.sqrt(sum(((w.abs() * g) ** 2).sum().item() for w, g in zip(start, g1, strict=True)))
    with torch.no_grad():
        for p, g in zip(params, g1, strict=True):
            p.add_(rho / norm * p * p * g)
    g2 = gradient(create_graph=True)
    r = [2 * strength / p.numel() * (b - a).detach() * (p.dim() > 1) for p, a, b in zip(params, g1, g2, strict=True)]
    product = torch.autograd.grad(g2, params, r)
    wanted = [(g + h).detach() for g, h in zip(g2, product, strict=True)]
    size = math.sqrt(sum((h**2).sum().item() for h in product))
    with torch.no_grad():
        for p, w in zip(params, start, strict=True):
            p.copy_(w)
    opt = optim.HERO(params, lr=1.0, rho=rho, strength=strength)
    opt.step(lambda: (opt.zero_grad(), (loss := F.cross_entropy(model(x), y)).backward(), loss)[-1])
    error = math.sqrt(
        sum(((w - p.detach() - u) ** 2).sum().item() for w, p, u in zip(start, params, wanted, strict=True))
    )
    assert size > 0
    assert error < 1e-3 * size


def test_hero_without_its_penalty_is_adaptive_sam(on_backend):
    x, y = problems.batch()
    results = []
    for make in (
        lambda p: optim.HERO(p, lr=0.1, rho=0.3, strength=0.0),
        lambda p: optim.SAM(p, lr=0.1, rho=0.3, adaptive=True),
    ):
        model = problems.net().eval()
        opt = make(model.parameters())
        for _ in range(3):
            opt.step(problems.closure_of(opt, model, x, y))
        results.append(problems.bits(model))
    assert problems.same(*results)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("base", "options", "peer"),
    [
        ("sgd", {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}, torch.optim.SGD),
        ("adam", {"weight_decay": 1e-2}, torch.optim.Adam),
        ("adamw", {"weight_decay": 1e-2, "amsgrad": True}, torch.optim.AdamW),
    ],
)
def test_follows_the_plain_form(on_backend, base, options, peer, adaptive):
    """fp64, ten steps of a network, within 1e-10 of the form that the papers write."""
    models = [problems.net(dtype=torch.float64).eval() for _ in range(2)]
    x, y = problems.batch(dtype=torch.float64)
    opt = optim.SAM(models[0].parameters(), base, lr=0.05, rho=0.1, adaptive=adaptive, eta=0.01, **options)
    params = [p for name, p in models[1].named_parameters() if name not in ("frozen", "unused")]
    torch_base = peer(params, lr=0.05, **options)
    for _ in range(10):
        opt.step(problems.closure_of(opt, models[0], x, y))
        problems.plain_sam(params, lambda: F.cross_entropy(models[1](x), y).backward(), torch_base, 0.1, adaptive, 0.01)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_linf_perturbs_by_the_sign(on_backend):
    model = problems.Vector(1.0, -2.0, 0.0)
    opt = optim.SAM(model.parameters(), lr=0.1, rho=0.25, metric="linf")
    quadratic(model, 3.0)()
    opt.first_step(zero_grad=True)
    assert model.w.tolist() == [1.25, -2.25, 0.0]
    opt.restore()
    assert model.w.tolist() == [1.0, -2.0, 0.0]


def test_adaptive_ascent_does_not_see_a_rescaling():
    """w1 -> c w1, w2 -> w2/c of a ReLU pair: the perturbed function stays (fp64, 1e-12)."""
    torch.manual_seed(4)
    x, y = torch.randn(30, 5).double(), torch.randn(30, 1).double()
    values = []
    for c in (1.0, 7.0):
        torch.manual_seed(5)
        w1, w2 = torch.randn(8, 5).double() * c, torch.randn(1, 8).double() / c
        w1, w2 = torch.nn.Parameter(w1), torch.nn.Parameter(w2)
        opt = optim.SAM([w1, w2], rho=0.5, adaptive=True)
        loss = lambda a=w1, b=w2: F.mse_loss(F.relu(x @ a.T) @ b.T, y)  # noqa: E731
        loss().backward()
        with opt.perturbed():
            values.append(loss().item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_zero_gradient_perturbs_nothing(on_backend):
    model = problems.Vector(0.0, 0.0)
    opt = optim.SAM(model.parameters(), lr=0.1, rho=0.5)
    quadratic(model, 1.0)()
    opt.first_step()
    assert model.w.tolist() == [0.0, 0.0]
    assert opt.gradient_norm.item() == 0.0
    opt.second_step()
    assert model.w.tolist() == [0.0, 0.0]


def test_radius_zero_is_the_base(on_backend):
    """rho = 0: bit for bit the fused base, and with fused=False torch's own."""
    x, y = problems.batch()
    for fused, base in ((True, optim.SGD), (False, torch.optim.SGD)):
        results = []
        options = {"lr": 0.1, "momentum": 0.9}
        for make in (
            lambda p, f=fused: optim.SAM(p, torch.optim.SGD, rho=0.0, fused=f, **options),
            lambda p, b=base: b(p, **options),
        ):
            model = problems.net().eval()
            opt = make(model.parameters())
            for _ in range(4):
                opt.step(problems.closure_of(opt, model, x, y))
            results.append(problems.bits(model))
        assert problems.same(*results)


def test_running_mean_of_iterates(on_backend):
    """The mean in the state is that of the weights after each taken step, to 1e-15; `averaged` holds and gives back."""
    model = problems.Vector(1.0, -2.0)
    opt = optim.Gadam(model.parameters(), lr=0.05, average_start=2, average_every=3, weight_decay=0.1)
    seen = []
    for step in range(12):
        opt.zero_grad()
        quadratic(model, 2.0)()
        opt.step()
        if step >= 2 and (step - 2) % 3 == 0:
            seen.append(model.w.detach().clone())
    now = model.w.detach().clone()
    mean = torch.stack(seen).mean(0)
    with opt.averaged():
        torch.testing.assert_close(model.w.detach(), mean, rtol=1e-15, atol=1e-15)
    assert torch.equal(model.w.detach(), now)


def test_exponential_average_under_sam(on_backend):
    model = problems.Vector(1.0, -2.0)
    opt = optim.SAM(model.parameters(), lr=0.05, rho=0.1, average="ema", ema_decay=0.9)
    average = model.w.detach().clone()
    for _ in range(5):
        run(opt, quadratic(model, 2.0), 1)
        average = average + 0.1 * (model.w.detach() - average)
    torch.testing.assert_close(opt.state[model.w]["average"], average, rtol=1e-14, atol=1e-15)


def test_averages_forget_the_learning_rate():
    """A quadratic with noisy gradients, 400 chains: Var(last) = lr^2 s^2/(1 - (1 - lr h)^2) grows with lr, the variance
    of the mean of n iterates is s^2/(n h^2) whatever lr (Granziol et al.), each within five standard errors."""
    chains, n = 400, 2000
    for lr in (0.1, 0.5):
        torch.manual_seed(6)
        w = torch.nn.Parameter(torch.zeros(chains, dtype=torch.float64))
        opt = optim.SGD([w], lr=lr, average="mean", average_start=200)
        for _ in range(200 + n):
            w.grad = w.detach() + torch.randn(chains, dtype=torch.float64)
            opt.step()
        error = 5 * math.sqrt(2 / chains)
        assert w.detach().var().item() == pytest.approx(lr**2 / (1 - (1 - lr) ** 2), rel=error)
        assert opt.state[w]["average"].var().item() == pytest.approx(1 / n, rel=error + 0.02)


def test_micro_batches(on_backend):
    """m = 2: an ascent for each half, the second gradients added up, one step (fp64, by the formula)."""
    a = torch.diag(torch.tensor([2.0, 0.5], dtype=torch.float64))
    centres = [torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, -1.0], dtype=torch.float64)]
    model = problems.Vector(0.5, 0.7)
    w = model.w.detach().clone()
    wanted = torch.zeros_like(w)
    for c in centres:
        g = a @ (w - c)
        wanted += a @ (w + 0.1 * g / g.norm() - c) / 2
    opt = optim.SAM(model.parameters(), lr=1.0, rho=0.1)
    for i, c in enumerate(centres):
        loss = lambda c=c: (0.25 * (model.w - c) @ a @ (model.w - c)).backward()  # noqa: E731
        loss()
        opt.first_step(zero_grad=True)
        loss()
        if i == 0:
            opt.accumulate()
            assert torch.equal(model.w.detach(), w)
    opt.second_step(zero_grad=True)
    torch.testing.assert_close(w - model.w.detach(), wanted, rtol=1e-13, atol=1e-14)


def test_one_micro_batch_is_sam(on_backend):
    x, y = problems.batch()
    results = []
    for whole in (True, False):
        model = problems.net().eval()
        opt = optim.SAM(model.parameters(), lr=0.1, rho=0.1)
        backward = lambda m=model: F.cross_entropy(m(x), y).backward()  # noqa: E731
        backward()
        opt.first_step(zero_grad=True)
        backward()
        if not whole:
            opt.accumulate()
            assert all(p.grad is None for p in model.parameters())
            backward()
            for p in model.parameters():
                p.grad = None if p.grad is None else torch.zeros_like(p.grad)
            opt.first_step(zero_grad=True)
        opt.second_step()
        results.append(problems.bits(model))
    assert problems.same(*results)
