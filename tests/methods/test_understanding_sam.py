# SPDX-License-Identifier: Apache-2.0
"""m-SAM: parts of a batch, the ascent from another batch, several steps of it, and schedules of the radius."""

import pytest
import torch
from torch.nn import functional as F

import fastflat as ff
from fastflat.methods.lab import diagonal


def _net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


def _data(count=12):
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, generator=g, dtype=torch.float64), torch.randint(3, (count,), generator=g)


def _closure(net, opt, x, y, calls=None):
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(opt.own(x)), opt.own(y))
        loss.backward()
        if calls is not None:
            calls.append(opt.part)
        return loss

    return closure


def _gradient(net, x, y):
    return torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))


def _by_hand(net, parts, rho, lr):
    """Weights after a step of m-SAM, and the loss before it; each part weighs as many as its rows."""
    rows = sum(len(x) for x, _ in parts)
    before = [p.detach().clone() for p in net.parameters()]
    sums, loss = [torch.zeros_like(p) for p in before], 0.0
    for x, y in parts:
        loss += float(F.cross_entropy(net(x), y).detach()) * len(x) / rows
        g = _gradient(net, x, y)
        norm = torch.stack([t.square().sum() for t in g]).sum().sqrt()
        with torch.no_grad():
            for p, t in zip(net.parameters(), g, strict=True):
                p.add_(rho * t / norm)
        for s, t in zip(sums, _gradient(net, x, y), strict=True):
            s.add_(t * len(x) / rows)
        with torch.no_grad():
            for p, w in zip(net.parameters(), before, strict=True):
                p.copy_(w)
    return [w - lr * s for w, s in zip(before, sums, strict=True)], loss


@pytest.mark.parametrize("count", [12, 11])
def test_parts_weigh_as_their_rows(count):
    net, (x, y) = _net(), _data(count)
    want, loss = _by_hand(net, list(zip(x.tensor_split(4), y.tensor_split(4), strict=True)), 0.1, 0.5)
    opt, calls = ff.methods.MSAM(net, lr=0.5, rho=0.1, parts=4), []
    got = opt.step(_closure(net, opt, x, y, calls))
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]
    assert opt.part is None
    assert float(got) == pytest.approx(loss)
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


def test_by_hand_is_the_same():
    (x, y), ends = _data(), []
    for by_hand in (False, True):
        net = _net()
        opt = ff.methods.MSAM(net, lr=0.5, momentum=0.9, rho=0.1, parts=2)
        for _ in range(2):
            if not by_hand:
                opt.step(_closure(net, opt, x, y))
                continue
            opt.zero_grad()
            for j, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                F.cross_entropy(net(a), b).backward()
                opt.first_step(zero_grad=True)
                (F.cross_entropy(net(a), b) / 2).backward()
                if j == 0:
                    opt.accumulate()
            opt.second_step(zero_grad=True)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-13, atol=1e-15)


def test_ascent_of_another_batch():
    net, (x, y) = _net(), _data()
    before = [p.detach().clone() for p in net.parameters()]
    g = _gradient(net, x[:6], y[:6])
    norm = torch.stack([t.square().sum() for t in g]).sum().sqrt()
    with torch.no_grad():
        for p, t in zip(net.parameters(), g, strict=True):
            p.add_(0.1 * t / norm)
    there = _gradient(net, x[6:], y[6:])
    with torch.no_grad():
        for p, w in zip(net.parameters(), before, strict=True):
            p.copy_(w)
    opt = ff.methods.MSAM(net, lr=0.5, rho=0.1)
    opt.step(_closure(net, opt, x[6:], y[6:]), ascent=_closure(net, opt, x[:6], y[:6]))
    for p, w, t in zip(net.parameters(), before, there, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.5 * t, rtol=1e-12, atol=1e-14)


def test_statistics_follow_the_batch_of_the_step():
    x = torch.randn(2, 16, 4)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    opt = ff.methods.MSAM(net, lr=0.1, rho=0.1)
    y = torch.randint(2, (16,))
    opt.step(_closure(net, opt, x[0], y), ascent=_closure(net, opt, x[1], y))
    torch.testing.assert_close(net[0].running_mean, 0.1 * x[0].mean(0))


@pytest.mark.parametrize("at", [1, 3])
def test_an_exception_restores_the_weights(at):
    net, (x, y) = _net(), _data()
    opt = ff.methods.MSAM(net, lr=0.5, rho=0.1, parts=2, ascent_steps=2)
    before, calls = [p.detach().clone() for p in net.parameters()], []

    def closure():
        calls.append(0)
        if len(calls) > at:
            raise KeyError("stop")
        return _closure(net, opt, x, y)()

    with pytest.raises(KeyError):
        opt.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    assert opt.part is None
    assert not opt.is_perturbed
    calls.clear()
    at = 100
    opt.step(closure)
    assert len(calls) == 6


@pytest.mark.parametrize("normalise", [True, False])
def test_steps_of_ascent_are_projected(normalise):
    a = torch.tensor([1.0, 6.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt, seen = ff.methods.MSAM([w], lr=0.0, rho=0.05, ascent_steps=3, normalise=normalise, ascent_length=0.5), []

    def closure():
        opt.zero_grad()
        seen.append(w.detach().clone())
        loss = (a * w * w).sum() / 2
        loss.backward()
        return loss

    opt.step(closure)
    e = torch.zeros(2, dtype=torch.float64)
    for at in seen[1:]:
        g = a * (1 + e)
        e = e + 0.5 * 0.05 * (g / g.norm() if normalise else g)
        if normalise:
            e = e * min(1.0, 0.05 / float(e.norm()))
        torch.testing.assert_close(at, 1 + e, rtol=1e-13, atol=0)
    assert len(seen) == 4
    assert torch.equal(w.detach(), torch.ones(2, dtype=torch.float64))


def test_a_zero_gradient_perturbs_nothing():
    w = torch.nn.Parameter(torch.ones(3))
    opt = ff.methods.MSAM([w], lr=0.1, rho=0.1, ascent_steps=2, normalise=False)

    def closure():
        opt.zero_grad()
        loss = (w * 0).sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.equal(w.detach(), torch.ones(3))


def test_schedule_and_passes():
    net, (x, y) = _net(), _data()
    opt, calls = ff.methods.MSAM(net, lr=0.1, rho=0.3), []
    schedule = ff.methods.RadiusSchedule(opt, 4, 0.5, 0.75)
    radii, passes = [], []
    for _ in range(4):
        radii.append(opt.param_groups[0]["rho"])
        calls.clear()
        opt.step(_closure(net, opt, x, y, calls))
        passes.append(len(calls))
        schedule.step()
    assert radii == [0, 0, 0.3, 0]
    assert passes == [1, 1, 2, 1]
    other = ff.methods.MSAM(_net(), lr=0.1, rho=0.3)
    again = ff.methods.RadiusSchedule(other, 4, 0.5, 0.75)
    again.load_state_dict({"count": 2, "radii": [0.3]})
    assert other.param_groups[0]["rho"] == 0.3
    followed = ff.methods.MSAM(_net(), lr=0.1, rho=0.3)
    ff.methods.RadiusSchedule(followed, 4, per_rate=2.0)
    assert followed.param_groups[0]["rho"] == pytest.approx(0.2)


def test_loss_scaling_is_refused_where_e_would_be_scaled():
    w = torch.nn.Parameter(torch.ones(3))
    opt = ff.methods.MSAM([w], lr=0.1, rho=0.1, normalise=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(w.square().sum()).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(w.square().sum()).backward()
    with pytest.raises(RuntimeError, match="normalise must be True under GradScaler"):
        scaler.step(opt)
    assert torch.equal(w.detach(), torch.ones(3))


def test_refused():
    w = [torch.nn.Parameter(torch.ones(3))]
    for options, message in (
        ({"parts": 0}, "parts must be an integer of at least 1, got 0"),
        ({"ascent_length": 2.0}, r"ascent_length must lie in \(0, 1\], got 2.0"),
        ({"ascent_steps": 2, "adaptive": True}, "ascent_steps must be 1 with adaptive"),
        ({"normalise": False, "metric": "linf"}, "normalise must be True where adaptive or metric is given"),
        ({"ascent_steps": 2, "storage": "swap"}, "ascent_steps must be 1 with"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.methods.MSAM(w, lr=0.1, **options)
    opt = ff.methods.MSAM(w, lr=0.1, parts=3)
    with pytest.raises(ValueError, match="x must have a row for each of 3 parts, got 2 rows"):
        opt.step(lambda: opt.own(torch.ones(2)))
    for arguments, message in (
        ((torch.optim.SGD(w, lr=0.1), 3), "optimizer must be a SAM"),
        ((opt, 0), "steps must be at least 1, got 0"),
        ((opt, 3, 0.5, 0.5), "begin and end must lie in this order"),
        ((opt, 3, 0.0, 1.0, -1.0), "per_rate must be positive"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ff.methods.RadiusSchedule(*arguments)
    with pytest.raises(ValueError, match="radii must be 1 as the groups are, got 2"):
        ff.methods.RadiusSchedule(opt, 3).load_state_dict({"count": 0, "radii": [0.1, 0.1]})
    with pytest.raises(ValueError, match="m must be 1 or None, got 2"):
        diagonal.recover(*diagonal.sparse_regression(1)[:2], 1, 0.1, 2)
